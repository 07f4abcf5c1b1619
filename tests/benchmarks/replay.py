"""How soon would a search have found a good model? Samplers and pruners on recorded curves.

    python -m tests.benchmarks.replay [--seeds 50] [--policy default] [--reach 0.9]

The table is that of curves.py: every point's whole learning curve and what it cost. A sampler
proposes a point of the real space; the nearest point of the table that was not tried yet is run in
its place, and the study is told that one, so that what the sampler learns is true. Nearest is by
Gower's distance: the mean over hyperparameters of the distance as a share of the range (on the log
scale where it is sampled so), 0 or 1 for categories and for those that only one of the two has.

Time is simulated: so many workers, each trial as long as it really took (building and tracing, then
training and measuring for each report; all validation images at its end). The target is a complete
trial whose point is among the table's best 1 %, or, since that is one of a hundred points, within
0.3 points of the best: about the noise of an accuracy on 10 000 images. A point's value is its
accuracy on all of them after the epoch that its reports liked best. Targets are drawn points only,
a study's known ones are beside the table, and only policies that name them try them. With --reach
the target is a report of so much accuracy, of any trial: how soon is there a model as good as that?

The sampler, its seeds and the pruner are the product's own, on Optuna's studies in memory; Keras is
not imported. A search that has stopped every target before its end never reached one.
"""

from __future__ import annotations

import argparse
import ast
import functools
import heapq
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import sampling
from search.pruning import Standing, SuccessiveHalvingOfReports, is_beaten, pruner
from search.workers import devices
from studies.study import Study

NUM_TRAINING = 50_000  # images of study cnn's epochs
CLOSE = 0.003  # of the best, in accuracy
BEST_SHARE = 0.01
STUDY = Path(__file__).parents[2] / "studies" / "cnn.py"  # whose settings are `default`
_CLOCK = "clock"  # attribute of a trial: seconds until each of its reports


class Table:
    """Points of a space with their learning curves.

    Args:
        stored: what `curves.py pack` has written, by name.
    """

    def __init__(self, stored: Mapping[str, Any]):
        self.space: list[dict[str, Any]] = json.loads(str(stored["space"]))
        self.params: list[dict[str, Any]] = [json.loads(point) for point in stored["params"]]
        self.known = np.asarray(stored["known"], bool)  # (points,)
        self.start = np.asarray(stored["start"], float)  # (points,) seconds
        self.last = np.asarray(stored["final"], float)  # (points,) seconds
        self.flops = np.asarray(stored["flops"], float)  # (points,) of one image
        self.report = np.asarray(stored["train"], float)  # (points, reports) seconds
        self.measure = np.asarray(stored["measure"], float)
        sound = np.isfinite(stored["loss"])
        self.values = np.where(sound, stored["monitor"], np.nan)  # (points, reports)
        self.final = _final(self.values, np.asarray(stored["val"], float))  # (points,)
        self.drawn = np.flatnonzero(~self.known)
        ranked = np.sort(self.final[self.drawn])[::-1]
        rank = max(1, int(BEST_SHARE * len(ranked)))
        self.goal = min(ranked[rank - 1], ranked[0] - CLOSE)
        self._codes = np.array([self._code(params) for params in self.params])

    @property
    def num_reports(self) -> int:
        return self.values.shape[1]

    def targets(self) -> np.ndarray:
        return self.drawn[self.final[self.drawn] >= self.goal]

    def nearest(self, params: Mapping[str, Any], untried: np.ndarray) -> int:
        """The point of those whose positions are given; of equals, the first."""
        mine, others = self._code(params), self._codes[untried]
        apart = np.where(self._is_category, mine != others, np.abs(mine - others))
        present, theirs = ~np.isnan(mine), ~np.isnan(others)
        apart = np.where(present & theirs, apart, (present ^ theirs).astype(float))
        counted = (present | theirs).sum(1)
        return int(untried[(apart.sum(1) / counted).argmin()])

    @functools.cached_property
    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        return {hp["name"]: distribution(hp) for hp in self.space}

    @functools.cached_property
    def _is_category(self) -> np.ndarray:
        return np.array([hp["kind"] == "categorical" for hp in self.space])

    def _code(self, params: Mapping[str, Any]) -> np.ndarray:
        """A number for each hyperparameter: a category's position, or the share of the range; NaN
        where the point has none."""
        code = np.full(len(self.space), np.nan)
        for at, hp in enumerate(self.space):
            if hp["name"] not in params or not is_active(hp, params):
                continue
            value = params[hp["name"]]
            if hp["kind"] == "categorical":
                code[at] = hp["choices"].index(value)
                continue
            scale = math.log if hp["log"] else float
            low, high = scale(hp["low"]), scale(hp["high"])
            code[at] = (scale(value) - low) / (high - low or 1.0)
        return code


