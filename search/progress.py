"""What is to be seen while it runs: one view over all workers on a terminal, else plain lines.

    with View(quiet=False) as view: ...

Lines are the log's own (`logging`, name "search"); the log file has them always.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from search.pool import Slot

logger = logging.getLogger("search")
_STATES = ("complete", "pruned", "fail")


class View:
    """The terminal's picture of a run.

    Args:
        verbosity: below 0 only warnings, above 0 every event beside the live view too.
    """

    def __init__(self, verbosity: int = 0):
        self.console = Console(stderr=True, highlight=False)
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._is_live = self.console.is_terminal and verbosity >= 0
        self._verbosity = verbosity
        self._title = ""
        self._goal = 0
        self._num_reports = 0
        self._counts = dict.fromkeys(_STATES, 0)
        self._best: tuple[float, int] | None = None  # value, trial
        self.saved = 0.0  # share of the training that pruning saved
        self._began = time.monotonic()
        self._done_before = 0

    def __enter__(self) -> Self:
        logger.setLevel(logging.DEBUG)  # each handler shows what it is there for
        logger.addHandler(self._handler())
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_live:
            self._live.stop()
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()

    def log_to(self, path: Path) -> None:
        """Also write every line to a file, after what stands there."""
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)

    def begin(self, title: str, goal: int, num_reports: int = 0) -> None:
        """A new part of the run: so many things to finish, of so many reports each."""
        self._title, self._goal, self._num_reports = title, goal, num_reports
        self._counts = dict.fromkeys(_STATES, 0)
        self._done_before, self._began, self.saved = 0, time.monotonic(), 0.0

    def finished_before(self, state: str, number: int, value: float | None) -> None:
        """What an earlier run has done: counted, but not for the time left."""
        self.finished(state, number, value)
        self._done_before += 1

    def finished(self, state: str, number: int, value: float | None) -> None:
        self._counts[state] += 1
        if value is not None and (self._best is None or value > self._best[0]):
            self._best = (value, number)

    def refresh(self, slots: list[Slot]) -> None:
        if self._is_live:
            self._live.update(Group(self._workers(slots), self._summary()))

    def _workers(self, slots: list[Slot]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("worker", "does", "report", "accuracy", "images/s"):
            table.add_column(heading, no_wrap=True)
        for slot in slots:
            status = slot.status
            step, of = status.get("step"), status.get("of") or self._num_reports
            value = status.get("value", status.get("accuracy"))
            speed = status.get("images_per_second")
            report = "" if step is None else f"{step}/{of}" if of else str(step)
            table.add_row(
                f"{slot.index} ({slot.device.label})",
                status.get("what", "ready" if slot.ready else "starting"),
                status.get("note") or report,
                "" if value is None else f"{value:.4f}",
                "" if speed is None else f"{speed:,.0f}",
            )
        return table

    def _summary(self) -> Text:
        done = sum(self._counts.values())
        parts = [f"{self._title}: {done} of {self._goal}"]
        parts += [f"{count} {state}" for state, count in self._counts.items() if count]
        if self._best:
            parts.append(f"best {self._best[0]:.4f} (trial {self._best[1]})")
        if self.saved:
            parts.append(f"{self.saved:.0%} of the epochs saved by pruning")
        if left := self._time_left(done):
            parts.append(f"about {left} left")
        return Text(" | ".join(parts), style="bold")

    def _time_left(self, done: int) -> str:
        done_now = done - self._done_before
        if done_now < 2:
            return ""
        seconds = (time.monotonic() - self._began) / done_now * (self._goal - done)
        return duration(seconds)

    def _handler(self) -> logging.Handler:
        if self._is_live:
            live = RichHandler(console=self.console, show_path=False, show_level=False)
            live.setLevel(logging.INFO if self._verbosity > 0 else logging.WARNING)
            return live
        lines = logging.StreamHandler(sys.stderr)
        lines.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        lines.setLevel(logging.WARNING if self._verbosity < 0 else logging.INFO)
        return lines


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `1 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
