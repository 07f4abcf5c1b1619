"""When to stop a trial: a pure function of the stored reports, the same answer however often asked.

Optuna's SuccessiveHalvingPruner writes what it decides into the trial and answers differently when
it is asked again after a crash; this one reads the reports and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState


class Standing(NamedTuple):
    """Where a trial stands among those that have come as far."""

    place: int  # from 1; of equals, the first
    of: int
    going_on: int  # the best so many


# Reports at a rung over those at the one before. Published is `reduction_factor`: with 3, a good
# model took 1.1 times as long in replays of recorded curves, since late rungs lie so far apart, and
# what falls behind late costs most.
_SPACING = 2


class SuccessiveHalvingOfReports(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al., 2020) on what is stored.

    At rung k, after first_rung * 2**k reports, a trial goes on if its best value so far is among
    the best 1/reduction_factor (rounded down, but at least one) of all trials that have come as
    far. So of the first few the best so far goes on, as in Optuna's own, and no worker trains a bad
    trial on because little is known yet: in replays of recorded curves that cost a fifth more time
    to a good model.

    Args:
        first_rung: reports before the first decision, at least 1.
        reduction_factor: one in so many goes on, at least 2.
    """

    def __init__(self, first_rung: int = 1, reduction_factor: int = 3):
        if first_rung < 1 or reduction_factor < 2:
            raise ValueError(
                "`first_rung >= 1` and `reduction_factor >= 2` must hold. Received: "
                f"first_rung={first_rung}, reduction_factor={reduction_factor}"
            )
        self._first_rung = first_rung
        self._reduction_factor = reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        standing = self.standing(study, trial)
        return standing is not None and standing.place > standing.going_on

    def standing(self, study: optuna.Study, trial: FrozenTrial) -> Standing | None:
        """Its place at the rung of its last report; None off the rungs."""
        rung = trial.last_step
        if rung is None or not self.is_rung(rung):
            return None
        maximise = study.direction == optuna.study.StudyDirection.MAXIMIZE
        others = [
            _best_until(other, rung, maximise)
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
            and other.state not in (TrialState.FAIL, TrialState.WAITING)
            and rung in other.intermediate_values
        ]
        going_on = max(1, (len(others) + 1) // self._reduction_factor)
        value = _best_until(trial, rung, maximise)
        ahead = sum(other > value if maximise else other < value for other in others)
        return Standing(ahead + 1, len(others) + 1, going_on)

    def is_rung(self, step: int) -> bool:
        rung = self._first_rung
        while rung < step:
            rung *= _SPACING
        return rung == step


def is_beaten(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Whether a complete trial was ahead of it at its last report."""
    rung = trial.last_step
    assert rung is not None
    maximise = study.direction == optuna.study.StudyDirection.MAXIMIZE
    value = _best_until(trial, rung, maximise)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = (_best_until(t, rung, maximise) for t in complete if rung in t.intermediate_values)
    return any(other > value if maximise else other < value for other in found)


def pruner(name: str, first_rung: int, reduction_factor: int) -> optuna.pruners.BasePruner:
    """`asha`, `median` or `none`."""
    if name == "none":
        return optuna.pruners.NopPruner()
    if name == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=first_rung)
    return SuccessiveHalvingOfReports(first_rung, reduction_factor)


def _best_until(trial: FrozenTrial, rung: int, maximise: bool) -> float:
    values = [value for step, value in trial.intermediate_values.items() if step <= rung]
    return max(values) if maximise else min(values)
