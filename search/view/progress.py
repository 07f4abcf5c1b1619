"""What is to be seen while it runs: one view over all workers on a terminal, else plain lines.

    with View(quiet=False) as view: ...

Lines are the log's own (`logging`, name "search"); the log file has them always.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler

from search.view.live import Picture, frame
from search.view.time_left import Finished
from search.workers.slots import Slot

logger = logging.getLogger("search")
_PERIOD = 0.25  # seconds between two frames


class View:
    """The terminal's picture of a run.

    Args:
        verbosity: below 0 only warnings, above 0 every event beside the live view too.
    """

    def __init__(self, verbosity: int = 0):
        self.console = Console(stderr=True, highlight=False)
        # Drawn by `refresh` alone: a thread's frame could be laid out for another width.
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        is_terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self._is_live = is_terminal and verbosity >= 0
        self._verbosity = verbosity
        self._picture = Picture()
        self._size = self.console.size
        self._slots: list[Slot] = []
        self._handlers: list[logging.Handler] = []
        self._drawn = 0.0  # monotonic seconds, of the last frame

    def __enter__(self) -> Self:
        self._before = logger.level, logger.propagate
        logger.setLevel(logging.DEBUG)  # each handler shows what it is there for
        logger.propagate = False  # a caller's own handlers would show all of it
        self._add(self._handler())
        if self._is_live:
            if self._verbosity == 0:  # above, they stand over the view
                self._add(_Events(self))
            self._live.start()
        return self

    def __exit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_live:
            with suppress(OSError):  # as below
                self._live.stop()
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        level, logger.propagate = self._before
        logger.setLevel(level)

    def log_to(self, path: Path) -> None:
        """Also write every line to a file, after what stands there."""
        handler = _File(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._add(handler)

    def _add(self, handler: logging.Handler) -> None:
        self._handlers.append(handler)
        logger.addHandler(handler)

    def begin(self, title: str, goal: int, num_reports: int = 0) -> None:
        """A new part of the run: so many things to finish, of so many reports each."""
        before = self._picture
        self._picture = Picture(
            title, goal, num_reports, best=before.best, bests=before.bests, events=before.events
        )

    def ends_at(self, deadline: float) -> None:
        """This part ends then, done or not; monotonic seconds."""
        self._picture.deadline = deadline

    def saves(self, share: float) -> None:
        """What pruning has saved of the training until now, 0 to 1."""
        self._picture.saved = share

    def finished(
        self,
        state: str,
        number: int,
        value: float | None,
        *,
        reports: int = 0,
        seconds: float | None = None,
    ) -> None:
        """Something has ended, now or before an earlier interruption, after so many reports."""
        picture = self._picture
        picture.counts[state] += 1
        if seconds is not None:
            picture.finished.append(Finished(number, seconds, reports))
        if value is not None and (picture.best is None or value > picture.best[0]):
            picture.best = (value, number)
        is_trial = value is not None or state != "complete"  # else a winner, trained or measured
        if picture.best is not None and is_trial:
            picture.bests.append(picture.best[0])

    def said(self, event: str) -> None:
        """A line for the last few events."""
        self._picture.events.append(f"{time.strftime('%H:%M:%S')} {event}")
        if self._is_live:
            self._draw()

    def refresh(self, slots: list[Slot]) -> None:
        """Show the workers as they are; called often, drawn four times a second."""
        self._slots = slots
        if self._is_live and time.monotonic() - self._drawn >= _PERIOD:
            self._draw()

    def _draw(self) -> None:
        try:
            self._draw_frame()
        except OSError:  # the terminal is gone: the log file has all lines
            self._is_live = False
            with suppress(OSError):
                self._live.stop()

    def _draw_frame(self) -> None:
        self._drawn = time.monotonic()
        if self.console.size != self._size:
            self._size = self.console.size
            # The terminal has wrapped the last frame's lines anew: how many it has now is unknown.
            self._live.stop()
            self.console.clear()
            self._live.start()
        self._live.update(frame(self._picture, self._slots, self.console.options), refresh=True)

    def _handler(self) -> logging.Handler:
        if self._is_live:
            live = RichHandler(console=self.console, show_path=False, show_level=False)
            live.setLevel(logging.INFO if self._verbosity > 0 else logging.WARNING)
            return live
        lines = logging.StreamHandler(sys.stderr)
        lines.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        lines.setLevel(logging.WARNING if self._verbosity < 0 else logging.INFO)
        return lines


class _File(logging.FileHandler):
    """The log file. A full disk costs its lines, not the run."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            self._has_failed = True
            free = shutil.disk_usage(Path(self.baseFilename).parent).free
            logger.warning(
                "%s lacks lines from here on: %s; it needs %d bytes, %d are free. The run goes on",
                self.baseFilename,
                sys.exc_info()[1],
                len(self.format(record)),
                free,
            )

    def close(self) -> None:
        with suppress(OSError):  # what is left in its buffer
            super().close()


class _Events(logging.Handler):
    """The log's lines, to the view."""

    def __init__(self, view: View):
        super().__init__(logging.INFO)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        self._view.said(record.getMessage().splitlines()[0])
