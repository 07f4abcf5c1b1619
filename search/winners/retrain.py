"""Winners, trained again on all training data over several seeds, then measured once.

Every model is recorded in the study with its hash when it is complete, so that a run that was
interrupted goes on with the ones that are missing.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from search import artifacts, results
from search.errors import EXIT_NOTHING_USABLE, SearchError
from search.sampling import seed_for
from search.settings import Settings
from search.view.progress import View
from search.workers import devices
from search.workers.pool import Pool
from search.workers.protocol import Message
from search.workers.slots import OUT_OF_MEMORY, Event, Slot

logger = logging.getLogger("search")

_TESTED = "tested"  # a study's attribute: hashes of models
# A worker with more threads costs a start of some ten seconds: only worth it for longer work.
WORTH_A_START = 60  # seconds of training
# What a worker tells of a training that is stored as it is.
_FOUND = (
    *("parameters", "flops", "history", "kept_epochs", "train", "validation"),
    *("trained_on", "pretrained"),
)
_MEASURED = ("evaluation", "evaluation_sha256", "pictures", "pictures_sha256")


@dataclass
class Job:
    """One winner with one seed."""

    trial: int  # its number
    index: int  # of the seed, from 0
    seed: int
    params: dict[str, Any]
    value: float | None  # validation accuracy, fraction
    images_per_second: float  # as the trial was trained
    record: dict[str, Any]  # what is stored: epochs, share; then model, evaluation, hashes
    is_alone: bool = False  # whether no other may run beside it: it has run out of memory before

    @property
    def stem(self) -> str:
        return f"trial-{self.trial}-seed-{self.index}"

    @property
    def key(self) -> str:
        return f"retrained:{self.stem}"

    def take(self, stored: dict[str, Any]) -> None:
        """What the study has stored of it, if it was trained as it would be now."""
        self.record["precision"] = stored["run"]["precision"]
        record = stored.get(self.key, {})
        if self.record.items() <= record.items():
            self.record = record


def jobs_of(study: optuna.Study, settings: Settings) -> list[Job]:
    """The winners of a study times the seeds, with what is stored of them.

    Raises:
        SearchError: if no trial is complete.
    """
    winners = results.winners(study, settings.top)
    if not winners:
        raise SearchError(
            f"no trial of {settings.name!r} is complete: nothing can be retrained. "
            f"{results.SHOW} says why; a longer --time-budget, more --trials or another space "
            "may help",
            exit_code=EXIT_NOTHING_USABLE,
        )
    if len(winners) < settings.top:
        logger.warning(
            "--top %d: no more than %d %s complete",
            settings.top,
            len(winners),
            "trial is" if len(winners) == 1 else "trials are",
        )
    stored = study.user_attrs
    jobs = []
    for trial in winners:
        for index in range(settings.seeds):
            job = new_job(trial, index, settings, stored["run"]["num_reports"])
            job.take(stored)
            jobs.append(job)
    return jobs


def count_tested(study: optuna.Study, record: dict[str, Any]) -> None:
    """Keep of each model that its figures on the test set have been seen, also of those that are no
    more: who retrains until one is good has chosen by them."""
    seen = study.user_attrs.get(_TESTED, [])
    if "evaluation" in record and record["model_sha256"] not in seen:
        study.set_user_attr(_TESTED, [*seen, record["model_sha256"]])


def num_tested(study: optuna.Study) -> int:
    """Models of this study whose figures on the test set have been seen."""
    return len(study.user_attrs.get(_TESTED, []))


def new_job(trial: FrozenTrial, index: int, settings: Settings, num_reports: int) -> Job:
    """A trial's training with seed number `index`, of which nothing is done yet."""
    return Job(
        trial.number,
        index,
        seed_for(settings.seed, "winner", trial.number, index),
        trial.params,
        trial.value,
        trial.user_attrs.get("images_per_second", 1.0),
        _length(trial, settings, num_reports),
    )


