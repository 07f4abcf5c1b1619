"""One frame of the live view: workers, how far it has come, the best so far, the last events.

    console.print(frame(picture, slots, console.options))

Each line is one line at any width: what does not fit is left out, column by column, and then cut.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import ConsoleOptions, Group
from rich.table import Table
from rich.text import Text

from search import results
from search.view.textplot import sparkline
from search.view.time_left import Finished, Running, time_left
from search.workers.slots import Slot, Task

STATES = ("complete", "pruned", "fail")
NUM_EVENTS = 4
# Below so many columns devices, speeds and the bar are left out; and the accuracy.
_WIDE, _NARROW = 72, 48
_BAR = 24
_SPARKLINE = 40


@dataclass
class Picture:
    """What is known of a part of the run."""

    title: str = ""
    goal: int = 0
    num_reports: int = 0  # of a trial that is not pruned; 0: unknown
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))
    best: tuple[float, int] | None = None  # value, trial
    bests: list[float] = field(default_factory=list)  # the best value after each finished trial
    finished: list[Finished] = field(default_factory=list)
    saved: float = 0.0  # share of the training that pruning saved
    deadline: float = math.inf  # monotonic seconds, of a time budget
    events: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_EVENTS))


def frame(picture: Picture, slots: Sequence[Slot], options: ConsoleOptions) -> Group:
    """The view as it stands, in lines that fit the terminal's width and together its height."""
    lines = [
        _progress(picture, slots, options),
        _best(picture, options),
        _counts(picture),
        *(Text(event, style="dim") for event in picture.events),
    ]
    shown = [_one_line(line) for line in lines if line]
    # A heading, a line for those left out, and the line of the cursor.
    rows = max(1, options.size.height - len(shown) - 3)
    parts: list[Table | Text] = []
    if slots:
        parts.append(_workers(picture, slots[:rows], options.max_width))
    if len(slots) > rows:
        parts.append(_one_line(Text(f"... and {len(slots) - rows} more", style="dim")))
    return Group(*parts, *shown)


def seconds_left(picture: Picture, slots: Sequence[Slot]) -> float | None:
    """Until this part of the run is done; None where nothing can be said yet."""
    now = time.monotonic()
    # A worker may still be clearing up a trial that has been told; winners share their number.
    told = {trial.number for trial in picture.finished} if picture.num_reports else set()
    running = [
        _running(slot.task, slot.status, now, picture.num_reports)
        for slot in slots
        if slot.task is not None and slot.task.trial not in told
    ]
    waiting = picture.goal - sum(picture.counts.values()) - len(running)
    left = time_left(
        picture.finished,
        running,
        num_waiting=max(0, waiting),
        num_workers=len(slots),
        num_reports=picture.num_reports,
    )
    if left is None:
        return None if picture.deadline == math.inf else max(0.0, picture.deadline - now)
    return max(0.0, min(left, picture.deadline - now))


def _running(task: Task, status: dict[str, Any], now: float, num_reports: int) -> Running:
    """One that went on behind earlier attempts counts as if it had always been as fast as now."""
    step, before = int(status.get("step") or 0), int(status.get("before") or 0)
    seconds = now - task.started
    if step > before:
        seconds *= step / (step - before)
    return Running(task.trial, seconds, step, int(status.get("of") or num_reports))


def _workers(picture: Picture, slots: Sequence[Slot], width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    headings = ["worker", "does", "report", "accuracy", "images/s"]
    shown = headings if width >= _WIDE else headings[:4] if width >= _NARROW else headings[:3]
    for heading in shown:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for slot in slots:
        status = slot.status
        step, of = status.get("step"), status.get("of") or picture.num_reports
        value = status.get("value", status.get("accuracy"))
        speed = status.get("images_per_second")
        report = "" if step is None else f"{step}/{of}" if of else str(step)
        cells = [
            f"{slot.index} ({slot.device.label})" if width >= _WIDE else str(slot.index),
            status.get("what", "ready" if slot.ready else "starting"),
            status.get("note") or report,
            results.decimal(value),
            "" if speed is None else f"{speed:,.0f}",
        ]
        table.add_row(*(Text(cell) for cell in cells[: len(shown)]))
    return table


def _progress(picture: Picture, slots: Sequence[Slot], options: ConsoleOptions) -> Text:
    if not picture.goal:
        return Text(picture.title, style="bold")
    done = sum(picture.counts.values())
    text = Text(f"{picture.title}: {done} of {picture.goal}", style="bold")
    if options.max_width >= _WIDE:
        full, empty = "#-" if options.ascii_only else "━─"
        filled = min(_BAR, _BAR * done // picture.goal)
        text.append(f"  {full * filled}", style="green").append(empty * (_BAR - filled), "dim")
    left = seconds_left(picture, slots)
    if left is not None and done < picture.goal:
        text.append(f"  about {results.duration(left)} left")
    return text


def _best(picture: Picture, options: ConsoleOptions) -> Text:
    if picture.best is None:
        return Text()
    text = Text(f"best {results.decimal(picture.best[0])} (trial {picture.best[1]})", style="bold")
    width = min(_SPARKLINE, options.max_width - len(text) - 2)
    if len(picture.bests) > 1 and not options.ascii_only:
        text.append("  " + sparkline(picture.bests, width), style="cyan")
    return text


def _counts(picture: Picture) -> Text:
    parts = [f"{count} {state}" for state, count in picture.counts.items() if count]
    if picture.saved:
        parts.append(f"{picture.saved:.0%} of the epochs saved by pruning")
    return Text(", ".join(parts))


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
