"""Where in the space the good points are: Optuna's plots of the params, and a look at the edges."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import optuna
import plotly.graph_objects as go
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.report import theme
from search.report.page import label
from search.report.source import thinned
from search.results import short

LEAST_COMPLETE = 8  # for importances: a guess, below which they are noise
MOST_DRAWN = 250  # complete trials in parallel coordinates, slices and contour
MOST_PARAMS = 8
EDGE = 0.02  # of a range, on either side
_TRAINED = (TrialState.COMPLETE, TrialState.PRUNED)
_FEWEST_STEPS = 3  # of a range or of numbers to choose from: of two each is an edge


class AtEdge(NamedTuple):
    """A hyperparameter whose best value lies where its range ends."""

    name: str
    value: Any
    where: str  # such as "the largest of"
    of: str  # the range, or the numbers


def at_edges(trial: FrozenTrial) -> list[AtEdge]:
    """Hyperparameters of the best trial whose range may be too narrow.

    Not where a quantity itself ends: few can go below 0, a whole number that begins at 1 counts
    something, and what lies between 0 and 1 is a share.
    """
    found = []
    for name, value in trial.params.items():
        range_ = trial.distributions[name]
        if isinstance(range_, CategoricalDistribution):
            numbers = _numbers(range_)
        elif isinstance(range_, FloatDistribution | IntDistribution) and not range_.single():
            numbers = [range_.low, range_.high]
        else:
            continue
        if _num_steps(range_, numbers) < _FEWEST_STEPS:
            continue
        low, high = numbers[0], numbers[-1]
        is_low, is_high = _ends(range_, value, low, high)
        counts = low == 1 and all(isinstance(number, int) for number in (low, high))
        is_share = (low, high) == (0, 1)
        if (is_low and low != 0 and not counts) or (is_high and not is_share):
            is_range = len(numbers) == 2
            near = "" if value in (low, high) else "near "
            where = f"{near}the {'largest' if is_high else 'smallest'} of"
            named = [short(number) for number in numbers]
            found.append(AtEdge(name, value, where, (" to " if is_range else ", ").join(named)))
    return found


def _numbers(range_: CategoricalDistribution) -> list[Any]:
    """What there is to choose from, the smallest first; empty where it is not numbers."""
    numbers = [c for c in range_.choices if isinstance(c, int | float) and not isinstance(c, bool)]
    return sorted(set(numbers)) if len(numbers) == len(range_.choices) else []


def _num_steps(range_: BaseDistribution, numbers: Sequence[Any]) -> float:
    if isinstance(range_, CategoricalDistribution):
        return len(numbers)
    assert isinstance(range_, FloatDistribution | IntDistribution)
    return (range_.high - range_.low) / range_.step + 1 if range_.step else math.inf


def _ends(range_: BaseDistribution, value: Any, low: Any, high: Any) -> tuple[bool, bool]:
    """Whether a value lies at the lower and at the upper end."""
    if isinstance(range_, CategoricalDistribution):
        return value == low, value == high
    assert isinstance(range_, FloatDistribution | IntDistribution)
    if isinstance(range_, IntDistribution) and not range_.log:
        return value == low, value + range_.step > high
    scale = math.log if range_.log else float
    at = (scale(value) - scale(low)) / (scale(high) - scale(low))
    return at <= EDGE, at >= 1 - EDGE


def compared(trials: Sequence[FrozenTrial]) -> tuple[list[FrozenTrial], int | None]:
    """The trials as they can be compared: complete those that are, with their values.

    Where most were pruned the few complete ones say little of what the others lacked: then all that
    came to a report are complete in what is returned, with their best value until there. It is the
    last that half of the trained trials came to.

    Returns:
        The trials, in their order; the report, or None.
    """
    trained = [trial for trial in trials if trial.state in _TRAINED and trial.last_step is not None]
    num_complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
    if 2 * num_complete >= len(trained):
        return list(trials), None
    steps = sorted((trial.last_step or 0 for trial in trained), reverse=True)
    report = steps[(len(trained) - 1) // 2]
    made = []
    for trial in map(copy.copy, trials):
        values = [value for step, value in trial.intermediate_values.items() if step <= report]
        has_come = trial.state in _TRAINED and (trial.last_step or 0) >= report
        if trial.state in _TRAINED:
            trial.state = TrialState.COMPLETE if has_come and values else TrialState.PRUNED
            trial.value = max(values) if has_come and values else None
        made.append(trial)
    return made, report


def snapshot(trials: Sequence[FrozenTrial], most: int | None = None) -> optuna.Study:
    """The trials as a study in memory, for Optuna's plots; numbers stay as they are.

    Names and categories are escaped, since plotly.js reads some HTML in them.

    Args:
        most: complete trials, as `source.thinned` leaves them; those left out stand in as failed.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    ranked = sorted(complete, key=lambda trial: -(trial.value or 0.0))
    kept = {trial.number for trial in thinned(ranked, most or len(ranked))}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(level)
    for trial in sorted(trials, key=lambda trial: trial.number):
        study.add_trial(
            _escaped(trial) if trial.number in kept else create_trial(state=TrialState.FAIL)
        )
    return study


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each hyperparameter explains of the complete trials' values, the most first; empty
    where too few trials are complete to say."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < LEAST_COMPLETE or len({trial.value for trial in complete}) < 2:
        return {}
    varying = [name for name, _ in _values(complete).items()]
    if not varying:
        return {}
    found = optuna.importance.get_param_importances(study, params=varying)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def chosen_params(study: optuna.Study, ranked: Sequence[str]) -> list[str]:
    """At most MOST_PARAMS that vary and that most complete trials have, the important ones first.

    Args:
        ranked: by importance; empty where that is not known.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    common = [name for name, n in _values(complete).items() if n > len(complete) / 2]
    rank = {name: place for place, name in enumerate(ranked)}
    return sorted(common, key=lambda name: rank.get(name, len(rank)))[:MOST_PARAMS]


def pair(study: optuna.Study, ranked: Sequence[str]) -> list[str]:
    """The two most important hyperparameters that enough complete trials have together; fewer
    where there are none."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    first = list(ranked[:1])
    for name in ranked[1:]:
        both = [trial for trial in complete if {*first, name} <= trial.params.keys()]
        if len(both) >= LEAST_COMPLETE and len({str(trial.params[name]) for trial in both}) > 1:
            return [*first, name]
    return first


