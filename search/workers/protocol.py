"""What coordinator and worker say to each other: JSON lines over a socket pair.

    coordinator                                   worker
    open     file (the study's)              ->
                                             <-   described  the study's settings
    prepare  settings, search                ->
                                             <-   ready      space, known points, memory, ...
    start    trial, attempt, task, ...       ->
                                             <-   suggest    trial, attempt, kind, name, ...
                                             <-   take       trial, attempt, draft
                                             <-   attribute  trial, attempt, key, value
    answer   trial, attempt, value | error   ->
                                             <-   report     trial, attempt, value, step, metrics
    answer   trial, attempt, value (prune?)  ->
                                             <-   resumed    trial, attempt, step (no answer)
                                             <-   progress   trial, attempt, ... (no answer)
                                             <-   finished   trial, attempt, outcome, ...
                                             <-   failed     why it can't begin

Every message about a task carries trial and attempt, so that what an old attempt says can be
dropped. No pickle: a worker can make the coordinator do nothing but these. A closed socket is a
death notice, in both directions.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import select
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

SUGGESTIONS = ("float", "int", "categorical")
MOST_STEPS = 2**31  # what PostgreSQL's whole numbers hold
_CHUNK = 1 << 16  # bytes asked of the socket at a time


class Channel:
    """One end of the socket pair. The coordinator reads what is there, never waits."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._unread = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises OSError when the other side is gone, ValueError for NaN, which is not JSON."""
        self._socket.sendall(json.dumps(message, allow_nan=False).encode() + b"\n")

    def receive(self) -> list[Message]:
        """The messages that one read completes (blocks only if nothing has arrived).

        Raises:
            EOFError: when the other side has closed or died.
        """
        try:
            data = self._socket.recv(_CHUNK)
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def is_readable(self, timeout: float = 0.0) -> bool:
        """Whether there is something to receive, or an end of file, within `timeout` seconds."""
        poll = select.poll()  # select.select takes no descriptor above 1023
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(1000 * timeout))

    def close(self) -> None:
        self._socket.close()


class WorkerConnection:
    """The worker's end: a thread reads, and ends the process the moment the coordinator dies."""

    def __init__(self, channel: Channel):
        self._channel = channel
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except OSError:
            _end_process()

    def receive(self) -> Message:
        return self._inbox.get()

    def _read(self) -> None:
        try:
            while True:
                for message in self._channel.receive():
                    self._inbox.put(message)
        except EOFError:
            _end_process()


def _end_process() -> None:
    """At once, with what it has started: the main thread may be deep in a training step, and
    nobody is left to hear what it finds."""
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


class TrialEnded(Exception):
    """The coordinator has finished this trial (it was behind): there is nothing left to ask."""


class Diverged(Exception):
    """A value that is not finite: it is never stored, the trial ends as `diverged`."""


class _Suggestions:
    """What an Optuna trial can be asked for."""

    params: dict[str, Any]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return self._suggest(name, "float", {"low": low, "high": high, "step": step, "log": log})

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return self._suggest(name, "int", {"low": low, "high": high, "step": step, "log": log})

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._suggest(name, "categorical", {"choices": list(choices)})

    def _suggest(self, name: str, kind: str, arguments: dict[str, Any]) -> Any:
        raise NotImplementedError


class RemoteTrial(_Suggestions):
    """Looks like an Optuna trial to the code in a worker; the coordinator does the work.

    Args:
        connection: to the coordinator.
        number: the trial's number in the study, from 0.
        attempt: which attempt at this trial this is, from 1.
    """

    def __init__(self, connection: WorkerConnection, number: int, attempt: int):
        self.number = number
        self.attempt = attempt
        self.params: dict[str, Any] = {}
        self._connection = connection
        self._prune = False

    def draft(self, number: int) -> Draft:
        """One of the points drawn for this trial; `take` it, or another."""
        return Draft(self, number)

    def report(
        self, value: float, step: int, metrics: dict[str, float] | None = None, **progress: float
    ) -> None:
        """Store `value` at `step` (whole number from 0) and learn whether to go on.

        Args:
            metrics: more figures of this step, stored beside the value. Here and in `progress`,
                what is no finite number is left out.
            progress: figures for the terminal, such as images_per_second. The last report's are
                stored, but for those named as an attribute that the trial has.

        Raises:
            Diverged: if the value is not finite.
            ValueError: if the step is none that a database can store.
        """
        if not 0 <= step < MOST_STEPS:
            raise ValueError(f"a step is a whole number from 0 to 2**31 - 1. Received: {step!r}")
        if not math.isfinite(value):
            raise Diverged(f"the value reported at step {step} is {value}")
        self._prune = self.ask(
            "report",
            value=float(value),
            step=int(step),
            metrics=_finite(metrics or {}),
            progress=_finite(progress),
        )

    def should_prune(self) -> bool:
        """The coordinator's answer to the last report."""
        return self._prune

    def resume(self, step: int) -> None:
        """This attempt goes on after `step`, which an earlier one has reported."""
        self._connection.send(
            {"type": "resumed", "trial": self.number, "attempt": self.attempt, "step": step}
        )

    def progress(self, note: str) -> None:
        """For the terminal only, of work that comes before the first report."""
        self._connection.send(
            {"type": "progress", "trial": self.number, "attempt": self.attempt, "note": note}
        )

    def set_user_attr(self, key: str, value: Any) -> None:
        self.ask("attribute", key=key, value=value)

    def _suggest(self, name: str, kind: str, arguments: dict[str, Any]) -> Any:
        self.params[name] = self.ask("suggest", name=name, kind=kind, arguments=arguments)
        return self.params[name]

    def ask(self, type_: str, **content: Any) -> Any:
        self._connection.send(
            {"type": type_, "trial": self.number, "attempt": self.attempt, **content}
        )
        answer = self._connection.receive()
        if "ended" in answer:
            raise TrialEnded
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]


class Draft(_Suggestions):
    """A point of a trial that may become the trial's."""

    def __init__(self, trial: RemoteTrial, number: int):
        self.params: dict[str, Any] = {}
        self._trial = trial
        self._number = number

    def take(self) -> None:
        """From now on the trial's own suggestions are these."""
        self._trial.ask("take", draft=self._number)

    def _suggest(self, name: str, kind: str, arguments: dict[str, Any]) -> Any:
        asked = {"name": name, "kind": kind, "arguments": arguments, "draft": self._number}
        self.params[name] = self._trial.ask("suggest", **asked)
        return self.params[name]


def _finite(figures: dict[str, Any]) -> dict[str, float]:
    finite = {}
    for name, value in figures.items():
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # no number
            if math.isfinite(number := float(value)):
                finite[name] = number
    return finite
