"""Owns the study: asks, answers, prunes, tells; hands trials to workers.

It alone opens the storage. A worker that dies loses its attempt, not its trial: the same number
runs again. A coordinator that dies loses nothing that was said: the next one adopts every trial
that is still running. So `--trials 100` ends with exactly 100 finished trials, whatever dies.

What the workers have said by now is stored in one transaction and answered when that is done: the
more of them there are, the less each word costs.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from search import pruning, results, sampling
from search.errors import SearchError
from search.settings import Settings
from search.storage import storage
from search.storage.snapshots import Snapshots
from search.trial import UnfinishedTrial
from search.view import notes
from search.view.progress import View
from search.view.trial_logs import Logs
from search.workers.pool import Pool
from search.workers.slots import OUT_OF_MEMORY, Event, Slot

logger = logging.getLogger("search")

# So many failures before anything has worked, all alike, are an error in the user's space.
FAILURES_TO_STOP = 3

# Seconds for starting trials, before what the other workers say meanwhile is heard: a draw of TPE's
# takes 20 to 80 ms, and a hundred workers may become idle at once.
ASKING = 0.05

# How long a worker may take to return from a trial that was stopped, in seconds.
CLEARING_UP = 15


class Coordinator:
    """Searches until the study has its number of finished trials.

    Args:
        study: opened by this process alone.
        settings: of the run.
        known_points: whole points, tried first, in this order.
        view: shows what happens.
        logs: of the trials, for other tools.
        snapshots: of the study, taken now and then.
    """

    def __init__(
        self,
        study: optuna.Study,
        settings: Settings,
        known_points: list[dict[str, Any]],
        view: View,
        logs: Logs,
        snapshots: Snapshots | None = None,
    ):
        self._study = study
        self._settings = settings
        self._known_points = known_points
        self._view = view
        self._logs = logs
        self._snapshots = snapshots
        self._pruner = pruning.pruner(
            settings.pruner, settings.first_rung, settings.reduction_factor
        )
        # Of a trial that is not pruned; 0 where an objective of the study's own decides.
        self._num_reports = study.user_attrs.get("run", {}).get("num_reports", 0)
        notes.save_missing(study)
        trials = self._trials()
        usable = (TrialState.COMPLETE, TrialState.PRUNED)
        self._num_finished = sum(trial.state.is_finished() for trial in trials)
        # Reasons of failures, as long as nothing else has happened; else None.
        self._failures: list[str] | None
        self._failures = None if any(trial.state in usable for trial in trials) else []
        self._all_known_tried = False
        self._has_warned = False  # of trials that are trained on images
        self._running: dict[int, UnfinishedTrial] = {}  # by slot
        self._when_stored: list[Callable[[], None]] = []  # what waits until all is stored
        self._waiting = deque(self._adopt())

    def search(self, pool: Pool) -> None:
        """Run trials on the pool's workers until enough are finished or the time budget is spent.

        Raises:
            SearchError: if the first trials all fail with the same error.
        """
        budget = self._settings.time_budget
        end = math.inf if budget is None else time.monotonic() + budget
        self._view.ends_at(end)
        while self._num_finished < self._settings.trials and time.monotonic() < end:
            is_all = self._start_idle(pool)
            self._hear(pool, 0.25 if is_all else 0.0)
            if self._snapshots:
                self._snapshots.take_if_due()
            self._view.refresh(pool.slots)
        self._leave(pool)

    def _start_idle(self, pool: Pool) -> bool:
        """Give idle workers trials; whether all have got what there is."""
        began = time.monotonic()
        for slot in pool.idle():
            if trial := self._next():
                self._start(pool, slot, trial)
            if time.monotonic() - began > ASKING:
                return False
        return True

    def _leave(self, pool: Pool) -> None:
        """Trials that still run go on next time; workers that only clear up are waited for."""
        if self._num_finished >= self._settings.trials:
            end = time.monotonic() + CLEARING_UP
            while pool.busy() and time.monotonic() < end:
                self._hear(pool, 0.25)
        else:
            logger.info("the time budget is spent; trials still running can be continued later")
        pool.drop_tasks()

    def _adopt(self) -> list[UnfinishedTrial]:
        """Trials that a lost coordinator left running; those at their end are finished here."""
        waiting = []
        with self._stored_first():
            for stored in self._trials():
                if stored.state != TrialState.RUNNING:
                    continue
                trial = UnfinishedTrial(self._study, stored)
                if ending := trial.adopt():
                    self._ended(trial, ending)
                    continue
                waiting.append(trial)
        if waiting:
            logger.info("continuing trials %s", ", ".join(str(trial.number) for trial in waiting))
        return waiting

    def _next(self) -> UnfinishedTrial | None:
        unfinished = sum(not trial.told for trial in self._running.values())
        # More may be left from a run that was to have more.
        if self._num_finished + unfinished >= self._settings.trials:
            return None
        if any(trial.is_alone for trial in self._running.values()):
            return None
        if self._waiting:
            waits = self._waiting[0].is_alone and self._running
            return None if waits else self._waiting.popleft()
        self._enqueue_known_point()
        self._study.sampler = sampling.sampler("random", self._settings.seed)
        asked = self._study.ask()
        return UnfinishedTrial(self._study, self._study._storage.get_trial(asked._trial_id))

    def _enqueue_known_point(self) -> None:
        """One at a time and whole: Optuna samples what a point leaves out, without a word."""
        if self._all_known_tried:  # nothing to look for in all trials, each time
            return
        trials = self._trials()
        tried = sum("known_point" in trial.user_attrs for trial in trials)
        self._all_known_tried = tried == len(self._known_points)
        # One may be left in the queue by a coordinator that died before it asked.
        queued = any(trial.state == TrialState.WAITING for trial in trials)
        if tried < len(self._known_points) and not queued:
            self._study.enqueue_trial(self._known_points[tried], user_attrs={"known_point": tried})

    def _start(self, pool: Pool, slot: Slot, trial: UnfinishedTrial) -> None:
        settings = self._settings
        assert slot.worker is not None
        # The known points say little of what lies elsewhere: so many are drawn beside them.
        startup_trials = sampling.STARTUP_TRIALS + len(self._known_points)
        trial.begin(slot.worker, slot.device.label, settings.sampler, settings.seed, startup_trials)
        self._running[slot.index] = trial
        seed = sampling.seed_for(settings.seed, trial.number, "training")
        task = {"task": "trial", "seed": seed, "checkpoint": self._checkpoint(trial.number)}
        task["drafts"] = trial.num_drafts
        timeout = settings.trial_timeout
        pool.give(slot, trial.number, trial.attempt, task, timeout, alone=trial.is_alone)
        slot.status |= {"what": f"trial {trial.number}", "step": 0}

    def _checkpoint(self, number: int) -> str:
        """The file for a trial's state, so that it goes on where it was; none without a folder."""
        folder = self._settings.checkpoints
        return str(Path(folder) / f"trial-{number}.npz") if folder else ""

    def _hear(self, pool: Pool, timeout: float) -> None:
        with self._stored_first():
            for event in pool.poll(timeout):
                self._handle(pool, event)

    @contextmanager
    def _stored_first(self) -> Iterator[None]:
        """Store what is written inside, then do what was to wait for it."""
        with storage.together(self._study):
            yield
        for act in self._when_stored:
            act()
        self._when_stored.clear()

    def _answer(self, pool: Pool, slot: Slot, **content: Any) -> None:
        self._when_stored.append(partial(pool.answer, slot, **content))

    def _handle(self, pool: Pool, event: Event) -> None:
        slot, message = event.slot, event.message
        trial = self._running.get(slot.index)
        if trial is None or event.task is None or trial.number != event.task.trial:
            return
        match message["type"]:
            case "suggest":
                self._answer(pool, slot, **trial.suggest(message))
            case "take":
                self._answer(pool, slot, **trial.take(message))
            case "attribute":
                self._answer(pool, slot, **trial.set_attribute(message))
                self._warn_of_images(trial.number, message)
            case "resumed":
                self._resumed(trial, message["step"])
            case "progress":
                slot.status["note"] = message.get("note", "")
            case "report":
                self._answer(pool, slot, value=self._report(slot, trial, message))
            case "finished":
                del self._running[slot.index]
                if trial.told:
                    return
                may_fit_alone = not trial.is_alone and pool.shares_memory(slot)
                if message["outcome"] == OUT_OF_MEMORY and may_fit_alone:
                    self._lost(trial, f"ran out of memory: {message['reason']}", OUT_OF_MEMORY)
                else:
                    self._ended(trial, trial.finish(message), message.get("traceback", ""))
            case "lost":
                del self._running[slot.index]
                if not trial.told:
                    self._lost(trial, event.lost or "", event.kind)

    def _warn_of_images(self, number: int, message: dict[str, Any]) -> None:
        """Once a search: where activations of frozen layers have no room, all takes far longer."""
        trained_on = str(message["value"])
        if message["key"] != "trained_on" or not trained_on.startswith("images"):
            return
        if not self._has_warned:
            logger.warning("trial %d is trained on %s", number, trained_on)
        self._has_warned = True

    def _resumed(self, trial: UnfinishedTrial, step: int) -> None:
        """Its worker goes on after `step`: what comes before counts, also in the logs."""
        trial.last_step = step
        logger.info("trial %d goes on after report %d", trial.number, step)
        if self._logs.is_on:
            for earlier, value, metrics in trial.reports(until=step):
                self._logs.report(f"trial-{trial.number}", earlier, value, metrics, trial.params)

    def _report(self, slot: Slot, trial: UnfinishedTrial, message: dict[str, Any]) -> bool:
        """Store a report; whether the worker is to stop."""
        if trial.told:
            return True
        slot.status.setdefault("before", message["step"] - 1)  # reports of earlier attempts
        slot.status |= {  # what else an objective says is not for the view
            "note": "",
            "step": message["step"],
            "value": message["value"],
            "images_per_second": message["progress"].get("images_per_second"),
        }
        # A trial that is trained whole has nothing left to save, and a value to count.
        may_prune = message["step"] != self._num_reports
        ending = trial.report(message, self._pruner if may_prune else None)
        if self._logs.is_on:
            figures = message["step"], message["value"], message["metrics"]
            self._logs.report(f"trial-{trial.number}", *figures, trial.params)
        if ending:
            self._ended(trial, ending)
        return ending is not None

    def _lost(self, trial: UnfinishedTrial, how: str, kind: str) -> None:
        first_line, _, last_words = how.partition("\n")
        if ending := trial.lose(how, self._settings.max_attempts, kind):
            self._ended(trial, ending, last_words)
            return
        alone = " alone" if trial.is_alone else ""
        logger.info("trial %d runs again%s: its worker %s", trial.number, alone, first_line)
        self._waiting.appendleft(trial)

    def _ended(self, trial: UnfinishedTrial, ending: dict[str, Any], detail: str = "") -> None:
        """Count and show a finished trial; stop if it shows that nothing can work."""
        value, state = ending["value"], ending["state"].lower()
        if checkpoint := self._checkpoint(trial.number):
            self._when_stored.append(partial(_remove, Path(checkpoint)))
        self._num_finished += 1
        num_reports = trial.num_reports
        logger.info(
            "trial %d %s %s after %d report%s, %.0f s; %d of %d finished",
            trial.number,
            state,
            f"({ending['reason']})" if value is None else results.decimal(value),
            num_reports,
            "" if num_reports == 1 else "s",
            ending["seconds"],
            self._num_finished,
            self._settings.trials,
        )
        if self._logs.is_on:
            self._logs.end(f"trial-{trial.number}", ending["state"], value, trial.params)
        self._note(trial.number)
        self._view.finished(
            state, trial.number, value, reports=num_reports, seconds=ending["seconds"]
        )
        self._view.saves(results.saved_share(self._study))
        if state != "fail":
            self._failures = None
        elif self._failures is not None:
            self._stop_if_all_fail(self._failures, ending["reason"], detail)

    def _note(self, number: int) -> None:
        trial = self._trials()[number]
        standing = None
        is_behind = trial.user_attrs.get("reason", "").startswith("pruned: behind")
        if is_behind and hasattr(self._pruner, "standing"):
            standing = self._pruner.standing(self._study, trial)
        notes.save_of_trial(self._study, trial, standing)

    def _stop_if_all_fail(self, failures: list[str], reason: str, detail: str) -> None:
        # Alike but for the numbers in it: a point's values often stand in the message.
        failures.append(re.sub(r"0x[0-9a-f]+|-?\d[\d.e+-]*", "#", reason))
        enough = len(failures) >= min(FAILURES_TO_STOP, self._settings.trials)
        if enough and len(set(failures)) == 1:
            raise SearchError(
                f"the first {len(failures)} trials to end all failed with the same error: "
                f"{reason}. Mend the study's file and type the same command",
                detail=detail,
            )

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


def _remove(checkpoint: Path) -> None:
    with suppress(OSError):  # on a disk of many machines; the run's end removes what is left
        checkpoint.unlink()
