"""Warm workers: starts them, prepares them, hears them, replaces those that die.

What they are given to do is the business of `coordinator.py` (trials) and `retrain.py` (winners).
"""

from __future__ import annotations

import contextlib
import logging
import math
import selectors
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from search.errors import EXIT_USAGE, Interrupted, SearchError
from search.workers.devices import Device, share_out
from search.workers.engine import Engine
from search.workers.local import LocalEngine
from search.workers.protocol import Message
from search.workers.slots import OUT_OF_MEMORY, Event, Slot, Task

logger = logging.getLogger("search")

# A worker that grew by this much since its first task is replaced by a fresh one: the space's code
# may keep what it likes, and Keras and TensorFlow keep some memory of each new shape.
MAX_GROWTH = 130 * 2**20  # bytes
# A worker that does not load the study, or does not become ready, for so long hangs; --silence
# where that is longer. With data on a slow network disk it takes minutes.
LONGEST_START = 600.0  # seconds
_MAX_FAILED_STARTS = 3  # workers of a slot in a row that die, or hang, before they are ready
_MAX_KILLED_STARTS = 12  # killed by signals: somebody else may send them, or memory lacks
# Where other slots go on, one whose workers fail so often is tried again later and later: what is
# wrong with a node, a disk or a file may pass.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds
# Where so many are busy, what they say in so long is read at once, and stored in one transaction,
# which costs more than all the words in it.
_MANY, _GATHERING = 8, 0.005  # workers, seconds
_LOOK_EVERY = 0.25  # seconds, for those that are late, or dead without a word


