"""When to stop a trial: a pure function of the stored reports, the same answer however often asked.

Optuna's SuccessiveHalvingPruner writes what it decides into the trial and answers differently when
it is asked again after a crash; this one reads the reports and nothing else. Values are maximised.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState


class Standing(NamedTuple):
    """Where a trial stands among those that it is held against."""

    place: int  # from 1; of equals, the first
    of: int
    going_on: int  # the best so many
    rung: int  # the report where they are held against each other


class SuccessiveHalvingOfReports(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al., 2020) on what is stored.

    Rungs are reports number first_rung * 2**k. At every report a trial's best value so far is held
    against what others had reached at the last rung that it has come to: all that have come as far,
    and those that have not and were better already. It goes on while it is among the best
    1/reduction_factor (rounded down, but at least one).

    So, unlike with decisions at rungs alone and among those that have come there, a trial that is
    quick but bad has no rung to itself, and one that began when little was known ends once it is
    behind what others were with fewer images. The best of all never ends; of the first few the best
    so far goes on, as in Optuna's own. Trials that broke a constraint (diverged, out of memory) set
    no bar: nobody could complete what they had begun.

    Args:
        first_rung: reports before the first decision, at least 1.
        reduction_factor: one in so many goes on, at least 2.
    """

    # Reports at a rung over those at the one before. Published is `reduction_factor`: with 3, a
    # good model took 1.1 times as long in replays of recorded curves that decided at rungs alone:
    # late rungs lie far apart, and what falls behind late costs most.
    spacing = 2

    def __init__(self, first_rung: int = 1, reduction_factor: int = 3):
        if first_rung < 1 or reduction_factor < 2:
            raise ValueError(
                "`first_rung >= 1` and `reduction_factor >= 2` must hold. Received: "
                f"first_rung={first_rung}, reduction_factor={reduction_factor}"
            )
        self._first_rung = first_rung
        self._reduction_factor = reduction_factor
        self._seen: _Seen | None = None

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        standing = self.standing(study, trial)
        return standing is not None and standing.place > standing.going_on

    def standing(self, study: optuna.Study, trial: FrozenTrial) -> Standing | None:
        """Its place at the last rung that it has come to; None before the first."""
        rung = None if trial.last_step is None else self.rung(trial.last_step)
        if rung is None:
            return None
        value = max(trial.intermediate_values.values())
        if self._seen is None or self._seen.study is not study:
            self._seen = _Seen(study)
        of, ahead = self._seen.others(trial, rung, value)
        return Standing(ahead + 1, of + 1, max(1, (of + 1) // self._reduction_factor), rung)

    def rung(self, step: int) -> int | None:
        """The last rung at or before a report; None before the first."""
        if step < self._first_rung:
            return None
        rung = self._first_rung
        while rung * self.spacing <= step:
            rung *= self.spacing
        return rung


class _Seen:
    """The trials of a study. Of the finished ones, of which there may be thousands, what they were
    at each rung is kept in order: each report of any trial is held against them."""

    def __init__(self, study: optuna.Study):
        self.study = study
        self._num_seen = 0
        self._open: list[int] = []  # numbers of trials that had not finished when last seen
        self._finished: list[FrozenTrial] = []
        # By rung, ascending: the best values until there of those that came as far, and of others.
        self._kept: dict[int, tuple[list[float], list[float]]] = {}

    def others(self, trial: FrozenTrial, rung: int, value: float) -> tuple[int, int]:
        """How many a trial is held against at a rung, and how many of them are better."""
        running = self._look(self.study.get_trials(deepcopy=False))
        if rung not in self._kept:
            self._kept[rung] = [], []
            for other in self._finished:
                self._keep(other, rung)
        as_far, less_far = self._kept[rung]
        better = [len(values) - bisect.bisect_right(values, value) for values in (as_far, less_far)]
        of, ahead = len(as_far) + better[1], sum(better)
        for other in running:
            reached = _best_until(other, rung)
            if other.number == trial.number or reached is None:
                continue
            is_better = reached > value
            of += is_better or _has_come_to(other, rung)
            ahead += is_better
        return of - _counts(trial), ahead  # once it has ended it is among them itself

    def _look(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Take in what has finished meanwhile; those that run."""
        self._open += range(self._num_seen, len(trials))
        self._num_seen = len(trials)
        for finished in filter(_counts, (trials[number] for number in self._open)):
            self._finished.append(finished)
            for rung in self._kept:
                self._keep(finished, rung)
        self._open = [n for n in self._open if not trials[n].state.is_finished()]
        return [trials[n] for n in self._open if trials[n].state == TrialState.RUNNING]

    def _keep(self, trial: FrozenTrial, rung: int) -> None:
        if (value := _best_until(trial, rung)) is not None:
            bisect.insort(self._kept[rung][not _has_come_to(trial, rung)], value)


def is_beaten(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Whether a complete trial was ahead of it at its last report."""
    step = trial.last_step
    assert step is not None
    value = max(trial.intermediate_values.values())
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = (_best_until(other, step) for other in complete if _has_come_to(other, step))
    return any(other is not None and other > value for other in found)


def pruner(name: str, first_rung: int, reduction_factor: int) -> optuna.pruners.BasePruner:
    """`asha`, `median` or `none`."""
    if name == "none":
        return optuna.pruners.NopPruner()
    if name == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=first_rung)
    return SuccessiveHalvingOfReports(first_rung, reduction_factor)


def _counts(trial: FrozenTrial) -> bool:
    """Whether others are held against a trial that has finished."""
    is_sound = all(violated <= 0 for violated in trial.constraints.values())
    return is_sound and trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def _has_come_to(trial: FrozenTrial, step: int) -> bool:
    return trial.last_step is not None and trial.last_step >= step


def _best_until(trial: FrozenTrial, step: int) -> float | None:
    """None where it has reported only later, or not at all."""
    return max((v for at, v in trial.intermediate_values.items() if at <= step), default=None)
