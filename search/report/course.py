"""How a search went: the best so far, and the learning curves.

Each figure is computed by one function, as plain values, and drawn by another.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from search.report import theme
from search.report.page import label
from search.report.source import Run
from search.results import short

MOST_CURVES = 300  # two thirds the best, the others drawn at random


class Clock:
    """Hours of searching: time in which no trial ran does not count.

    Args:
        trials: with the attempts that the coordinator stores.
    """

    def __init__(self, trials: Iterable[FrozenTrial]):
        self._starts: list[float] = []  # of times without a pause
        self._before: list[float] = []  # seconds counted before each
        self._ends: list[float] = []
        total = 0.0
        times = sorted((a["start"], end_of(a)) for t in trials for a in attempts_of(t))
        for start, end in times:
            if not self._ends or start > self._ends[-1]:
                self._starts.append(start)
                self._before.append(total)
                self._ends.append(start)
            total += max(0.0, end - self._ends[-1])
            self._ends[-1] = max(self._ends[-1], end)

    def hours(self, time: float) -> float:
        """Hours of searching before `time`, in seconds since 1970."""
        at = bisect.bisect_right(self._starts, time) - 1
        if at < 0:
            return 0.0
        return (self._before[at] + min(time, self._ends[at]) - self._starts[at]) / 3600


class Reached(NamedTuple):
    """The best so far, when a trial completed."""

    number: int
    hours: float
    value: float
    best: float


class Curve(NamedTuple):
    """One trial's reports."""

    trial: FrozenTrial
    x: list[float]  # epochs, or reports
    y: list[float]


def unit_of(hours: float) -> tuple[str, int]:
    """What a time is shown in, and how many of them are an hour."""
    return ("hours", 1) if hours >= 1 else ("minutes", 60)


def best_so_far(trials: Sequence[FrozenTrial]) -> list[Reached]:
    """Complete trials in the order in which they ended; those without a time are left out."""
    clock = Clock(trials)
    ended = sorted(
        (end_of(attempts[-1]), trial.number, trial.value)
        for trial in trials
        if trial.state == TrialState.COMPLETE
        and trial.value is not None
        and (attempts := attempts_of(trial))
    )
    reached: list[Reached] = []
    for time, number, value in ended:
        best = max(value, reached[-1].best) if reached else value
        reached.append(Reached(number, clock.hours(time), value, best))
    return reached


def hours_searched(trials: Sequence[FrozenTrial]) -> float:
    """Until the last trial ended, pruned ones included."""
    ends = [end_of(attempt) for trial in trials for attempt in attempts_of(trial)]
    return Clock(trials).hours(max(ends, default=0.0))


def hours_figure(reached: Sequence[Reached], searched: float, value_name: str) -> go.Figure:
    """The best so far by time, to the hour at which the search ended."""
    unit, factor = unit_of(searched)
    times = [round(factor * one.hours, 4) for one in reached]
    values = [one.value for one in reached]
    figure = go.Figure(
        [
            go.Scatter(
                x=times,
                y=values,
                mode="markers",
                marker={"color": theme.GREY, "size": 6, "opacity": 0.75},
                text=[f"trial {one.number}" for one in reached],
                hovertemplate="%{text}: %{y:.4f} after %{x:.2f} " + f"{unit}<extra></extra>",
            ),
            go.Scatter(
                x=[*times, round(factor * searched, 4)] if times else [],
                y=[one.best for one in [*reached, *reached[-1:]]],
                mode="lines",
                line={"color": theme.ACCENT, "width": 2.5, "shape": "hv"},
                hoverinfo="skip",
            ),
        ]
    )
    figure.update_yaxes(range=theme.focus(values))
    return theme.styled(figure, x=f"{unit} of searching", y=value_name)


def history_figure(study: optuna.Study, run: Run) -> go.Figure:
    """Optuna's history, in the page's colours.

    Args:
        study: a snapshot of the run's (search/report/space.py).
    """
    figure = optuna.visualization.plot_optimization_history(study, target_name=run.value_name)
    figure.update_traces(
        selector={"mode": "markers"},
        marker={"color": theme.GREY, "size": 6, "opacity": 0.75},
        hovertemplate="trial %{x}: %{y:.4f}<extra></extra>",
    )
    figure.update_traces(
        selector={"mode": "lines"},
        line={"color": theme.ACCENT, "width": 2.5, "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_yaxes(range=theme.focus([trial.value or 0.0 for trial in run.complete]))
    return theme.styled(figure, x="trial", y=run.value_name)


def curves(run: Run) -> list[Curve]:
    """Every trial that reported; of very many, the best and a random draw of the others."""
    reported = [trial for trial in run.trials if trial.intermediate_values]
    ranked = sorted(reported, key=lambda t: (t.value is None, -(_last_value(t)), t.number))
    if len(ranked) > MOST_CURVES:
        num_best = MOST_CURVES * 2 // 3
        others = random.Random(0).sample(ranked[num_best:], MOST_CURVES - num_best)
        ranked = ranked[:num_best] + others
    per_report = run.epochs_per_report or 1.0
    made = []
    for trial in ranked:
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


def attempts_of(trial: FrozenTrial) -> list[dict]:
    """A trial's attempts, as the coordinator stores them."""
    return [one for one in trial.user_attrs.get("attempts", []) if "start" in one]


def end_of(attempt: dict) -> float:
    """Seconds since 1970; of one that runs, when it was last heard of."""
    return float(attempt.get("end") or attempt.get("seen") or attempt["start"])


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
