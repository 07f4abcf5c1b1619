"""How a search went: the best so far, and the learning curves.

Each figure is computed by one function, as plain values, and drawn by another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from search.report import theme
from search.report.page import label
from search.report.source import Run, thinned
from search.results import Clock, attempts_of, end_of, short

MOST_CURVES = 300


class Reached(NamedTuple):
    """What a trial came to, and the best of the complete ones until then."""

    number: int
    hours: float  # of searching; nan where no times are stored
    value: float  # of one that was pruned: its best report
    best: float | None  # None before the first is complete
    is_complete: bool


class Curve(NamedTuple):
    """One trial's reports."""

    trial: FrozenTrial
    x: list[float]  # epochs, or reports
    y: list[float]


def unit_of(hours: float) -> tuple[str, int]:
    """What a time is shown in, and how many of them are an hour."""
    return ("hours", 1) if hours >= 1 else ("minutes", 60)


def reached_by_time(trials: Sequence[FrozenTrial]) -> list[Reached]:
    """Complete and pruned trials as they ended; those without a time are left out."""
    clock = Clock(trials)
    ended = [(end_of(attempts[-1]), t) for t in trials if (attempts := attempts_of(t))]
    ended.sort(key=lambda pair: (pair[0], pair[1].number))
    return _reached((clock.hours(time), trial) for time, trial in ended)


def reached_by_trial(trials: Sequence[FrozenTrial]) -> list[Reached]:
    """Complete and pruned trials by their numbers."""
    return _reached((math.nan, trial) for trial in sorted(trials, key=lambda t: t.number))


def _reached(trials: Iterable[tuple[float, FrozenTrial]]) -> list[Reached]:
    reached: list[Reached] = []
    best: float | None = None
    for hours, trial in trials:
        is_complete = trial.state == TrialState.COMPLETE
        reports = filter(math.isfinite, trial.intermediate_values.values())
        value = trial.value if is_complete else max(reports, default=None)
        if value is None or not (is_complete or trial.state == TrialState.PRUNED):
            continue
        if is_complete:
            best = value if best is None else max(value, best)
        reached.append(Reached(trial.number, hours, value, best, is_complete))
    return reached


def hours_figure(reached: Sequence[Reached], searched: float, value_name: str) -> go.Figure:
    """The best so far by time, to the hour at which the search ended."""
    unit, factor = unit_of(searched)
    times = [round(factor * one.hours, 4) for one in reached]
    figure = _best_so_far(reached, times, round(factor * searched, 4))
    return theme.styled(figure, x=f"{unit} of searching", y=value_name)


def history_figure(reached: Sequence[Reached], value_name: str) -> go.Figure:
    """The best so far by trials."""
    numbers = [one.number for one in reached]
    figure = _best_so_far(reached, numbers, max(numbers))
    return theme.styled(figure, x="trial", y=value_name)


def _best_so_far(reached: Sequence[Reached], x: Sequence[float], end: float) -> go.Figure:
    """Pruned trials hollow, complete ones full, and the line of the best of these, to the end."""
    figure = go.Figure()
    for is_complete, symbol in ((False, "circle-open"), (True, "circle")):
        shown = [(at, one) for at, one in zip(x, reached, strict=True)
                 if one.is_complete == is_complete]  # fmt: skip
        how = "" if is_complete else ", pruned"
        figure.add_scatter(
            x=[at for at, _ in shown],
            y=[one.value for _, one in shown],
            mode="markers",
            marker={"color": theme.GREY, "size": 6, "opacity": 0.75, "symbol": symbol},
            text=[f"trial {one.number}{how}" for _, one in shown],
            hovertemplate="%{text}: %{y:.4f}<extra></extra>",
        )
    line = [(at, one.best) for at, one in zip(x, reached, strict=True) if one.best is not None]
    line += [(end, best) for _, best in line[-1:]]
    figure.add_scatter(
        x=[at for at, _ in line],
        y=[best for _, best in line],
        mode="lines",
        line={"color": theme.ACCENT, "width": 2.5, "shape": "hv"},
        hoverinfo="skip",
    )
    # Most pruned trials ended far below: near the line there is what to look at.
    bests = [best for _, best in line]
    low = bests[0] - 2 * (bests[-1] - bests[0])
    near = [one.value for one in reached if one.value >= low or bests[0] == bests[-1]]
    figure.update_yaxes(range=theme.focus(near) or theme.around(near))
    return figure


def curves(run: Run) -> list[Curve]:
    """Every trial that reported; of very many, the best and a random draw of the others."""
    reported = [trial for trial in run.trials if trial.intermediate_values]
    ranked = sorted(reported, key=lambda t: (t.value is None, -(_last_value(t)), t.number))
    per_report = run.epochs_per_report or 1.0
    made = []
    for trial in thinned(ranked, MOST_CURVES):
        steps = sorted(trial.intermediate_values)
        values = [float(f"{trial.intermediate_values[step]:.5g}") for step in steps]
        made.append(Curve(trial, [round(step * per_report, 3) for step in steps], values))
    return made


def curves_figure(drawn: Sequence[Curve], run: Run) -> go.Figure:
    """The best on top; hovering names a trial's params."""
    best = run.complete[0].number if run.complete else None
    traces = []
    for curve in reversed(drawn):
        trial = curve.trial
        is_best = trial.number == best
        is_complete = trial.state == TrialState.COMPLETE
        color = theme.RED if is_best else theme.ACCENT if is_complete else theme.GREY
        traces.append(
            go.Scatter(
                x=curve.x,
                y=curve.y,
                mode="lines+markers",
                line={"color": color, "width": 3 if is_best else 1.3},
                marker={"color": color, "size": 5 if is_best else 3},
                opacity=1.0 if is_best else 0.7 if is_complete else 0.4,
                hovertemplate=f"%{{y:.4f}} at %{{x}}<br>{_described(trial)}<extra></extra>",
            )
        )
    figure = go.Figure(traces)
    figure.update_yaxes(range=theme.focus([y for curve in drawn for y in curve.y]))
    x = "epochs" if run.epochs_per_report else "reports"
    return theme.styled(figure, x=x, y=run.value_name, hovermode="closest")


def _last_value(trial: FrozenTrial) -> float:
    if trial.value is not None:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)]


def _described(trial: FrozenTrial) -> str:
    params = [f"{label(name)}={label(short(value))}" for name, value in trial.params.items()]
    lines = [", ".join(params[i : i + 4]) for i in range(0, len(params), 4)]
    head = f"<b>trial {trial.number}</b>, {trial.state.name.lower()}"
    # plotly.js would read these as a format.
    return "<br>".join([head, *lines]).replace("%{", "%&#123;")
