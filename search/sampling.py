"""Which point next: a sampler made anew for each trial, seeded by study and number.

The same point comes out however often the coordinator was restarted, given the same history; a
seeded sampler that lived as long as its process would repeat its first points at each start.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import optuna
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace, _SearchSpaceGroup
from optuna.trial import FrozenTrial, TrialState

# Trials that TPE draws at random before it models anything, and how many points are drawn for each,
# of which the one that costs least is tried: what is learnt from cheap ones comes sooner.
STARTUP_TRIALS = 12
STARTUP_DRAFTS = 3
_FIXED = "fixed_params"  # Optuna's name of a trial's attribute: values that are not drawn
# So many of the trials that are not among the best TPE looks at: the latest, and, for this share,
# some that are spread evenly over the older ones, which have shown long ago what is bad.
MOST_OTHERS = 500
_OLDER = 0.5
# Functions of Optuna's that scipy has, too, under these names without the first character.
QUICK = ("_ndtr", "_log_ndtr", "_ndtri_exp")


def seed_for(*parts: int | str) -> int:
    """A seed of 31 bits from what names it: (study seed, trial number, purpose)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


class _PlaceByNumber(optuna.samplers.QMCSampler):
    """Takes the trial's number for its place in the sequence.

    Optuna counts how often it was asked, so that an adopted trial would go on with another point.
    """

    def __init__(self, seed: int, number: int):
        super().__init__(seed=seed, scramble=True, warn_independent_sampling=False)
        self._number = number

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, Any]) -> int:
        return self._number


class _Groups(_GroupDecomposedSearchSpace):
    """Optuna's, but hyperparameters that have been seen together once are not looked at again."""

    def calculate(self, study: optuna.Study, use_cache: bool = False) -> _SearchSpaceGroup:
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = study._get_trials(deepcopy=False, states=states, use_cache=use_cache)
        groups, seen = _SearchSpaceGroup(), set()
        for trial in trials:
            if (names := tuple(trial.distributions)) not in seen:
                seen.add(names)
                groups.add_distributions(trial.distributions)
        return groups