def _final(values: np.ndarray, val: np.ndarray) -> np.ndarray:
    """Accuracy on all validation images after the epoch whose end its reports liked best; 0 for
    points that diverged, which no search completes."""
    ends = values[:, values.shape[1] // val.shape[1] - 1 :: values.shape[1] // val.shape[1]]
    whole = np.isfinite(values).all(1)
    best = np.where(np.isfinite(ends), ends, -1.0).argmax(1)
    return np.where(whole, val[np.arange(len(val)), best], 0.0)


def read(path: Path) -> Table:
    with np.load(path) as stored:
        return Table({name: stored[name] for name in stored.files})


def is_active(hp: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    """Whether a point has the hyperparameter, by KerasTuner's conditions."""
    return all(
        condition["name"] in params and params[condition["name"]] in condition["values"]
        for condition in hp["when"]
    )


def distribution(hp: Mapping[str, Any]) -> optuna.distributions.BaseDistribution:
    """Of a described hyperparameter, as an Optuna trial's suggest_... would make it."""
    if hp["kind"] == "categorical":
        return optuna.distributions.CategoricalDistribution(hp["choices"])
    kinds = {
        "int": optuna.distributions.IntDistribution,
        "float": optuna.distributions.FloatDistribution,
    }
    return kinds[hp["kind"]](hp["low"], hp["high"], step=hp["step"], log=hp["log"])


@dataclass(frozen=True)
class Policy:
    """One way to search.

    Args:
        pruner: made for so many reports of a whole trial.
        resumes: (first rung, reduction factor) of promotions instead of a pruner: a trial pauses at
            each rung unless it is among the best there, and a free worker first goes on with the
            best paused trial that has meanwhile come to be among them.
        waits: before so many trials have come to their first report, drawn ones pause there; then
            those that the pruner does not stop go on where they were.
        every: reports of the table for one report of the search.
        known: try the known points first, as the product does.
        drafts: points drawn for each trial before TPE begins, the cheapest of which is tried.
    """

    sampler: str = "tpe"
    pruner: Callable[[int], optuna.pruners.BasePruner] | None = None
    resumes: tuple[int, int] | None = None
    startup_trials: int = sampling.STARTUP_TRIALS
    waits: int = 0
    every: int = 1
    known: bool = False
    drafts: int = 1


class Outcome(NamedTuple):
    """Of one search."""

    seconds: float  # simulated, until a target was complete; infinite where none was
    trials: int  # begun by then, or until none could be reached any more
    best: float  # value of a complete trial


@dataclass
class _Run:
    """A trial that runs or pauses."""

    trial_id: int
    number: int
    point: int = -1
    step: int = 0  # of the search's reports
    seconds: float = 0.0  # of training and measuring, as it was recorded
    is_known: bool = False
    waits: bool = False  # for the others of the start


class Replay:
    """One search on a table.

    Args:
        seed: of the study.
        reach: a report's accuracy that is the target; else a complete trial of the table's best.
    """

    def __init__(
        self, table: Table, policy: Policy, seed: int, num_workers: int, reach: float | None = None
    ):
        self._table, self._policy, self._seed, self._reach = table, policy, seed, reach
        self._num_workers = num_workers
        self._num_reports = table.num_reports // policy.every
        made = policy.pruner(self._num_reports) if policy.pruner else optuna.pruners.NopPruner()
        self._study = optuna.create_study(
            # Hyperband draws brackets from the name.
            study_name=f"replay-{seed}",
            direction="maximize",
            pruner=made,
            sampler=optuna.samplers.RandomSampler(seed=0),
        )
        self._storage = self._study._storage
        self._untried = table.drawn
        self._known = list(np.flatnonzero(table.known)) if policy.known else []
        self._rungs = _Rungs(*policy.resumes) if policy.resumes else None
        self._at_start: list[tuple[float, _Run]] = []  # that wait at their first report
        self._num_come = 0  # trials, to their first report
        self._targets = set(table.drawn if reach else table.targets())
        self._events: list[tuple[float, int, _Run]] = []
        self._order = itertools.count()
        self._num_trials = 0

    def run(self) -> Outcome:
        best = now = 0.0
        free = self._num_workers
        while True:
            while free and self._begin(now):
                free -= 1
            if not self._events:
                break
            now, _, run = heapq.heappop(self._events)
            if run.step > self._num_reports:  # all validation images have been measured
                value = float(self._table.final[run.point])
                best = max(best, value)
                self._study.tell(run.number, value)
                if not self._reach and value >= self._table.goal and not run.is_known:
                    return Outcome(now, self._num_trials, best)
                free += 1
            elif self._reach and self._value(run) >= self._reach:
                return Outcome(now, self._num_trials, self._value(run))
            elif self._goes_on(run):
                self._next(now, run)
            else:
                if not (self._rungs or run.waits):  # else it may yet be promoted
                    self._targets.discard(run.point)
                if not self._targets and not self._policy.known:
                    break
                free += 1
        return Outcome(math.inf, self._num_trials, best)

    def _begin(self, now: float) -> bool:
        """Give a free worker something to do, if there is anything."""
        if paused := self._rungs.promoted() if self._rungs else self._after_the_start():
            # Optuna takes no trial up again that has ended; its storage in memory lets us.
            self._storage._get_trial(paused.trial_id).state = TrialState.RUNNING
            self._next(now + self._table.start[paused.point], paused)
            return True
        if self._known:
            run = self._new_trial()
            run.is_known = True
            self._is_at(run, int(self._known.pop(0)))
        elif len(self._untried):
            run = self._new_trial()
            self._is_at(run, self._drawn(self._storage.get_trial(run.trial_id)))
            self._untried = self._untried[self._untried != run.point]
        else:
            return False
        self._num_trials += 1
        self._next(now + self._table.start[run.point], run)
        return True

    def _after_the_start(self) -> _Run | None:
        """The best of those that wait and go on, once as many have come as were waited for."""
        if not self._at_start or self._num_come < self._policy.waits:
            return None
        waiting, self._at_start = sorted(self._at_start, key=lambda pair: -pair[0]), []
        for pair in waiting:
            trial = self._storage.get_trial(pair[1].trial_id)
            if self._study.pruner.prune(self._study, trial):
                self._study.tell(pair[1].number, state=TrialState.PRUNED)
                self._targets.discard(pair[1].point)
            else:
                self._at_start.append(pair)
        return self._at_start.pop(0)[1] if self._at_start else None

    def _drawn(self, trial: FrozenTrial) -> int:
        """A point not tried yet, drawn as the product draws it for a trial of that number."""
        policy, number = self._policy, trial.number
        startup_trials = policy.startup_trials + policy.known * int(self._table.known.sum())
        if policy.drafts > 1 and number < startup_trials:
            drafts, untried = [], self._untried
            for draft in range(min(policy.drafts, len(untried))):
                seed = sampling.seed_for(self._seed, number, "draft", draft)
                proposed = self._propose(trial, sampling.sampler("random", seed))
                drafts.append(self._table.nearest(proposed, untried))
                untried = untried[untried != drafts[-1]]  # those of the product differ, too
            return min(drafts, key=lambda point: self._table.flops[point])
        is_sequence = policy.sampler == "qmc"
        seed = self._seed if is_sequence else sampling.seed_for(self._seed, number)
        sampler = sampling.sampler(policy.sampler, seed, number, startup_trials)
        return self._table.nearest(self._propose(trial, sampler), self._untried)

    def _propose(self, trial: FrozenTrial, sampler: optuna.samplers.BaseSampler) -> dict[str, Any]:
        """A point of the space."""
        shown = optuna.pruners._filter_study(self._study, trial)
        joint = sampler.sample_relative(
            shown, trial, sampler.infer_relative_search_space(shown, trial)
        )
        params: dict[str, Any] = {}
        for hp in self._table.space:
            name = hp["name"]
            if is_active(hp, params):
                drawn = self._table.distributions[name]
                params[name] = (
                    joint[name]
                    if name in joint
                    else sampler.sample_independent(shown, trial, name, drawn)
                )
        return params

    def _new_trial(self) -> _Run:
        trial = create_trial(state=TrialState.RUNNING)
        trial_id = self._storage.create_new_trial(self._study._study_id, template_trial=trial)
        return _Run(trial_id, self._storage.get_trial(trial_id).number)

    def _is_at(self, run: _Run, point: int) -> None:
        """Tell the study which point of the table the trial is."""
        run.point = point
        # TPE has noted what it proposed, to keep other proposals away from there.
        for at, key in enumerate(self._storage.get_trial(run.trial_id).system_attrs):
            self._storage.set_trial_system_attr(run.trial_id, key, "" if at else "{}")
        params = self._table.params[point]
        for hp in self._table.space:
            if is_active(hp, params):
                drawn = self._table.distributions[hp["name"]]
                value = drawn.to_internal_repr(params[hp["name"]])
                self._storage.set_trial_param(run.trial_id, hp["name"], value, drawn)

    def _next(self, now: float, run: _Run) -> None:
        """Let it train until its next report, or measure all validation images at its end."""
        run.step += 1
        if run.step > self._num_reports:
            seconds = self._table.last[run.point]
        else:
            part = slice((run.step - 1) * self._policy.every, run.step * self._policy.every)
            training = self._table.report[run.point, part]
            measuring = self._table.measure[run.point, part]
            # Divergence ends the training: what comes after it was not recorded.
            seconds = np.nansum(training) + (measuring[-1] if np.isfinite(measuring[-1]) else 0.0)
        run.seconds += seconds
        heapq.heappush(self._events, (now + seconds, next(self._order), run))

    def _value(self, run: _Run) -> float:
        """Of its last report."""
        return float(self._table.values[run.point, run.step * self._policy.every - 1])

    def _goes_on(self, run: _Run) -> bool:
        """Store its report and decide; what ends is told to the study."""
        value = self._value(run)
        self._num_come += run.step == 1
        if not math.isfinite(value):
            optuna.trial.Trial(self._study, run.trial_id).set_constraint("diverged", 1.0)
            self._study.tell(run.number, state=TrialState.PRUNED)
            return False
        self._storage.set_trial_intermediate_value(run.trial_id, run.step, value)
        clock = self._storage.get_trial(run.trial_id).user_attrs.get(_CLOCK, [])
        self._storage.set_trial_user_attr(run.trial_id, _CLOCK, [*clock, run.seconds])
        if run.step == self._num_reports:  # as in the product, trained whole is complete
            return True
        run.waits = run.step == 1 and self._num_come < self._policy.waits and not run.is_known
        if run.waits:
            self._at_start.append((value, run))
            return False
        trial = self._storage.get_trial(run.trial_id)
        may_end = not run.is_known or is_beaten(self._study, trial)
        stops = may_end and self._study.pruner.prune(self._study, trial)
        if self._rungs and not stops and not run.is_known:
            stops = self._rungs.pauses(run, max(trial.intermediate_values.values()))
        if stops:
            self._study.tell(run.number, state=TrialState.PRUNED)
        return not stops


class _Rungs:
    """Promotions of asynchronous successive halving (Li et al., 2020), their Algorithm 2, at their
    rungs: of a table's few points, doubled ones would leave none to be trained whole."""

    def __init__(self, first_rung: int, reduction_factor: int):
        self._factor = reduction_factor
        self._pruner = Published(first_rung, reduction_factor)
        self._values: dict[int, list[float]] = {}  # by step
        self._paused: dict[int, list[tuple[float, _Run]]] = {}

    def pauses(self, run: _Run, value: float) -> bool:
        """Whether it stops here for now, at its last report with the best value so far."""
        if self._pruner.rung(run.step) != run.step:
            return False
        self._values.setdefault(run.step, []).append(value)
        if value >= self._least(run.step):
            return False
        self._paused.setdefault(run.step, []).append((value, run))
        return True

    def promoted(self) -> _Run | None:
        """The best paused trial of the highest rung that has one to promote."""
        for step in sorted(self._paused, reverse=True):
            paused = max(self._paused[step], key=lambda pair: pair[0], default=None)
            if paused and paused[0] >= self._least(step):
                self._paused[step].remove(paused)
                return paused[1]
        return None

    def _least(self, step: int) -> float:
        """The value that goes on."""
        values = sorted(self._values[step], reverse=True)
        going_on = len(values) // self._factor
        return values[going_on - 1] if going_on else math.inf


class Lenient(SuccessiveHalvingOfReports):
    """The product's, but before so many trials have come to a rung that one in `reduction_factor`
    is one, all go on."""

    def standing(self, study: optuna.Study, trial: FrozenTrial) -> Standing | None:
        standing = super().standing(study, trial)
        return standing if standing and standing.of >= self._reduction_factor else None


class Published(SuccessiveHalvingOfReports):
    """The product's, with rungs as Li et al. have them: `reduction_factor` times as many reports
    from one to the next."""

    def __init__(self, first_rung: int, reduction_factor: int):
        super().__init__(first_rung, reduction_factor)
        self.spacing = reduction_factor


class Once(SuccessiveHalvingOfReports):
    """The product's, but a trial is held against others once at each rung, when it comes there."""

    def standing(self, study: optuna.Study, trial: FrozenTrial) -> Standing | None:
        standing = super().standing(study, trial)
        return standing if standing and standing.rung == trial.last_step else None


class AsFar(Once):
    """As `Once`, and only against those that have come as far, as Li et al. have it."""

    def standing(self, study: optuna.Study, trial: FrozenTrial) -> Standing | None:
        standing = super().standing(study, trial)
        if standing is None:
            return None
        others = [
            _best_by_report(other, standing.rung)
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and standing.rung in other.intermediate_values
        ]
        going_on = max(1, (len(others) + 1) // self._reduction_factor)
        value = _best_by_report(trial, standing.rung)
        place = 1 + sum(other > value for other in others)
        return Standing(place, len(others) + 1, going_on, standing.rung)


def _best_by_report(trial: FrozenTrial, report: int) -> float:
    return max(value for step, value in trial.intermediate_values.items() if step <= report)


class HalvingOfSeconds(optuna.pruners.BasePruner):
    """Successive halving whose rungs are seconds of training: a dear model is held against what
    cheap ones have reached in the same time.

    Args:
        first: seconds until the first rung.
        factor: of seconds from rung to rung, and one in so many goes on.
    """

    def __init__(self, first: float, factor: int):
        self._first, self._factor = first, factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        before, now = [0.0, *trial.user_attrs[_CLOCK]][-2:]
        if now < self._first:
            return False
        rung = self._first * self._factor ** math.floor(math.log(now / self._first, self._factor))
        if before >= rung:
            return False
        others = [
            _best_by(other, rung)
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and other.user_attrs.get(_CLOCK, [0.0])[-1] >= rung
        ]
        going_on = max(1, (len(others) + 1) // self._factor)
        value = max(trial.intermediate_values.values())
        return sum(other > value for other in others) >= going_on


def _best_by(trial: FrozenTrial, seconds: float) -> float:
    """The best value up to the first report at or after so many seconds."""
    clock, reports = trial.user_attrs[_CLOCK], sorted(trial.intermediate_values.items())
    reached = next(at for at, second in enumerate(clock) if second >= seconds)
    return max(value for _, value in reports[: reached + 1])


class Extrapolated(optuna.pruners.BasePruner):
    """Stops a trial whose curve, carried on to its end, stays below the best value so far.

    Args:
        kind: "power": a - b * step**-c, fitted to its own reports; "gains": what complete trials
            have gained from this step on, at the given quantile.
        num_reports: of a whole trial.
        within: also stops what this one stops.
        least: reports before it judges.
    """

    def __init__(
        self,
        kind: str,
        num_reports: int,
        within: optuna.pruners.BasePruner,
        least: int = 3,
        quantile: float = 0.9,
    ):
        self._kind, self._num_reports, self._within = kind, num_reports, within
        self._least, self._quantile = least, quantile

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if self._within.prune(study, trial):
            return True
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not complete or len(trial.intermediate_values) < self._least:
            return False
        best = max(max(other.intermediate_values.values()) for other in complete)
        return self._end(trial, complete) < best

    def _end(self, trial: FrozenTrial, complete: Sequence[FrozenTrial]) -> float:
        """Its best value to come, seen kindly."""
        reached = max(trial.intermediate_values.values())
        if self._kind == "gains":
            if len(complete) < self._least:
                return math.inf
            step = trial.last_step or 0
            gains = [
                max(other.intermediate_values.values())
                - max(value for at, value in other.intermediate_values.items() if at <= step)
                for other in complete
            ]
            return reached + float(np.quantile(gains, self._quantile))
        steps = np.array(sorted(trial.intermediate_values), float)
        values = np.array([trial.intermediate_values[int(step)] for step in steps])
        ends = []
        for power in (0.3, 0.5, 0.7, 1.0, 1.5, 2.0):
            basis = np.stack([np.ones_like(steps), -(steps**-power)], 1)
            (top, fall), *_ = np.linalg.lstsq(basis, values, rcond=None)
            error = float(np.sqrt(np.mean((basis @ (top, fall) - values) ** 2)))
            ends.append((error, float(top - fall * self._num_reports**-power) + 2 * error))
        return max(reached, min(ends)[1])


def defaults() -> dict[str, Any]:
    """The plain settings of study cnn, read and not run: its file imports Keras."""
    own = {field.name: field.default for field in fields(Study)}
    for statement in ast.parse(STUDY.read_text()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="study")], value=ast.Call(keywords=keywords)):
                own |= {
                    keyword.arg: keyword.value.value
                    for keyword in keywords
                    if keyword.arg and isinstance(keyword.value, ast.Constant)
                }
    return own


def policies(table: Table) -> dict[str, Policy]:
    """By name; rungs are in reports of the table, the study's own first one after the same share
    of a whole trial."""
    own = defaults()
    images = own["first_rung"] * own["images_per_report"]
    share = images / (own["epochs"] * NUM_TRAINING)
    first, factor = max(1, round(share * table.num_reports)), own["reduction_factor"]

    def halving(first: int, factor: int, **rest: Any) -> Policy:
        made = functools.partial(_halving, first=first, factor=factor)
        return Policy(pruner=made, **rest)

    pruned = functools.partial(_own, own["pruner"], first, factor)
    default = Policy(own["sampler"], pruned, drafts=sampling.STARTUP_DRAFTS)
    second = float(np.median(np.nansum((table.report + table.measure)[:, :1], 1)))
    return {
        "random": Policy("random"),
        "tpe": Policy(),
        "tpe + median": Policy(pruner=_median),
        **{
            f"tpe + halving {first}/{factor}": halving(first, factor)
            for first in (1, 2, 4)
            for factor in (2, 3, 4)
        },
        "tpe + halving 1/6": halving(1, 6),
        "tpe + Hyperband": Policy(pruner=_hyperband),
        "default": default,
        "default, random": Policy("random", default.pruner),
        "default, qmc": Policy("qmc", default.pruner),
        **{
            f"default, {said}": replace(
                default, pruner=functools.partial(_like, made, first=first, factor=factor)
            )
            for said, made in (
                ("lenient", Lenient),
                ("published rungs", Published),
                ("once at a rung", Once),
                ("once, as far", AsFar),
            )
        },
        **({"default, known points": replace(default, known=True)} if table.known.any() else {}),
        "default, 2 reports in 1": replace(default, every=2),
        **{f"default, {count} drafts": replace(default, drafts=count) for count in (1, 2, 5)},
        **{
            f"default, start-up {count}": replace(default, startup_trials=count)
            for count in (6, 24)
        },
        **{f"default, {count} wait": replace(default, waits=count) for count in (8, 12, 16)},
        **{
            f"tpe + promotions {first}/{factor}": Policy(resumes=(first, factor))
            for first in (1, 2)
            for factor in (2, 3, 4)
        },
        f"tpe + halving of seconds {second:.0f}/3": Policy(
            pruner=functools.partial(_of_seconds, second, 3)
        ),
        f"tpe + halving of seconds {second:.0f}/4": Policy(
            pruner=functools.partial(_of_seconds, second, 4)
        ),
        "tpe + power law": Policy(pruner=functools.partial(_extrapolated, "power")),
        "tpe + gains": Policy(pruner=functools.partial(_extrapolated, "gains")),
        **{
            f"default, {said}": replace(
                default, pruner=functools.partial(_extrapolated, kind, first=first, factor=factor)
            )
            for kind, said in (("power", "power law"), ("gains", "gains"))
        },
    }


# Functions, so that a policy can be sent to another process.


def _halving(num_reports: int, first: int, factor: int) -> optuna.pruners.BasePruner:
    return SuccessiveHalvingOfReports(first, factor)


def _like(made: type, num_reports: int, first: int, factor: int) -> optuna.pruners.BasePruner:
    return made(first, factor)


def _own(name: str, first: int, factor: int, num_reports: int) -> optuna.pruners.BasePruner:
    return pruner(name, first, factor)


def _median(num_reports: int) -> optuna.pruners.BasePruner:
    return optuna.pruners.MedianPruner()


def _hyperband(num_reports: int) -> optuna.pruners.BasePruner:
    return optuna.pruners.HyperbandPruner(max_resource=num_reports)


def _of_seconds(first: float, factor: int, num_reports: int) -> optuna.pruners.BasePruner:
    return HalvingOfSeconds(first, factor)


def _extrapolated(
    kind: str, num_reports: int, first: int = 0, factor: int = 2
) -> optuna.pruners.BasePruner:
    within = SuccessiveHalvingOfReports(first, factor) if first else optuna.pruners.NopPruner()
    return Extrapolated(kind, num_reports, within)


def search(
    table: Table, policy: Policy, num_workers: int, seed: int, reach: float | None = None
) -> Outcome:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return Replay(table, policy, seed, num_workers, reach).run()


class Summary(NamedTuple):
    """Of the searches of one policy; seconds are infinite where too few reached a target."""

    quarter: float
    median: float
    three_quarters: float
    reached: float  # share of the seeds
    trials: float  # median


def summary(outcomes: Sequence[Outcome]) -> Summary:
    ordered = sorted(outcome.seconds for outcome in outcomes)
    # Of infinite ones there is no mean: the one at or above the place.
    quarter, median, three = (
        ordered[math.ceil(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75)
    )
    reached = sum(map(math.isfinite, ordered)) / len(ordered)
    trials = statistics.median(outcome.trials for outcome in outcomes)
    return Summary(quarter, median, three, reached, trials)


def print_table(summaries: Mapping[str, Summary], base: str = "default") -> None:
    print(
        f"{'policy':34}{'median':>9}{'quartiles':>18}{'reached':>9}{'trials':>8}"
        f"{'over ' + base:>14}"
    )
    for name, found in summaries.items():
        ratio = found.median / summaries[base].median if base in summaries else math.nan
        quartiles = f"{_seconds(found.quarter)}-{_seconds(found.three_quarters)}"
        print(
            f"{name:34}{_seconds(found.median):>9}{quartiles:>18}{found.reached:>9.0%}"
            f"{found.trials:>8.0f}{ratio if math.isfinite(ratio) else math.nan:>14.2f}"
        )


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if math.isfinite(seconds) else "never"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, default=Path("tests/data/curves.npz"))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2, help="simulated ones")
    parser.add_argument("--reach", type=float, help="accuracy of a report, from 0 to 1")
    parser.add_argument("--policy", action="append", help="begins so; all where none is given")
    parser.add_argument("--processes", type=int, default=devices.cores())
    given = parser.parse_args()
    table = read(given.table)
    wanted = tuple(given.policy or [""])
    chosen = {name: policy for name, policy in policies(table).items() if name.startswith(wanted)}
    whole = table.start + np.nansum(table.report + table.measure, 1) + table.last
    print(
        f"{len(table.drawn)} points, {len(table.targets())} of them targets (at least "
        f"{table.goal:.4f}; best {table.final[table.drawn].max():.4f}); "
        + (f"here any report of {given.reach:g} is one; " if given.reach else "")
        + "a whole trial takes "
        + f"{np.median(whole[table.drawn]):.0f} s in the median; {given.seeds} seeds, "
        f"{given.workers} simulated workers; seconds:"
    )
    began, summaries = time.monotonic(), {}
    with ProcessPoolExecutor(given.processes) as pool:
        # All at once, so that no process waits for the last seed of a policy.
        found = {
            name: pool.map(
                functools.partial(search, table, policy, given.workers, reach=given.reach),
                range(given.seeds),
                chunksize=5,
            )
            for name, policy in chosen.items()
        }
        for name, outcomes in found.items():
            summaries[name] = summary(list(outcomes))
    print_table(summaries)
    print(f"replayed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
