"""How a search went: the best so far, the learning curves, what the workers did when.

Each figure is computed by one function, as plain values, and drawn by another.
"""

from __future__ import annotations

import bisect
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from search.report import theme
from search.report.page import label
from search.report.source import Run

MOST_CURVES = 300  # two thirds the best, the others drawn at random
_FINISHED_OTHERWISE = ("diverged", "out_of_memory", "invalid", "error")
# How an attempt ended -> what it is called, its colour.
_ENDS = {
    "complete": ("complete", theme.ACCENT),
    "pruned": ("pruned", theme.FAINT),
    "failed": ("diverged, out of memory, invalid or failed", theme.AMBER),
    "died": ("died: its worker was lost, or the search ended", theme.RED),
    "running": ("running", theme.TEAL),
}


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
        times = sorted((a["start"], _end_of(a)) for t in trials for a in _attempts_of(t))
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


class Attempt(NamedTuple):
    """One attempt of a trial, on a worker."""

    lane: str  # the worker
    start: float  # hours
    hours: float
    end: str  # a key of _ENDS
    words: str  # for the one who points at it


def unit_of(hours: float) -> tuple[str, int]:
    """What a time is shown in, and how many of them are an hour."""
    return ("hours", 1) if hours >= 1 else ("minutes", 60)


def best_so_far(trials: Sequence[FrozenTrial]) -> list[Reached]:
    """Complete trials in the order in which they ended; those without a time are left out."""
    clock = Clock(trials)
    ended = sorted(
        (_end_of(attempts[-1]), trial.number, trial.value)
        for trial in trials
        if trial.state == TrialState.COMPLETE
        and trial.value is not None
        and (attempts := _attempts_of(trial))
    )
    reached: list[Reached] = []
    for time, number, value in ended:
        best = max(value, reached[-1].best) if reached else value
        reached.append(Reached(number, clock.hours(time), value, best))
    return reached


def hours_figure(reached: Sequence[Reached], value_name: str) -> go.Figure:
    unit, factor = unit_of(max((one.hours for one in reached), default=0.0))
    times = [round(factor * one.hours, 4) for one in reached]
    values = [one.value for one in reached]
    figure = go.Figure(
        [
            go.Scatter(
                x=times,
                y=values,
                mode="markers",
                marker={"color": theme.GREY, "size": 6, "opacity": 0.55},
                text=[f"trial {one.number}" for one in reached],
                hovertemplate="%{text}: %{y:.4f} after %{x:.2f} " + f"{unit}<extra></extra>",
            ),
            go.Scatter(
                x=times,
                y=[one.best for one in reached],
                mode="lines",
                line={"color": theme.ACCENT, "width": 2.5, "shape": "hv"},
                hoverinfo="skip",
            ),
        ]
    )
    figure.update_yaxes(range=theme.focus(values))
    return theme.styled(figure, x=f"{unit} of searching", y=value_name)


def history_figure(run: Run) -> go.Figure:
    """Optuna's history, in the page's colours."""
    from optuna.visualization import plot_optimization_history

    from search.report.space import snapshot

    figure = plot_optimization_history(snapshot(run.trials), target_name=run.value_name)
    figure.update_traces(
        selector={"mode": "markers"},
        marker={"color": theme.GREY, "size": 6, "opacity": 0.55},
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
        others = random.Random(run.seed).sample(ranked[num_best:], MOST_CURVES - num_best)
        ranked = ranked[:num_best] + others
    per_report = run.epochs_per_report or 1.0
    made = []
    for trial in ranked:
        steps = sorted(trial.intermediate_values)
        values = [round(trial.intermediate_values[step], 5) for step in steps]
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
                opacity=1.0 if is_best else 0.7 if is_complete else 0.25,
                hovertemplate=f"%{{y:.4f}} at %{{x}}<br>{_described(trial)}<extra></extra>",
            )
        )
    figure = go.Figure(traces)
    figure.update_yaxes(range=theme.focus([y for curve in drawn for y in curve.y]))
    x = "epochs" if run.epochs_per_report else "reports"
    return theme.styled(figure, x=x, y=run.value_name, hovermode="closest")


def attempts(trials: Sequence[FrozenTrial]) -> list[Attempt]:
    """All attempts, each in the lane of a worker: of those on a host and device, the first that
    was free, since a worker that died is replaced by another process."""
    clock = Clock(trials)
    last = max((_end_of(a) for t in trials for a in _attempts_of(t)), default=0.0)
    free_at: dict[str, list[float]] = defaultdict(list)
    made = []
    for start, number, attempt in sorted(
        ((a["start"], trial.number, a) for trial in trials for a in _attempts_of(trial)),
        key=lambda one: one[:2],
    ):
        is_running = "end" not in attempt
        end = last if is_running else attempt["end"]
        place = ", ".join(str(attempt[n]) for n in ("host", "device") if n in attempt) or "worker"
        lanes = free_at[place]
        lane = next((i for i, free in enumerate(lanes) if free <= start + 0.05), len(lanes))
        lanes[lane : lane + 1] = [end]
        reason = attempt.get("reason", "")
        kind = "running" if is_running else _kind(reason)
        words = f"trial {number}, attempt {attempt.get('attempt', 1)}: {reason or 'running'}"
        begun = clock.hours(start)
        made.append(
            Attempt(f"{place} ({lane + 1})", begun, max(0.0, clock.hours(end) - begun), kind, words)
        )
    return made


def timeline_figure(made: Sequence[Attempt]) -> go.Figure:
    lanes = sorted({one.lane for one in made}, reverse=True)
    unit, factor = unit_of(max(one.start + one.hours for one in made))
    figure = go.Figure()
    for end, (name, color) in _ENDS.items():
        ended = [one for one in made if one.end == end]
        if not ended:
            continue
        figure.add_bar(
            x=[round(factor * one.hours, 4) for one in ended],
            base=[round(factor * one.start, 4) for one in ended],
            y=[lanes.index(one.lane) for one in ended],
            orientation="h",
            name=name,
            marker={"color": color, "line": {"width": 0.5, "color": theme.GREY}},
            width=0.72,
            text=[label(one.words) for one in ended],
            textposition="none",
            hovertemplate=f"%{{text}}<br>%{{x:.2f}} {unit}<extra></extra>",
        )
    figure.update_yaxes(
        tickvals=list(range(len(lanes))), ticktext=[label(lane) for lane in lanes], showgrid=False
    )
    return theme.styled(
        figure, x=f"{unit} of searching", legend=True, barmode="overlay", bargap=0.2
    )


def _kind(reason: str) -> str:
    if reason in ("complete", "pruned"):
        return reason
    return "failed" if reason in _FINISHED_OTHERWISE else "died"


def _attempts_of(trial: FrozenTrial) -> list[dict]:
    return [one for one in trial.user_attrs.get("attempts", []) if "start" in one]


def _end_of(attempt: dict) -> float:
    """Seconds since 1970; of one that runs, when it was last heard of."""
    return float(attempt.get("end") or attempt.get("seen") or attempt["start"])


def _last_value(trial: FrozenTrial) -> float:
    if trial.value is not None:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)]


def _described(trial: FrozenTrial) -> str:
    params = [f"{label(name)}={label(shown(value))}" for name, value in trial.params.items()]
    lines = [", ".join(params[i : i + 4]) for i in range(0, len(params), 4)]
    head = f"<b>trial {trial.number}</b>, {trial.state.name.lower()}"
    # plotly.js would read these as a format.
    return "<br>".join([head, *lines]).replace("%{", "%&#123;")


def shown(value: object) -> str:
    """A param as it is read: four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
