"""Owns the study: asks, suggests, stores, prunes, tells; hands trials to workers.

It alone opens the storage. A worker that dies loses its attempt, not its trial: the same number
runs again. A coordinator that dies loses nothing that was said: the next one adopts every trial
that is still running. So `--trials 100` ends with exactly 100 finished trials, whatever dies.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from search import pruning, sampling, storage
from search.errors import SearchError
from search.pool import Event, Pool, Slot
from search.progress import View
from search.protocol import SUGGESTIONS, Message
from search.settings import Settings

logger = logging.getLogger("search")

# So many failures before anything has worked, all alike, are an error in the user's space.
FAILURES_TO_STOP = 3
# Ends of an attempt that were not its own doing: not counted.
UNCOUNTED = ("coordinator ended",)


@dataclass
class Run:
    """A trial that is not finished, and its attempts."""

    number: int
    trial_id: int
    attempts: list[dict[str, Any]]
    passed: int  # the last step that an earlier attempt passed: not pruned up to there
    sampling: sampling.TrialSampling | None = None
    began: float = 0.0  # monotonic seconds, this attempt
    last_step: int = 0  # reported by this attempt
    history: dict[str, dict[str, float]] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    told: bool = False  # finished in the storage; the worker is still clearing up

    @property
    def num_counted(self) -> int:
        return sum(attempt.get("reason") not in UNCOUNTED for attempt in self.attempts)


class Coordinator:
    """Searches until the study has its number of finished trials.

    Args:
        study: opened by this process alone.
        settings: of the run.
        known_points: whole points, tried first, in this order.
        view: shows what happens.
    """

    def __init__(
        self,
        study: optuna.Study,
        settings: Settings,
        known_points: list[dict[str, Any]],
        view: View,
    ):
        self._study = study
        self._settings = settings
        self._known_points = known_points
        self._view = view
        self._pruner = pruning.pruner(
            settings.pruner, settings.first_rung, settings.reduction_factor
        )
        self._waiting = deque(self._adopt())
        self._running: dict[int, Run] = {}  # by slot
        self._failures: list[str] = []
        self._num_finished = sum(trial.state.is_finished() for trial in self._trials())

    def search(self, pool: Pool) -> None:
        """Run trials on the pool's workers until enough are finished or the time budget is spent.

        Raises:
            SearchError: if the first trials all fail with the same error.
        """
        budget = self._settings.time_budget
        end = math.inf if budget is None else time.monotonic() + budget
        while self._num_finished < self._settings.trials and time.monotonic() < end:
            for slot in pool.idle():
                if run := self._next():
                    self._start(pool, slot, run)
            for event in pool.poll(0.25):
                self._handle(pool, event)
            self._view.refresh(pool.slots)
        if self._num_finished < self._settings.trials:
            logger.info("the time budget is spent; trials still running can be continued later")

    # Which trial next

    def _adopt(self) -> list[Run]:
        runs = []
        for trial in self._trials():
            if trial.state != TrialState.RUNNING:
                continue
            attempts = trial.user_attrs.get("attempts", [])
            if attempts and "end" not in attempts[-1]:
                attempts[-1] |= {"end": time.time(), "reason": "coordinator ended"}
            # What is stored and not told was passed: the decision to stop is told at once.
            runs.append(Run(trial.number, trial._trial_id, attempts, trial.last_step or 0))
        if runs:
            logger.info("continuing trials %s", ", ".join(str(run.number) for run in runs))
        return runs

    def _next(self) -> Run | None:
        if self._waiting:
            return self._waiting.popleft()
        if self._num_finished + len(self._unfinished()) >= self._settings.trials:
            return None
        tried = sum("known_point" in trial.user_attrs for trial in self._trials())
        if tried < len(self._known_points):
            # One at a time and whole: Optuna samples what a point leaves out, without a word.
            self._study.enqueue_trial(
                self._known_points[tried], user_attrs={"known_point": tried}
            )
        self._study.sampler = sampling.sampler("random", self._settings.seed)
        trial = self._study.ask()
        return Run(trial.number, trial._trial_id, [], 0)

    def _unfinished(self) -> list[Run]:
        return [run for run in self._running.values() if not run.told]

    def _start(self, pool: Pool, slot: Slot, run: Run) -> None:
        settings = self._settings
        run.sampling = sampling.TrialSampling(
            self._study, run.trial_id, settings.sampler, settings.seed
        )
        run.began, run.last_step, run.history, run.speed = time.monotonic(), 0, {}, {}
        assert slot.worker is not None
        run.attempts.append(
            {
                "attempt": len(run.attempts) + 1,
                "host": socket.gethostname(),
                "process": slot.worker.pid,
                "device": slot.device.label,
                "start": time.time(),
            }
        )
        self._set(run, "attempts", run.attempts)
        self._running[slot.index] = run
        seed = sampling.seed_for(settings.seed, run.number, "training")
        pool.give(slot, run.number, len(run.attempts), {"task": "trial", "seed": seed})
        slot.status |= {"what": f"trial {run.number}", "step": 0}

    # What a worker says

    def _handle(self, pool: Pool, event: Event) -> None:
        slot, message = event.slot, event.message
        run = self._running.get(slot.index)
        if run is None or event.task is None or run.number != event.task.trial:
            return
        if event.lost is not None:
            del self._running[slot.index]
            self._lost(run, event.lost)
            return
        match message["type"]:
            case "suggest":
                pool.answer(slot, **self._suggest(run, message))
            case "report":
                pool.answer(slot, value=self._report(slot, run, message))
            case "attribute":
                if not run.told:
                    self._set(run, str(message["key"]), message["value"])
                pool.answer(slot, value=None)
            case "finished":
                del self._running[slot.index]
                self._finished(run, message)

    def _suggest(self, run: Run, message: Message) -> Message:
        assert run.sampling is not None
        if message["kind"] not in SUGGESTIONS:
            return {"error": f"a suggestion is one of {SUGGESTIONS}"}
        try:
            value = run.sampling.suggest(message["kind"], message["name"], message["arguments"])
        except ValueError as error:
            return {"error": str(error)}
        return {"value": value}

    def _report(self, slot: Slot, run: Run, message: Message) -> bool:
        """Store a report; whether to stop. A decision to stop is told at once.

        So a crash can't lose it, and whatever is stored of a running trial has been passed.
        """
        step, value = message["step"], message["value"]
        if run.told:
            return True
        run.last_step = step
        run.speed = message["progress"]
        slot.status |= {"step": step, "value": value, **message["progress"]}
        if message["metrics"]:
            run.history[str(step)] = message["metrics"]
            self._set(run, "history", run.history)
        # Not trial.report, which keeps what a lost attempt said of this step.
        self._study._storage.set_trial_intermediate_value(run.trial_id, step, value)
        if step <= run.passed or self._goes_on(run):
            return False
        self._tell(run, TrialState.PRUNED, "pruned", f"behind at report {step}")
        return True

    def _goes_on(self, run: Run) -> bool:
        trial = self._study._storage.get_trial(run.trial_id)
        # A known point is run to its end, so that a search can't end below what was known.
        known = "known_point" in trial.user_attrs
        return known or not self._pruner.prune(self._study, trial)

    def _finished(self, run: Run, message: Message) -> None:
        if run.told:
            return
        match message["outcome"]:
            case "complete":
                self._tell(run, TrialState.COMPLETE, "", "", value=message["value"])
            case "pruned":  # the study's own objective stopped
                self._tell(run, TrialState.PRUNED, "pruned", "by the objective")
            case "error":
                self._set(run, "traceback", message["traceback"])
                self._tell(run, TrialState.FAIL, "error", message["reason"])
                self._stop_if_all_fail(message)
            case kind:  # diverged, out_of_memory
                self._infeasible(run, kind)
                self._tell(run, TrialState.PRUNED, kind, message["reason"])

    def _lost(self, run: Run, how: str) -> None:
        if run.told:
            return
        first_line, _, last_words = how.partition("\n")
        run.attempts[-1] |= {"end": time.time(), "reason": "killed", "detail": how}
        if run.num_counted < self._settings.max_attempts:
            logger.info("trial %d runs again: its worker %s", run.number, first_line)
            run.passed = max(run.passed, run.last_step)
            self._set(run, "attempts", run.attempts)
            self._waiting.appendleft(run)
            return
        if last_words:
            self._set(run, "stderr", last_words)
        self._tell(
            run,
            TrialState.FAIL,
            "killed",
            f"its worker {first_line}, {run.num_counted} times",
        )

    # What is stored

    def _tell(
        self, run: Run, state: TrialState, kind: str, reason: str, value: float | None = None
    ) -> None:
        """Finish a trial. All that belongs to it is stored first: a finished one can't be changed."""
        seconds = time.monotonic() - run.began
        run.attempts[-1] |= {"end": time.time(), "reason": kind or "complete"}
        self._set(run, "attempts", run.attempts)
        self._set(run, "seconds", round(seconds, 3))
        for name, figure in run.speed.items():
            self._set(run, name, round(figure, 3))
        if kind:
            self._set(run, "reason", f"{kind}: {reason}")
        if run.passed > run.last_step:
            storage.drop_reports_after(self._study, run.trial_id, run.last_step)
        self._study.sampler = sampling.sampler("random", 0)
        self._study.tell(run.number, value, state=state)
        run.told = True
        self._num_finished += 1
        if kind not in ("error", "killed"):
            self._failures = [""]  # something works: later failures are points, not the space
        self._log(run, state, reason, value, seconds)

    def _log(
        self, run: Run, state: TrialState, reason: str, value: float | None, seconds: float
    ) -> None:
        shown = f" {value:.4f}" if value is not None else f" ({reason})"
        logger.info(
            "trial %d %s%s after %d reports, %.0f s; %d of %d finished",
            run.number,
            state.name.lower(),
            shown,
            run.last_step,
            seconds,
            self._num_finished,
            self._settings.trials,
        )
        self._view.finished(state.name.lower(), run.number, value, run.last_step)

    def _infeasible(self, run: Run, kind: str) -> None:
        """A violated constraint makes TPE rank the trial last, below any that was merely slow."""
        trial = optuna.trial.Trial(self._study, run.trial_id)
        if kind not in self._study._storage.get_trial(run.trial_id).constraints:
            trial.set_constraint(kind, 1.0)

    def _stop_if_all_fail(self, message: Message) -> None:
        self._failures.append(message["reason"])
        alike = len(set(self._failures)) == 1
        if alike and len(self._failures) >= min(FAILURES_TO_STOP, self._settings.trials):
            raise SearchError(
                f"the first {len(self._failures)} trials all failed with the same error: "
                f"{message['reason']}. Mend the study's file and type the same command",
                detail=message["traceback"],
            )

    def _set(self, run: Run, key: str, value: Any) -> None:
        self._study._storage.set_trial_user_attr(run.trial_id, key, value)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)
