"""Owns the study: asks, suggests, stores, prunes, tells; hands trials to workers.

It alone opens the storage. A worker that dies loses its attempt, not its trial: the same number
runs again. A coordinator that dies loses nothing that was said: the next one adopts every trial
that is still running. How a trial ends is written down whole (attribute `ending`) before anything
else of its end is, so that the next coordinator can finish what a kill has cut off. So `--trials
100` ends with exactly 100 finished trials, whatever dies.
"""

from __future__ import annotations

import logging
import math
import re
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from search import pruning, results, sampling, storage
from search.errors import SearchError
from search.pool import Event, Pool, Slot
from search.progress import View
from search.protocol import SUGGESTIONS, Message
from search.settings import Settings

logger = logging.getLogger("search")

# So many failures before anything has worked, all alike, are an error in the user's space.
FAILURES_TO_STOP = 3
# The end of an attempt that was not its own doing: not counted.
COORDINATOR_ENDED = "coordinator ended"
# What the coordinator stores of a trial: an objective's own attributes have other names.
RESERVED = frozenset(
    ("attempts", "ending", "history", "known_point", "reason", "seconds", "stderr", "traceback")
)


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
        return sum(attempt.get("reason") != COORDINATOR_ENDED for attempt in self.attempts)


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
        trials = self._trials()
        usable = (TrialState.COMPLETE, TrialState.PRUNED)
        self._num_finished = sum(trial.state.is_finished() for trial in trials)
        # Reasons of failures, as long as nothing else has happened; else None.
        self._failures: list[str] | None
        self._failures = None if any(trial.state in usable for trial in trials) else []
        self._running: dict[int, Run] = {}  # by slot
        self._waiting = deque(self._adopt())

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
        pool.drop_tasks()  # what is left runs on next time: it is adopted
        if self._num_finished < self._settings.trials:
            logger.info("the time budget is spent; trials still running can be continued later")

    # Which trial next

    def _adopt(self) -> list[Run]:
        runs = []
        for trial in self._trials():
            if trial.state != TrialState.RUNNING:
                continue
            attempts = trial.user_attrs.get("attempts", [])
            run = Run(trial.number, trial._trial_id, attempts, trial.last_step or 0)
            if ending := trial.user_attrs.get("ending"):
                self._tell(run, ending)
                continue
            if attempts and "end" not in attempts[-1]:
                last = attempts[-1]
                last |= {"end": last.get("seen", last["start"]), "reason": COORDINATOR_ENDED}
            runs.append(run)
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
            self._study.enqueue_trial(self._known_points[tried], user_attrs={"known_point": tried})
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
                pool.answer(slot, **self._attribute(run, message))
            case "finished":
                del self._running[slot.index]
                self._finished(run, message)

    def _suggest(self, run: Run, message: Message) -> Message:
        if run.told:
            return {"ended": True}
        assert run.sampling is not None
        name, kind = message["name"], message["kind"]
        if kind not in SUGGESTIONS:
            return {"error": f"A suggestion is one of {SUGGESTIONS}. Received: {kind!r}"}
        try:
            return {"value": run.sampling.suggest(kind, name, message["arguments"])}
        except (ValueError, TypeError, OverflowError) as error:
            return {"error": f"{name!r}: {error}"}

    def _attribute(self, run: Run, message: Message) -> Message:
        key = str(message["key"])
        if run.told:
            return {"ended": True}
        if key in RESERVED:
            return {"error": f"The attribute {key!r} is the coordinator's own; take another name"}
        self._set(run, key, message["value"])
        return {"value": None}

    def _report(self, slot: Slot, run: Run, message: Message) -> bool:
        """Store a report; whether to stop."""
        step, value = message["step"], message["value"]
        if run.told:
            return True
        run.last_step = step
        run.speed = message["progress"]
        slot.status |= {"step": step, "value": value, **message["progress"]}
        run.attempts[-1]["seen"] = time.time()
        self._set(run, "attempts", run.attempts)
        if message["metrics"]:
            run.history[str(step)] = message["metrics"]
            self._set(run, "history", run.history)
        # The decision is made on what will be stored, and stored with it: a crash can't lose it.
        trial = self._study._storage.get_trial(run.trial_id)
        trial.intermediate_values[step] = value
        if step > run.passed and self._is_behind(trial):
            reason = f"behind at report {step}"
            self._end(run, TrialState.PRUNED, kind="pruned", reason=reason, report=value)
            return True
        self._store_report(run, step, value)
        return False

    def _is_behind(self, trial: optuna.trial.FrozenTrial) -> bool:
        # A known point is run to its end, so that a search can't end below what was known.
        known = "known_point" in trial.user_attrs
        return not known and self._pruner.prune(self._study, trial)

    def _finished(self, run: Run, message: Message) -> None:
        if run.told:
            return
        match message["outcome"]:
            case "complete":
                self._end(run, TrialState.COMPLETE, value=message["value"])
            case "pruned":  # the study's own objective stopped
                self._end(run, TrialState.PRUNED, kind="pruned", reason="by the objective")
            case "error":
                self._set(run, "traceback", message["traceback"])
                self._end(run, TrialState.FAIL, kind="error", reason=message["reason"])
                self._stop_if_all_fail(message["reason"], message["traceback"])
            case kind:  # diverged, out_of_memory
                self._end(run, TrialState.PRUNED, kind=kind, reason=message["reason"])

    def _lost(self, run: Run, how: str) -> None:
        if run.told:
            return
        first_line, _, last_words = how.partition("\n")
        run.attempts[-1] |= {"end": time.time(), "reason": "killed", "detail": how}
        self._set(run, "attempts", run.attempts)
        if run.num_counted < self._settings.max_attempts:
            logger.info("trial %d runs again: its worker %s", run.number, first_line)
            run.passed = max(run.passed, run.last_step)
            self._waiting.appendleft(run)
            return
        if last_words:
            self._set(run, "stderr", last_words)
        reason = f"its worker {first_line}, {run.num_counted} times"
        self._end(run, TrialState.FAIL, kind="killed", reason=reason)
        self._stop_if_all_fail(reason, last_words)

    # What is stored

    def _end(
        self,
        run: Run,
        state: TrialState,
        *,
        kind: str = "",
        reason: str = "",
        value: float | None = None,
        report: float | None = None,
    ) -> None:
        """Decide how a trial ends, and finish it.

        Args:
            kind: pruned, diverged, out_of_memory, error, killed; empty for a complete trial.
            report: the last report's value, where it is stored with the decision.
        """
        ending = {
            "state": state.name,
            "kind": kind,
            "reason": reason,
            "value": value,
            "step": run.last_step,
            "report": report,
            "speed": run.speed,
            "seconds": round(time.monotonic() - run.began, 3),
            "time": time.time(),
        }
        self._set(run, "ending", ending)
        self._tell(run, ending)

    def _tell(self, run: Run, ending: dict[str, Any]) -> None:
        """Finish a trial as written down; may be done again after a kill at any point of it."""
        state, kind, step = TrialState[ending["state"]], ending["kind"], ending["step"]
        if ending["report"] is not None:
            self._store_report(run, step, ending["report"])
        if run.passed > step:
            storage.drop_reports_after(self._study, run.trial_id, step)
        run.attempts[-1] |= {"end": ending["time"], "reason": kind or "complete"}
        self._set(run, "attempts", run.attempts)
        self._set(run, "seconds", ending["seconds"])
        for name, figure in ending["speed"].items():
            self._set(run, name, round(figure, 3))
        if kind:
            self._set(run, "reason", f"{kind}: {ending['reason']}")
        if state == TrialState.PRUNED and kind != "pruned":
            self._make_infeasible(run, kind)
        self._study.sampler = sampling.sampler("random", 0)
        self._study.tell(run.number, ending["value"], state=state)
        run.told = True
        self._num_finished += 1
        if state != TrialState.FAIL:
            self._failures = None
        self._log(run, state, ending)

    def _store_report(self, run: Run, step: int, value: float) -> None:
        # Not trial.report, which keeps what a lost attempt said of this step.
        self._study._storage.set_trial_intermediate_value(run.trial_id, step, value)

    def _log(self, run: Run, state: TrialState, ending: dict[str, Any]) -> None:
        value = ending["value"]
        shown = f" {value:.4f}" if value is not None else f" ({ending['reason']})"
        logger.info(
            "trial %d %s%s after %d reports, %.0f s; %d of %d finished",
            run.number,
            state.name.lower(),
            shown,
            ending["step"],
            ending["seconds"],
            self._num_finished,
            self._settings.trials,
        )
        self._view.finished(state.name.lower(), run.number, value)
        self._view.saved = results.saved_share(self._study)

    def _make_infeasible(self, run: Run, kind: str) -> None:
        """A violated constraint makes TPE rank the trial last, below any that was merely slow."""
        if kind not in self._study._storage.get_trial(run.trial_id).constraints:
            optuna.trial.Trial(self._study, run.trial_id).set_constraint(kind, 1.0)

    def _stop_if_all_fail(self, reason: str, detail: str) -> None:
        if self._failures is None:
            return
        # Alike but for the numbers in it: a point's values often stand in the message.
        self._failures.append(re.sub(r"0x[0-9a-f]+|-?\d[\d.e+-]*", "#", reason))
        enough = len(self._failures) >= min(FAILURES_TO_STOP, self._settings.trials)
        if enough and len(set(self._failures)) == 1:
            raise SearchError(
                f"the first {len(self._failures)} trials all failed with the same error: {reason}. "
                "Mend the study's file and type the same command",
                detail=detail,
            )

    def _set(self, run: Run, key: str, value: Any) -> None:
        self._study._storage.set_trial_user_attr(run.trial_id, key, value)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)