def importances_figure(ranked: dict[str, float]) -> go.Figure:
    """Of the first dozen. Not Optuna's plot, which computes them again."""
    first = list(ranked.items())[:12][::-1]
    figure = go.Figure(
        go.Bar(
            x=[value for _, value in first],
            y=[name for name, _ in first],
            orientation="h",
            marker={"color": theme.ACCENT},
            text=[f"{value:.0%}" for _, value in first],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )
    most = max(ranked.values())
    figure.update_xaxes(range=[0, 1.2 * most], showgrid=False, showticklabels=False)
    return theme.styled(figure, bargap=0.35)


def parallel_figure(study: optuna.Study, params: Sequence[str], value_name: str) -> go.Figure:
    figure = optuna.visualization.plot_parallel_coordinate(
        study, params=list(params), target_name=value_name
    )
    # Its shade is a line's rank, since a few bad values would leave all others in one. Optuna
    # draws the lines in an order of its own; where one begins is its value.
    lines = sorted(
        (line for line in figure.data if line.mode == "lines"), key=lambda line: line.y[0]
    )
    for place, line in enumerate(lines):
        fraction = place / max(1, len(lines) - 1)
        line.line.color = theme.shade(fraction)
        line.opacity = 0.35 + 0.6 * fraction
    figure.data = lines
    figure.update_annotations(font={"color": theme.INK, "size": 10})
    figure.update_xaxes(side="top", tickangle=0)
    return theme.styled(figure, hovermode="closest").update_layout(margin={"l": 56, "r": 36})


def slice_figure(study: optuna.Study, name: str, value_name: str) -> go.Figure:
    """One hyperparameter against the value."""
    figure = optuna.visualization.plot_slice(study, params=[name], target_name=value_name)
    figure.update_traces(
        marker={"color": theme.ACCENT, "size": 6, "opacity": 0.65, "line": {"width": 0},
                "colorscale": None, "showscale": False, "colorbar": None},
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )  # fmt: skip
    values = [t.value or 0.0 for t in study.get_trials(deepcopy=False) if t.value is not None]
    figure.update_yaxes(range=theme.focus(values), title=None)
    return theme.styled(figure, x=name)


def contour_figure(study: optuna.Study, params: Sequence[str], value_name: str) -> go.Figure | None:
    """Two hyperparameters against the value; None where no surface can be drawn."""
    figure = optuna.visualization.plot_contour(study, params=list(params), target_name=value_name)
    if not any(trace.type == "contour" and trace.z is not None for trace in figure.data):
        return None
    values = [t.value or 0.0 for t in study.get_trials(deepcopy=False) if t.value is not None]
    low, high = theme.focus(values) or (min(values), max(values))
    figure.update_traces(
        selector={"type": "contour"},
        colorscale=theme.SCALE,
        reversescale=False,
        colorbar={"title": None, "thickness": 10},
        line={"width": 0},
        zmin=low,
        zmax=high,
    )
    figure.update_traces(
        selector={"type": "scatter"},
        marker={"color": theme.INK, "size": 5, "opacity": 0.7, "line": {"width": 0}},
    )
    # Long numbers along a logarithm would lie on one another.
    return theme.styled(figure.update_xaxes(nticks=4, tickangle=0))


def _values(complete: Sequence[FrozenTrial]) -> dict[str, int]:
    """The hyperparameters that vary, each with the number of trials that have it."""
    seen: dict[str, list[str]] = {}
    for trial in complete:
        for name, value in trial.params.items():
            seen.setdefault(name, []).append(str(value))
    return {name: len(values) for name, values in seen.items() if len(set(values)) > 1}


def _escaped(trial: FrozenTrial) -> FrozenTrial:
    """A trial with what the plots need of it."""
    if trial.state != TrialState.COMPLETE:
        return create_trial(state=TrialState.FAIL)
    params: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for name, value in trial.params.items():
        range_ = trial.distributions[name]
        if isinstance(range_, CategoricalDistribution):
            choices = [label(c) if isinstance(c, str) else c for c in range_.choices]
            range_ = CategoricalDistribution(choices)
            value = label(value) if isinstance(value, str) else value
        elif not isinstance(range_, FloatDistribution | IntDistribution):
            continue
        params[label(name)], distributions[label(name)] = value, range_
    return create_trial(
        state=trial.state, value=trial.value, params=params, distributions=distributions
    )
