"""The first trials of a search wait for one another, and are decided on together.

Nothing is known yet: the first of few would go on for want of others, and train for long before it
shows that it is none of the best, and a good one would end since another was better by chance. So
they pause at the first decision until enough have come there; then those that are not behind go on
from their checkpoints. In replays of recorded curves (README, "When to stop a trial") a good model
came sooner.
"""

from __future__ import annotations

import optuna

from search import pruning, sampling
from search.settings import Settings
from search.trial import UnfinishedTrial


class FirstTrials:
    """Which trials wait, and until when.

    Args:
        study: whose trials count, also those that other coordinators have begun.
        settings: of the run.
        num_reports: of a trial that is not pruned.
    """

    def __init__(self, study: optuna.Study, settings: Settings, num_reports: int):
        self.waiting: list[UnfinishedTrial] = []
        self._study = study
        self._first_rung = settings.first_rung
        self._num_reports = num_reports
        run = study.user_attrs.get("run", {})
        # Without a checkpoint the best of them would begin again.
        may_wait = settings.kind == "space" and settings.checkpoints and not run.get("own_fit")
        # So many have to come; 0 once they have.
        self._num_first = 0
        if settings.pruner == "asha" and may_wait:
            self._num_first = min(sampling.STARTUP_TRIALS, settings.trials // 4)

    def holds(self, trial: UnfinishedTrial, step: int) -> bool:
        """Whether a trial is to wait after this report. Not behind the first decision, whenever it
        was let go on, and not at its end."""
        is_there = step == self._first_rung and step != self._num_reports
        return is_there and not trial.is_known_point and not self._is_over(trial.number)

    def released(self) -> list[UnfinishedTrial]:
        """Those that have waited, once enough have come."""
        if not self.waiting or not self._is_over():
            return []
        released, self.waiting = self.waiting, []
        return released

    def _is_over(self, coming: int | None = None) -> bool:
        """Whether enough have come, or ended before.

        Args:
            coming: number of a trial that comes there now.
        """
        if not self._num_first:  # nothing to count any more
            return True
        come = sum(
            trial.number == coming
            or trial.state.is_finished()
            or pruning.has_come_to(trial, self._first_rung)
            for trial in self._study.get_trials(deepcopy=False)
        )
        if come >= self._num_first:
            self._num_first = 0
        return not self._num_first