class _BestAndSome:
    """A study of whose trials TPE is shown only those it learns most from.

    Without the others neither their split into good and other ones nor the densities of the two
    take longer the larger a study is.
    """

    def __init__(self, study: optuna.Study, asking: int, num_best: int):
        self._study = study
        self._asking = asking  # the number of the trial that is to be drawn
        self._num_best = num_best

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, **options: Any) -> list[FrozenTrial]:
        trials = self._study._get_trials(**options)  # by their number
        trials = [trial for trial in trials if trial.number != self._asking]
        if len(trials) <= self._num_best + MOST_OTHERS:
            return trials
        best = {trial.number for trial in self._best(trials)}
        others = [trial.number for trial in trials if trial.number not in best]
        num_spread = int(MOST_OTHERS * _OLDER)
        older, latest = others[: num_spread - MOST_OTHERS], others[num_spread - MOST_OTHERS :]
        spread = (older[k * len(older) // num_spread] for k in range(num_spread))
        shown = best.union(latest, spread)
        return [trial for trial in trials if trial.number in shown]

    def _best(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those that Optuna's split takes for good: mostly complete ones, which are soon found."""
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        is_max = self._study.direction == optuna.study.StudyDirection.MAXIMIZE
        complete.sort(key=lambda trial: cast("float", trial.value), reverse=is_max)
        feasible = (t for t in complete if all(value <= 0 for value in t.constraints.values()))
        best = list(itertools.islice(feasible, self._num_best))
        if len(best) < self._num_best:
            best, _ = _split_trials(self._study, trials, self._num_best)
        return best


@contextmanager
def _quick_normal_distribution() -> Iterator[None]:
    """Optuna computes the logarithm of the normal distribution in Python, one number at a time,
    also in each step to its inverse, and TPE spends four fifths of a draw there. Scipy's functions
    give the same to rounding. Only while this lasts: the process may use Optuna otherwise, too."""
    from scipy import special  # commands that draw nothing need not load it

    own = {name: getattr(_truncnorm, name) for name in QUICK}
    try:
        for name in QUICK:
            setattr(_truncnorm, name, getattr(special, name[1:]))
        yield
    finally:
        for name, function in own.items():
            setattr(_truncnorm, name, function)


class _TPE(optuna.samplers.TPESampler):
    """Optuna's, whose draws don't take longer the larger the study is."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._group_decomposed_search_space = _Groups(True)

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        finished = study._get_trials(deepcopy=False, states=states, use_cache=True)
        num_best = default_gamma(len(finished))
        self._gamma = lambda _: num_best  # not of the trials that are shown
        shown = cast("optuna.Study", _BestAndSome(study, trial.number, num_best))
        with _quick_normal_distribution():
            return super()._sample(shown, trial, search_space)

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, Any], study: optuna.Study
    ) -> dict[str, np.ndarray]:
        """Optuna's, but numbers, which are represented by themselves, are not gone through."""
        drawn = [self._get_params(trial, study) for trial in trials]
        drawn = [params for params in drawn if search_space.keys() <= params.keys()]
        values = {name: [params[name] for params in drawn] for name in search_space}
        for name, distribution in search_space.items():
            if isinstance(distribution, optuna.distributions.CategoricalDistribution):
                values[name] = [distribution.to_internal_repr(choice) for choice in values[name]]
        return {name: np.array(of, float) for name, of in values.items()}


def sampler(
    name: str, seed: int, number: int = 0, startup_trials: int = STARTUP_TRIALS
) -> optuna.samplers.BaseSampler:
    """`tpe`, `random` or `qmc`, all of which unpickle nothing that they find in a study.

    Args:
        number: of the trial; its place in the sequence of `qmc`.
        startup_trials: known or drawn at random before `tpe` models anything.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "qmc":
            return _PlaceByNumber(seed, number)
        # group: hyperparameters that exist only together are sampled jointly.
        return _TPE(
            seed=seed,
            n_startup_trials=startup_trials,
            multivariate=True,
            group=True,
            constant_liar=True,
        )


class _WhenAsked(optuna.samplers.BaseSampler):
    """A sampler that is made when it has something to draw: most of a trial is drawn jointly.

    To make one of Optuna's takes longer than all else of a suggestion.
    """

    def __init__(self, make: Callable[[], optuna.samplers.BaseSampler]):
        self._made = functools.cache(make)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, Any]:
        return self._made().infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        return self._made().sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._made().sample_independent(study, trial, param_name, param_distribution)


class TrialSampling:
    """The suggestions of one trial, the same whether it is asked in one go or after a crash.

    What a lost coordinator had suggested is read from the storage. What it had not is drawn from a
    generator of its own name, not from one that earlier draws have moved on.

    Before TPE models anything a trial has drafts: points drawn at random, one of which it takes.
    """

    def __init__(
        self,
        study: optuna.Study,
        trial_id: int,
        name: str,
        seed: int,
        startup_trials: int = STARTUP_TRIALS,
    ):
        self._study = study
        self._name = name
        self._seed = seed
        self._startup_trials = startup_trials
        self.trial = optuna.trial.Trial(study, trial_id)
        self._drafts: dict[int, optuna.trial.Trial] = {}
        is_fixed = _FIXED in study._storage.get_trial(trial_id).system_attrs
        # By its number, not by how many have finished: a second attempt has the same drafts.
        is_startup = name == "tpe" and self.trial.number < startup_trials
        self.num_drafts = STARTUP_DRAFTS if is_startup and not is_fixed else 1
        # A quasi-random sequence is one only if all trials share its seed.
        joint = seed if name == "qmc" else seed_for(seed, self.trial.number)
        if not is_fixed:
            study.sampler = sampler(name, joint, self.trial.number, startup_trials)
            _ = self.trial.relative_params  # draws the joint part now, and keeps it

    def suggest(self, kind: str, name: str, arguments: dict[str, Any]) -> Any:
        """Raises ValueError if the range is none, or not the one the trial has stored."""
        seed = seed_for(self._seed, self.trial.number, name)
        self._study.sampler = _WhenAsked(
            lambda: sampler(self._name, seed, startup_trials=self._startup_trials)
        )
        return getattr(self.trial, f"suggest_{kind}")(name, **arguments)

    def draft(self, number: int, kind: str, name: str, arguments: dict[str, Any]) -> Any:
        """The same of a draft, which is stored nowhere."""
        if number not in self._drafts:
            seed = seed_for(self._seed, self.trial.number, "draft", number)
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
            self._drafts[number] = study.ask()
        return getattr(self._drafts[number], f"suggest_{kind}")(name, **arguments)

    def take(self, number: int) -> None:
        """Make a draft the trial's point, from now on, whatever dies."""
        params = self._drafts[number].params if number in self._drafts else {}
        storage, trial_id = self._study._storage, self.trial._trial_id
        storage.set_trial_system_attr(trial_id, _FIXED, params)
        self.trial = optuna.trial.Trial(self._study, trial_id)
