"""A trial from its first attempt to its end, as it is stored: every write to it is made here.

How it ends is written down whole (attribute `ending`) before anything else of its end is, so that
the next coordinator can finish what a kill has cut off, and so that a crash can't lose a decision.
"""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search import pruning, results, sampling
from search.storage import storage
from search.workers.engine import Worker
from search.workers.protocol import SUGGESTIONS, Message
from search.workers.slots import OUT_OF_MEMORY

# How often a running trial's last sign of life is stored, in seconds: what a lost coordinator left
# is said to have ended then.
SEEN_EVERY = 5.0
# The end of an attempt that was not its own doing: not counted.
COORDINATOR_ENDED = "coordinator ended"
# What is stored of a trial here: an objective's own attributes have other names.
RESERVED = frozenset(
    ("attempts", "ending", "history", "known_point", "reason", "seconds", "stderr", "traceback")
)


# Reports whose figures one attribute holds: it is stored whole with each of them.
_PART = 50


def _is_reserved(name: str) -> bool:
    return name in RESERVED or name.startswith("history:")


class UnfinishedTrial:
    """A trial that runs, or waits to be run again.

    Args:
        study: which this process alone writes.
        stored: the trial, in state RUNNING.
    """

    def __init__(self, study: optuna.Study, stored: FrozenTrial):
        self.number = stored.number
        self.told = False  # finished in the study; a worker may still be clearing up
        self.last_step = 0  # reported by this attempt
        self._study = study
        self._id = stored._trial_id
        self._is_known_point = "known_point" in stored.user_attrs
        self._attempts: list[dict[str, Any]] = copy.deepcopy(stored.user_attrs.get("attempts", []))
        # What is stored and did not end the trial has been passed: not pruned up to there.
        self._passed = stored.last_step or 0
        self._sampling: sampling.TrialSampling | None = None
        self._began = 0.0  # monotonic seconds, this attempt
        # Figures by step, in the parts that are stored; from the first report on.
        self._history: list[dict[str, dict[str, float]]] | None = None
        self._speed: dict[str, float] = {}
        self._seen = 0.0  # monotonic seconds, when it was last written down that it lives

    def adopt(self) -> dict[str, Any] | None:
        """Take over what a lost coordinator has left; its `ending` if it was at its end."""
        ending = self._storage.get_trial(self._id).user_attrs.get("ending")
        if ending:
            self._tell(ending)
        elif self._attempts and "end" not in self._attempts[-1]:
            last = self._attempts[-1]
            last |= {"end": last.get("seen", last["start"]), "reason": COORDINATOR_ENDED}
        return ending

    @property
    def attempt(self) -> int:
        """The number of the attempt that runs, from 1."""
        return len(self._attempts)

    @property
    def is_alone(self) -> bool:
        """Whether no other trial may run beside it: it has run out of memory before."""
        return any(attempt.get("reason") == OUT_OF_MEMORY for attempt in self._attempts)

    @property
    def params(self) -> dict[str, Any]:
        """Those suggested so far."""
        return self._storage.get_trial(self._id).params

    @property
    def num_reports(self) -> int:
        """Stored ones, of all attempts."""
        return len(self._storage.get_trial(self._id).intermediate_values)

    def reports(self, until: int) -> list[tuple[int, float, dict[str, float]]]:
        """Step, value and figures of what was reported up to a step, by whichever attempt."""
        stored = self._storage.get_trial(self._id)
        history = results.history(stored.user_attrs)
        return [
            (step, value, history.get(str(step), {}))
            for step, value in sorted(stored.intermediate_values.items())
            if step <= until
        ]

    @property
    def num_counted(self) -> int:
        """Attempts that the coordinator's own death did not end."""
        return sum(attempt.get("reason") != COORDINATOR_ENDED for attempt in self._attempts)

    def begin(
        self, worker: Worker, device: str, sampler: str, seed: int, startup_trials: int
    ) -> None:
        """A new attempt, on a worker; the last three are `TrialSampling`'s."""
        self._sampling = sampling.TrialSampling(
            self._study, self._id, sampler, seed, startup_trials
        )
        self._began, self.last_step = time.monotonic(), 0
        self._history, self._speed = None, {}
        self._attempts.append(
            {
                "attempt": len(self._attempts) + 1,
                "host": worker.host,
                "process": worker.pid,
                "device": device,
                "start": time.time(),
            }
        )
        self._set("attempts", self._attempts)

    def suggest(self, message: Message) -> Message:
        """The answer to a worker's `suggest`."""
        name, kind, arguments = message["name"], message["kind"], message["arguments"]
        if self.told:
            return {"ended": True}
        if kind not in SUGGESTIONS:
            return {"error": f"A suggestion is one of {SUGGESTIONS}. Received: {kind!r}"}
        assert self._sampling is not None
        draft = message.get("draft")
        try:
            if draft is None:
                return {"value": self._sampling.suggest(kind, name, arguments)}
            return {"value": self._sampling.draft(draft, kind, name, arguments)}
        except Exception as error:  # whatever Optuna makes of a range: it is the space's error
            return {"error": f"{name!r}: {error or type(error).__name__}"}

    @property
    def num_drafts(self) -> int:
        """How many points are drawn for this attempt to choose from."""
        return self._sampling.num_drafts if self._sampling else 1

    def take(self, message: Message) -> Message:
        """The answer to a worker's `take`."""
        if self.told:
            return {"ended": True}
        assert self._sampling is not None
        self._sampling.take(message["draft"])
        return {"value": None}

    def set_attribute(self, message: Message) -> Message:
        """The answer to a worker's `attribute`."""
        key = str(message["key"])
        if self.told:
            return {"ended": True}
        if _is_reserved(key):
            return {"error": f"The attribute {key!r} is the coordinator's own; take another name"}
        self._set(key, message["value"])
        return {"value": None}

    def report(
        self, message: Message, pruner: optuna.pruners.BasePruner | None
    ) -> dict[str, Any] | None:
        """Store a worker's report; how the trial ends if it is behind to a pruner, else None."""
        step, value = message["step"], message["value"]
        self.last_step = step
        self._speed = message["progress"]
        self._attempts[-1]["seen"] = self._now()
        if time.monotonic() - self._seen >= SEEN_EVERY:
            self._seen = time.monotonic()
            self._set("attempts", self._attempts)
        reported = copy.copy(self._storage.get_trial(self._id))
        if message["metrics"]:
            self._store_figures(step, message["metrics"], reported.user_attrs)
        # Decided on what will be stored, and stored with it.
        reported.intermediate_values = {**reported.intermediate_values, step: value}
        if pruner and step > self._passed and self._is_behind(reported, pruner):
            reason = f"behind at report {step}"
            return self.end(TrialState.PRUNED, kind="pruned", reason=reason, report=value)
        self._store_report(step, value)
        return None

    def _store_figures(self, step: int, figures: dict[str, float], stored: dict[str, Any]) -> None:
        if self._history is None:  # it may go on behind an earlier attempt
            earlier = results.history(stored).items()
            kept = [(at, found) for at, found in earlier if int(at) < step]
            self._history = [dict(kept[k : k + _PART]) for k in range(0, len(kept), _PART)]
            for part in itertools.count():
                now = self._history[part] if part < len(self._history) else {}
                before = stored.get(results.history_key(part))
                if before is None:  # it was the last
                    break
                if now != before:  # of what comes behind that step
                    self._set(results.history_key(part), now)
        if not self._history or len(self._history[-1]) == _PART:
            self._history.append({})
        self._history[-1][str(step)] = figures
        self._set(results.history_key(len(self._history) - 1), self._history[-1])

    def lose(self, how: str, max_attempts: int, kind: str = "killed") -> dict[str, Any] | None:
        """Its worker has died (kind timeout: it was too late; out_of_memory: it was killed for it,
        or said so); how the trial ends if that was its last attempt, else None."""
        first_line, _, last_words = how.partition("\n")
        was_alone = self.is_alone
        self._attempts[-1] |= {"end": self._now(), "reason": kind, "detail": how}
        if kind == OUT_OF_MEMORY and was_alone:
            return self.end(TrialState.PRUNED, kind=kind, reason=f"its worker {first_line}, alone")
        if self.num_counted >= max_attempts and kind != OUT_OF_MEMORY:
            if last_words:
                self._set("stderr", last_words)
            reason = f"its worker {first_line}, {self.num_counted} times"
            return self.end(TrialState.FAIL, kind=kind, reason=reason)
        self._passed = max(self._passed, self.last_step)
        self._set("attempts", self._attempts)
        return None

    def finish(self, message: Message) -> dict[str, Any]:
        """End as a worker's `finished` says."""
        match message["outcome"]:
            case "complete":
                return self.end(TrialState.COMPLETE, value=message["value"])
            case "pruned":  # the study's own objective stopped
                return self.end(TrialState.PRUNED, kind="pruned", reason="by the objective")
            case "error":
                self._set("traceback", message["traceback"])
                return self.end(TrialState.FAIL, kind="error", reason=message["reason"])
            case kind:  # diverged, out_of_memory, invalid
                return self.end(TrialState.PRUNED, kind=kind, reason=message["reason"])

    def end(
        self,
        state: TrialState,
        *,
        kind: str = "",
        reason: str = "",
        value: float | None = None,
        report: float | None = None,
    ) -> dict[str, Any]:
        """Write down how the trial ends, and finish it.

        Args:
            kind: pruned, diverged, out_of_memory, invalid, error, killed, timeout; empty for a
                complete trial.
            report: the last report's value, where it is stored with the decision.
        """
        ending = {
            "state": state.name,
            "kind": kind,
            "reason": reason,
            "value": value,
            "step": self.last_step,
            "report": report,
            "speed": self._speed,
            "seconds": round(self._seconds(), 3),
            "time": self._now(),
        }
        self._set("ending", ending)
        self._tell(ending)
        return ending

    def _tell(self, ending: dict[str, Any]) -> None:
        """Finish as written down; may be done again after a kill at any point of it."""
        state, kind, step = TrialState[ending["state"]], ending["kind"], ending["step"]
        if ending["report"] is not None:
            self._store_report(step, ending["report"])
        if self._passed > step:  # by an attempt that came further and was lost
            storage.drop_reports_after(self._study, self._id, step)
        self._attempts[-1] |= {"end": ending["time"], "reason": kind or "complete"}
        self._set("attempts", self._attempts)
        self._set("seconds", ending["seconds"])
        stored = self._storage.get_trial(self._id).user_attrs
        for name, figure in ending["speed"].items():
            # An objective may say anything, but not in the place of what is kept of the trial.
            is_free = name not in stored and not _is_reserved(name)
            if isinstance(figure, int | float) and is_free:
                self._set(name, round(figure, 3))
        if kind:
            self._set("reason", f"{kind}: {ending['reason']}")
        if state == TrialState.PRUNED and kind != "pruned":
            self._make_infeasible(kind)
        self._study.sampler = sampling.sampler("random", 0)
        self._study.tell(self.number, ending["value"], state=state)
        self.told = True

    def _seconds(self) -> float:
        """In which it ran: its reports, too, are those of all attempts."""
        earlier = sum(attempt["end"] - attempt["start"] for attempt in self._attempts[:-1])
        return earlier + time.monotonic() - self._began

    def _now(self) -> float:
        """The clock as it was when the attempt began, and the time since: it may have been set."""
        return self._attempts[-1]["start"] + time.monotonic() - self._began

    def _is_behind(self, trial: FrozenTrial, pruner: optuna.pruners.BasePruner) -> bool:
        # A known point ends early only where the search has something better already.
        may_end = not self._is_known_point or pruning.is_beaten(self._study, trial)
        return may_end and pruner.prune(self._study, trial)

    def _store_report(self, step: int, value: float) -> None:
        # Not trial.report, which keeps what a lost attempt said of this step.
        self._storage.set_trial_intermediate_value(self._id, step, value)

    def _make_infeasible(self, kind: str) -> None:
        """A violated constraint makes TPE rank the trial last, below any that was merely slow."""
        if kind not in self._storage.get_trial(self._id).constraints:
            optuna.trial.Trial(self._study, self._id).set_constraint(kind, 1.0)

    def _set(self, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._id, key, value)

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self._study._storage
