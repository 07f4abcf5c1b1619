"""A place for one worker, what the worker is busy with, and what is heard of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from search.workers.devices import Device
from search.workers.engine import Worker
from search.workers.protocol import Message

# A worker that has reported at least twice and then says nothing for so many times its longest
# interval, and for so long, hangs. Generous: what comes after the last report is not known.
SILENT_INTERVALS = 10
LEAST_SILENCE = 300.0  # seconds
OUT_OF_MEMORY = "out_of_memory"  # how an attempt ended, where there is evidence


@dataclass
class Task:
    """What a worker is busy with."""

    trial: int
    attempt: int
    content: Message
    timeout: float | None = None  # seconds
    started: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)  # the last message, of whatever kind
    reported: float = 0.0  # the last report, or step of a winner's training
    interval: float = 0.0  # the longest between two reports

    def hear(self, message: Message) -> None:
        self.heard = time.monotonic()
        if message["type"] in ("report", "progress") and "step" in message:
            if self.reported:
                self.interval = max(self.interval, self.heard - self.reported)
            self.reported = self.heard

    def excuse(self, seconds: float, now: float) -> None:
        """So long nobody has listened: that is not its worker's doing."""
        self.started = min(self.started + seconds, now)
        self.heard = min(self.heard + seconds, now)

    def overdue(self, silence: float | None, now: float) -> str:
        """Why its worker is to be ended, or nothing.

        Args:
            now: monotonic seconds.
            silence: seconds after which a worker that says nothing hangs; None for a guess from
                its own reports.
        """
        if self.timeout and now - self.started > self.timeout:
            return f"took longer than --trial-timeout={self.timeout:g}s"
        usual = max(LEAST_SILENCE, SILENT_INTERVALS * self.interval) if self.interval else None
        if (most := silence or usual) and now - self.heard > most:
            return f"said nothing for {now - self.heard:.0f} s"
        return ""


@dataclass
class Slot:
    """A place for one worker; workers come and go, the slot stays."""

    index: int
    device: Device
    worker: Worker | None = None
    host: str = ""  # of its last worker that was ready
    described: bool = False  # has loaded the study and can be prepared
    ready: bool = False
    failed_starts: int = 0  # workers in a row that were never ready
    is_hopeless: bool = False  # there were too many of these
    start_at: float = 0.0  # monotonic seconds, where it has no worker
    asked: float = math.inf  # monotonic seconds: its worker, not ready, has owed an answer since
    task: Task | None = None
    has_whole_gpu: bool = False  # its worker, for the one task that is alone
    rss: int = 0  # bytes, after the last task
    rss_at_first: int = 0  # bytes, after the worker's first task
    status: dict[str, Any] = field(default_factory=dict)  # for the terminal view


@dataclass(frozen=True)
class Event:
    """A worker's message about its current task, or its death (`lost` says how)."""

    slot: Slot
    message: Message
    lost: str | None = None
    task: Task | None = None
    kind: str = "killed"  # of a loss; timeout or out_of_memory where that is known