def run_task(file: Path, settings: Message, task: Message) -> Message:
    """One task on one worker of its own, outside a search: the command line imports no Keras.

    Args:
        file: of the study.
        settings: as `prepare` sends them.
        task: its name under `task`, and its content.

    Raises:
        SearchError: if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="fmnist-search-") as logs:
        device = share_out("1")[0]
        opening = {"type": "open", "file": str(file)}
        # Nobody could raise a limit.
        with Pool(LocalEngine(Path(logs)), [device], opening, math.inf) as pool:
            pool.wait_for_description()
            pool.prepare(settings, search=False)
            pool.wait_for_space()
            pool.give(pool.slots[0], 0, 1, task)
            while True:
                for event in pool.poll(1.0):
                    if event.lost is not None:
                        raise SearchError(
                            f"the worker {event.lost.splitlines()[0]}", detail=event.lost
                        )
                    if event.message["type"] != "finished":
                        continue
                    if event.message["outcome"] != "complete":
                        detail = event.message.get("traceback", "")
                        raise SearchError(event.message["reason"], detail=detail)
                    return event.message


class Pool:
    """The workers of one run.

    Args:
        engine: where they run.
        devices: one for each slot.
        opening: the `open` message that each worker gets first.
        silence: seconds after which a worker that says nothing is replaced; None for a guess. One
            that is not ready is replaced after LONGEST_START, where that is longer.
    """

    def __init__(
        self,
        engine: Engine,
        devices: list[Device],
        opening: Message,
        silence: float | None = None,
    ):
        self._silence = silence
        self.slots = [Slot(index, device) for index, device in enumerate(devices)]
        self._engine = engine
        self._opening = opening
        self._preparation: Message | None = None
        self._selector = selectors.DefaultSelector()
        self._listened = time.monotonic()  # when it was last seen what the workers said
        self._looked = self._listened  # when it was last seen whether they live
        self._has_given = False  # any task
        self.interrupted = 0  # the number of the signal that asked the run to end
        self.described: Message | None = None  # what the study says of itself
        self.space: Message | None = None  # space and known points, from the first ready worker

    def __enter__(self) -> Pool:
        try:
            for slot in self.slots:
                self._start(slot)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self.slots:
            self._stop(slot)
        self._selector.close()

    def wait_for_description(self) -> Message:
        """The study's own settings, as the first worker that has loaded it tells them."""
        while self.described is None:
            list(self.poll(1.0))
        return self.described

    def prepare(self, settings: Message, *, search: bool = True) -> None:
        """Tell every worker, now and later, what the run is; they answer when they are ready.

        Args:
            search: read the data and describe the space first.
        """
        provided = self._engine.provide(settings)
        self._preparation = {"type": "prepare", "settings": provided, "search": search}
        for slot in self.slots:
            if slot.worker and slot.described:
                self._prepare(slot)

    def wait_for_space(self) -> Message:
        while self.space is None:
            list(self.poll(1.0))
        return self.space

    def idle(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.ready and slot.task is None]

    def busy(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.task is not None]

    def give(
        self,
        slot: Slot,
        trial: int,
        attempt: int,
        content: Message,
        timeout: float | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """Start a task on an idle slot; a worker that takes longer (seconds) is replaced.

        Args:
            alone: the others of its host, idle all, are replaced first: an idle worker keeps what
                memory its last task took, on a GPU too. So is its own, where a share of a GPU's
                memory is all that it may take.
        """
        for other in self.slots if alone else ():
            if other is not slot and other.host == slot.host:
                self._restart(other)
        if alone and slot.device.share < 1.0:
            self._restart(slot, has_whole_gpu=True)
        self._has_given = True
        slot.task = Task(trial, attempt, content, timeout)
        if slot.ready:
            self._begin(slot, slot.task)

    def drop_tasks(self) -> None:
        """Replace the workers that are still busy: nobody is left to answer what they say."""
        for slot in self.busy():
            self._restart(slot)

    def shares_memory(self, slot: Slot) -> bool:
        """Whether another slot may take memory of this one's GPU, or it has none of its own."""
        mine = slot.host, slot.device.gpu
        others = ((other.host, other.device.gpu) for other in self.slots if other is not slot)
        return slot.device.gpu is None or slot.device.share < 1.0 or mine in others

    def answer(self, slot: Slot, **content: Any) -> None:
        if slot.task is not None:
            stamp = {"trial": slot.task.trial, "attempt": slot.task.attempt}
            self._send(slot, {"type": "answer", **stamp, **content})

    def can_widen(self) -> bool:
        """Whether more threads are of use, and to be had."""
        has_gpu = any(slot.device.gpu is not None for slot in self.slots)
        return self._engine.has_wide_workers and not has_gpu

    def give_threads(self, slot: Slot, threads: int) -> None:
        """Replace an idle slot's worker by one with so many threads (fixed when one starts)."""
        if slot.device.threads == threads:
            return
        slot.device = replace(slot.device, threads=threads)
        self._restart(slot)

    def wait(self, seconds: float) -> None:
        """Sleep, unless a signal has come or comes: then raise Interrupted."""
        end = time.monotonic() + seconds
        while not self.interrupted and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        if self.interrupted:
            raise Interrupted(self.interrupted)

    def poll(self, timeout: float) -> Iterator[Event]:
        """What the workers have said by now; waits up to `timeout` seconds for the first word.

        Raises:
            SearchError: if the study can't be loaded, or no slot's workers live until they are
                ready, or one comes with another space than the first.
            Interrupted: once a signal has come.
        """
        if self.interrupted:
            raise Interrupted(self.interrupted)
        for device in self._engine.joined():
            self.slots.append(Slot(len(self.slots), device))
            self._start(self.slots[-1])
        now = time.monotonic()
        for each in self.slots:
            if each.worker is None and now >= each.start_at:
                self._start(each)
            elif each.worker and not each.worker.pid:  # a cluster has not begun it yet
                each.asked = now
        # A storage that fails may have kept the coordinator from listening.
        self._excuse(now - self._listened, now)
        heard = self._selector.select(timeout)
        if heard and len(self.busy()) > _MANY:
            time.sleep(_GATHERING)
            heard = self._selector.select(0)
        self._listened = time.monotonic()
        # Ctrl-Z, and then fg an hour later.
        self._excuse(self._listened - now - timeout, self._listened)
        if self.interrupted:  # who sent the signal may have sent it to the workers, too
            raise Interrupted(self.interrupted)
        for key, _ in heard:
            slot: Slot = key.data
            if slot.worker is None or slot.worker.channel is not key.fileobj:
                continue
            events, is_lost = [], False
            try:
                for message in slot.worker.channel.receive():
                    events.append(self._hear(slot, message))
            except (EOFError, ValueError, KeyError, TypeError):  # or it speaks no sense
                is_lost = True
            yield from filter(None, events)
            if is_lost:
                yield from self._lost(slot)
        if heard and self._listened - self._looked < _LOOK_EVERY:
            return
        self._looked = self._listened
        for slot in self.slots:
            # A child of the worker's may hold its socket open: then no end of file tells its death.
            if slot.worker and not slot.worker.is_alive() and not slot.worker.channel.is_readable():
                yield from self._lost(slot)
            elif why := self._overdue(slot):
                yield from self._end_late(slot, why)

    def _excuse(self, seconds: float, now: float) -> None:
        """Less is what a coordinator of many workers is always busy with, and takes none's time."""
        for slot in self.slots if seconds > _LOOK_EVERY else ():
            if slot.asked < now:
                slot.asked = min(slot.asked + seconds, now)
            if slot.task:
                slot.task.excuse(seconds, now)

    def _overdue(self, slot: Slot) -> str:
        """Why its worker is to be ended, or nothing."""
        if slot.ready:
            return slot.task.overdue(self._silence, self._listened) if slot.task else ""
        late = self._listened - slot.asked
        if not slot.worker or late <= max(LONGEST_START, self._silence or 0.0):
            return ""
        doing = "preparing" if slot.described else "loading the study"
        return f"was still {doing} after {late:.0f} s (--silence says how long it may take)"

    def _hear(self, slot: Slot, message: Message) -> Event | None:
        if why := self._misfit(message):
            if not self._has_given:
                raise SearchError(why, exit_code=EXIT_USAGE)
            message = {"type": "failed", "message": why}  # of a node that has joined, say
        type_ = message["type"]
        if type_ == "described":
            slot.described, slot.asked = True, math.inf
            self.described = self.described or message
            if self._preparation:
                self._prepare(slot)
            return None
        if type_ == "ready":
            assert slot.worker is not None
            slot.ready, slot.host = True, slot.worker.host
            slot.rss = message["rss"]
            slot.failed_starts, slot.is_hopeless = 0, False
            self.space = self.space or message
            if "space" in message and message["space"] != self.space["space"]:
                raise SearchError(
                    "the study's file has changed while it was run: its space is another one now. "
                    "Put it back and type the same command, or take another --out"
                )
            if slot.task:  # has waited for it
                slot.task.started = slot.task.heard = time.monotonic()
                self._begin(slot, slot.task)
            return None
        if type_ == "failed":
            if self.space is None:
                raise SearchError(message["message"], detail=message.get("traceback", ""))
            logger.warning("worker %d could not begin: %s", slot.index, message["message"])
            waited = slot.task
            self._stop(slot)
            self._start_later(slot, message["message"], message.get("traceback", ""))
            lost = {"lost": message["message"], "task": waited}
            return Event(slot, {"type": "lost"}, **lost) if waited else None
        task = slot.task
        if task is None or (message["trial"], message["attempt"]) != (task.trial, task.attempt):
            return None  # what an old attempt says
        task.hear(message)
        if type_ == "finished":
            self._finish(slot, message)
        return Event(slot, message, task=task)

    def _misfit(self, message: Message) -> str:
        """Why a worker that is ready can't train beside the others, or nothing."""
        if message["type"] != "ready" or self.space is None:
            return ""
        theirs, ours = message.get("precision"), self.space.get("precision")
        if theirs == ours:
            return ""
        return (
            f"the workers' devices differ: with --precision auto some train in {theirs}, others in "
            f"{ours}. Fix: give --precision {ours}"
        )

    def _finish(self, slot: Slot, message: Message) -> None:
        slot.task = None
        slot.rss = message["rss"]
        slot.rss_at_first = slot.rss_at_first or slot.rss
        slot.status = {}
        # What is left of its memory is in pieces, or it may take more than its share.
        if message.get("outcome") == OUT_OF_MEMORY or slot.has_whole_gpu:
            self._restart(slot)
        elif slot.rss - slot.rss_at_first > MAX_GROWTH:
            logger.info(
                "worker %d has grown by %d MB and is replaced",
                slot.index,
                (slot.rss - slot.rss_at_first) >> 20,
            )
            self._restart(slot)

    def _lost(self, slot: Slot) -> Iterator[Event]:
        worker, task, was_ready = slot.worker, slot.task, slot.ready
        assert worker is not None
        self._stop(slot)
        how = worker.post_mortem()
        logger.warning("worker %d (process %d) %s", slot.index, worker.pid, how.splitlines()[0])
        if was_ready:
            self._start(slot)
        else:
            most = _MAX_KILLED_STARTS if worker.was_killed() else _MAX_FAILED_STARTS
            self._start_later(slot, f"{how.splitlines()[0]}, see {worker.log}", how, most)
        for_memory = worker.was_killed() and worker.ran_out_of_memory()
        kind = OUT_OF_MEMORY if for_memory else "killed"
        if task:
            yield Event(slot, {"type": "lost"}, lost=how, task=task, kind=kind)

    def _start_later(
        self, slot: Slot, how: str, detail: str, most: int = _MAX_FAILED_STARTS
    ) -> None:
        """A worker was never ready: the next may be. Raises SearchError where no slot's was."""
        slot.failed_starts += 1
        slot.is_hopeless = slot.failed_starts >= most
        if all(other.is_hopeless for other in self.slots):
            raise SearchError(
                f"{slot.failed_starts} workers in a row ended before they were ready; the last "
                f"{how}",
                detail=detail,
            )
        if slot.is_hopeless:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(slot.failed_starts - most, 9))
            slot.start_at = time.monotonic() + pause
        else:
            self._start(slot)

    def _end_late(self, slot: Slot, why: str) -> Iterator[Event]:
        logger.warning("worker %d %s and is replaced", slot.index, why)
        worker, task, was_ready = slot.worker, slot.task, slot.ready
        assert worker is not None
        self._stop(slot)
        how, kind = why, "timeout"
        if was_ready:
            self._start(slot)
        else:
            _, *last_words = worker.post_mortem().splitlines()  # the first: that it was killed
            how, kind = "\n".join([why, *last_words]), "killed"
            self._start_later(slot, f"{why}, see {worker.log}", how)
        if task:
            yield Event(slot, {"type": "lost"}, lost=how, task=task, kind=kind)

    def _prepare(self, slot: Slot) -> None:
        assert self._preparation is not None
        slot.asked = time.monotonic()
        self._send(slot, self._preparation)

    def _begin(self, slot: Slot, task: Task) -> None:
        stamp = {"trial": task.trial, "attempt": task.attempt}
        self._send(slot, {"type": "start", **stamp, **task.content})

    def _restart(self, slot: Slot, *, has_whole_gpu: bool = False) -> None:
        self._stop(slot)
        slot.has_whole_gpu = has_whole_gpu
        self._start(slot)

    def _start(self, slot: Slot) -> None:
        device = replace(slot.device, share=1.0) if slot.has_whole_gpu else slot.device
        slot.worker = self._engine.start(device, slot.index)
        slot.described = slot.ready = False
        slot.asked = time.monotonic()
        slot.task, slot.rss, slot.rss_at_first, slot.status = None, 0, 0, {}
        self._selector.register(slot.worker.channel, selectors.EVENT_READ, slot)
        self._send(slot, self._opening)

    def _stop(self, slot: Slot) -> None:
        if slot.worker is None:
            return
        worker, slot.worker, slot.ready, slot.task = slot.worker, None, False, None
        slot.has_whole_gpu = False
        self._selector.unregister(worker.channel)
        worker.kill()

    def _send(self, slot: Slot, message: Message) -> None:
        assert slot.worker is not None
        with contextlib.suppress(OSError):  # it has died: the next poll reads that
            slot.worker.channel.send(message)
