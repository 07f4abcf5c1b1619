"""What SIGINT, SIGTERM and SIGHUP end, and how: in good order first, at once the second time.

with signals.ending(pool), pool:      # a run with workers: the pool raises Interrupted
with signals.interruptible(5.0):      # what this process does by itself, for so long at most
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from search.errors import Interrupted
from search.workers.pool import Pool

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ending(pool: Pool) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP ends the run in good order, the second at once."""

    def handle(number: int, _frame: object) -> None:
        if pool.interrupted:
            os._exit(128 + number)
        pool.interrupted = number

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread, whose owner handles them
        return
    with _handled_by(handle, _SIGNALS):
        yield


@contextmanager
def interruptible(seconds: float | None) -> Iterator[None]:
    """What is done inside ends at once at a signal, and after some seconds.

    Raises:
        Interrupted: after SIGINT, SIGTERM or SIGHUP.
        TimeoutError: when the seconds are over.
    """
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        if number != signal.SIGALRM and set(came) - {signal.SIGALRM}:
            os._exit(128 + number)  # the first was not heard
        came.append(number)
        raise KeyboardInterrupt  # nothing that draws catches this one

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled_by(handle, _SIGNALS if seconds is None else (*_SIGNALS, signal.SIGALRM)):
        try:
            if seconds is not None:
                # Again and again: one that comes while an object is deleted is not heard.
                signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
            try:
                yield
            finally:
                if seconds is not None:
                    signal.setitimer(signal.ITIMER_REAL, 0.0)
        except KeyboardInterrupt:
            if numbers := [number for number in came if number != signal.SIGALRM]:
                raise Interrupted(numbers[0]) from None
            raise TimeoutError(f"longer than {seconds} s") from None


@contextmanager
def _handled_by(handler: Callable[[int, Any], None], numbers: tuple[int, ...]) -> Iterator[None]:
    # `nohup` has the hangup ignored, for what is to go on without its terminal. (An interrupt that
    # is ignored says nothing: a shell's script does that to all that it starts with &.)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers = tuple(number for number in numbers if number != signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