class Retraining:
    """Trains and measures winners.

    Args:
        jobs: winners times seeds; their records are filled in.
        settings: of the run.
        images_per_epoch: for a guess of how long it takes.
        folder: of the run; models and evaluations go below it.
        view: shows what happens.
        save: called with each job whose record has changed.
    """

    def __init__(
        self,
        jobs: list[Job],
        settings: Settings,
        *,
        images_per_epoch: float,
        folder: Path,
        view: View,
        save: Callable[[Job], None],
    ):
        self.jobs = jobs
        self._settings = settings
        self._images_per_epoch = images_per_epoch
        self._folder = folder
        self._view = view
        self._save = save

    def is_done(self) -> bool:
        return not self._untrained() and not self._unmeasured()

    def run(self, pool: Pool) -> None:
        """Train what is missing, then measure what is missing.

        Raises:
            SearchError: if a job fails, keeps losing its worker, or runs out of memory alone.
        """
        self.train(pool)
        self.measure(pool)

    def train(self, pool: Pool) -> None:
        untrained = self._untrained()
        self._view.begin("training", len(untrained))
        if untrained:
            names = [job.stem for job in untrained]
            logger.info("training %s", ", ".join(names[:6]) + ", ..." * (len(names) > 6))
        # The last jobs may be fewer than the slots, and can have more cores for that.
        num_last = len(untrained) % len(pool.slots) if pool.can_widen() else 0
        first, last = untrained[: len(untrained) - num_last], untrained[len(untrained) - num_last :]
        self._do(pool, first, self._training, self._trained)
        if last:
            self._widen(pool, last)
            self._do(pool, last, self._training, self._trained)

    def measure(self, pool: Pool) -> None:
        unmeasured = self._unmeasured()
        self._view.begin("measuring on the test set", len(unmeasured))
        self._do(pool, unmeasured, self._evaluation, self._measured)

    def _untrained(self) -> list[Job]:
        return [
            job
            for job in self.jobs
            if "diverged" not in job.record and not self._intact(job, "model", "model_sha256")
        ]

    def _unmeasured(self) -> list[Job]:
        return [
            job
            for job in self.jobs
            if "diverged" not in job.record
            and not (
                self._intact(job, "evaluation", "evaluation_sha256")
                and (not self._is_shown(job) or self._intact(job, "pictures", "pictures_sha256"))
            )
        ]

    def _intact(self, job: Job, name: str, hash_name: str) -> bool:
        if name not in job.record:
            return False
        path = self._folder / job.record[name]
        intact = path.is_file() and artifacts.sha256(path) == job.record[hash_name]
        if not intact:
            logger.warning("%s is missing or not what was written; it is made again", path)
        return intact

    def _widen(self, pool: Pool, wave: list[Job]) -> None:
        """Where there are fewer jobs than slots, each gets more of the cores."""
        threads = max(1, devices.cores() // len(wave))
        speed = wave[0].images_per_second
        images = wave[0].record["epochs"] * wave[0].record["share"] * self._images_per_epoch
        if images / speed <= WORTH_A_START:
            return
        for slot in pool.slots[: len(wave)]:
            pool.give_threads(slot, threads)

    def _do(self, pool: Pool, jobs: list[Job], order: Any, store: Any) -> None:
        """Give each job to a worker until all have finished."""
        waiting, running = deque(jobs), dict[int, Job]()
        attempts = dict.fromkeys((job.key for job in jobs), 0)
        # Those that were widened; where all are alike, whoever has time: one may wait for a node.
        alike = len({slot.device.threads for slot in pool.slots}) == 1
        slots = pool.slots if alike else pool.slots[: len(jobs)]
        while waiting or running:
            for slot in [slot for slot in pool.idle() if slot in slots]:
                if not (job := _next(waiting, running)):
                    break
                attempts[job.key] += 1
                running[slot.index] = job
                attempt = attempts[job.key]
                pool.give(slot, job.trial, attempt, order(job), alone=job.is_alone)
                slot.status |= {"what": job.stem}
            for event in pool.poll(0.25):
                self._handle(event, running, waiting, attempts, store)
            self._view.refresh(pool.slots)

    def _handle(
        self,
        event: Event,
        running: dict[int, Job],
        waiting: deque[Job],
        attempts: dict[str, int],
        store: Any,
    ) -> None:
        slot, message = event.slot, event.message
        job = running.get(slot.index)
        if job is None:
            return
        if event.lost is not None:
            del running[slot.index]
            self._lost(job, event.lost, event.kind, attempts[job.key])
            waiting.appendleft(job)
        elif message.get("outcome") == OUT_OF_MEMORY:
            del running[slot.index]
            how = f"ran out of memory: {message['reason']}"
            self._lost(job, how, OUT_OF_MEMORY, attempts[job.key])
            waiting.appendleft(job)
        elif message["type"] == "progress":
            _show(slot, message)
        elif message["type"] == "finished":
            del running[slot.index]
            if message["outcome"] not in ("complete", "diverged"):
                why = message.get("reason", f"it ended as {message['outcome']}")
                raise SearchError(f"{job.stem} failed: {why}", detail=message.get("traceback", ""))
            assert event.task is not None
            # A training that went on behind a checkpoint knows of the time before.
            seconds = message.get("seconds") or time.monotonic() - event.task.started
            store(job, {**message, "seconds": seconds})
            self._save(job)
            if checkpoint := self._checkpoint(job):  # not before it is written down that it is done
                with suppress(OSError):  # the run's end removes what is left
                    Path(checkpoint).unlink()
            self._view.finished("complete", job.trial, None, seconds=seconds)

    def _lost(self, job: Job, how: str, kind: str, attempts: int) -> None:
        """It runs again, alone if it ran out of memory; raises SearchError if that was its last."""
        first_line = how.partition("\n")[0]
        if kind == OUT_OF_MEMORY and job.is_alone:
            raise SearchError(
                f"{job.stem} ran out of memory, with no other job beside it (its worker "
                f"{first_line}); once more memory is free, the same command tries again",
                detail=how,
            )
        if kind != OUT_OF_MEMORY and attempts >= self._settings.max_attempts:
            raise SearchError(
                f"{job.stem} lost its worker {attempts} times ({first_line}); "
                "the same command tries again",
                detail=how,
            )
        job.is_alone = job.is_alone or kind == OUT_OF_MEMORY
        alone = " alone" if job.is_alone else ""
        logger.info("%s runs again%s: its worker %s", job.stem, alone, first_line)

    def _training(self, job: Job) -> Message:
        return {
            "task": "retrain",
            "params": job.params,
            "seed": job.seed,
            "epochs": job.record["epochs"],
            "share": job.record["share"],
            "validated": job.record.get("validated", False),
            "path": str(self._folder / "models" / f"{job.stem}.keras"),
            "checkpoint": self._checkpoint(job),
        }

    def _checkpoint(self, job: Job) -> str:
        folder = self._settings.checkpoints
        return str(Path(folder) / f"{job.stem}.npz") if folder else ""

    def _has_diverged(self, job: Job, message: Message) -> bool:
        if message["outcome"] != "diverged":
            return False
        job.record["diverged"] = message["reason"]
        logger.warning("%s diverged: %s", job.stem, message["reason"])
        return True

    def _trained(self, job: Job, message: Message) -> None:
        if self._has_diverged(job, message):
            return
        for name in _MEASURED:  # they were another model's
            job.record.pop(name, None)
        job.record |= {
            "model": f"models/{job.stem}.keras",
            "model_sha256": message["sha256"],
            "seed": job.seed,
            "start": time.time() - message["seconds"],
            "seconds": message["seconds"],
            "trained_epochs": message["epochs"],
            **{name: message[name] for name in _FOUND},
        }
        logger.info("%s trained for %.1f epochs", job.stem, message["epochs"])

    def _evaluation(self, job: Job) -> Message:
        return {
            "task": "evaluate",
            "model": str(self._folder / job.record["model"]),
            "path": str(self._folder / "evaluation" / f"{job.stem}.npz"),
            "history": job.record["history"],
            "pictures": str(self._folder / _pictures(job)) if self._is_shown(job) else None,
        }

    def _is_shown(self, job: Job) -> bool:
        """Whether the report's pictures are this one's: of a winner's seeds, the first usable."""
        usable = (of.index for of in self.jobs if of.trial == job.trial and "model" in of.record)
        return job.index == min(usable)

    def _measured(self, job: Job, message: Message) -> None:
        if self._has_diverged(job, message):
            job.record.pop("model")  # nobody is to take it for one of the winners
            return
        job.record |= {
            "evaluation": f"evaluation/{job.stem}.npz",
            "evaluation_sha256": message["sha256"],
        }
        if self._is_shown(job):
            job.record |= {
                "pictures": _pictures(job),
                "pictures_sha256": message["pictures_sha256"],
            }
        logger.info("%s measured on the test set", job.stem)


def _next(waiting: deque[Job], running: dict[int, Job]) -> Job | None:
    """The next job, if it may begin now."""
    if not waiting or any(job.is_alone for job in running.values()):
        return None
    return None if waiting[0].is_alone and running else waiting.popleft()


def _pictures(job: Job) -> str:
    """Where the report's pictures of a winner lie."""
    return f"evaluation/{job.stem}-pictures.npz"


def _length(trial: FrozenTrial, settings: Settings, num_reports: int) -> dict[str, Any]:
    """How to train: the schedule's length in epochs, the share of it that is trained, and whether
    the validation part is left to watch it."""
    if settings.kind == "comparison":
        return {"epochs": settings.epochs, "share": 1.0, "validated": True}
    # A fit of the user's may have reported nothing.
    if settings.final_epochs is not None or not trial.intermediate_values:
        return {"epochs": settings.final_epochs or settings.epochs, "share": 1.0}
    return {"epochs": settings.epochs, "share": results.best_step(trial) / num_reports}


def _show(slot: Slot, message: Message) -> None:
    if "step" in message:
        slot.status.setdefault("before", message["step"] - 1)
    slot.status |= {"note": ""} | {
        name: message[name]
        for name in ("note", "step", "of", "accuracy", "images_per_second")
        if name in message
    }
