"""What the workers did when: every attempt of every trial, and how it ended."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from search.report import theme
from search.report.course import unit_of
from search.report.page import label
from search.results import Clock, attempts_of, end_of

_FINISHED_OTHERWISE = ("diverged", "out_of_memory", "invalid", "error")
_SEARCH_ENDED = "coordinator ended"  # search/trial.py
# How an attempt ended -> what it is called, its colour.
_ENDS = {
    "complete": ("complete", theme.ACCENT),
    "pruned": ("pruned", theme.FAINT),
    "failed": ("diverged or failed", theme.AMBER),
    "died": ("died", theme.RED),
    "interrupted": ("the search ended", theme.VIOLET),
    "running": ("not ended yet", theme.TEAL),  # also where nobody trains it any more
}


class Attempt(NamedTuple):
    """One attempt of a trial, on a worker."""

    lane: str  # the worker
    start: float  # hours
    hours: float
    end: str  # a key of _ENDS
    words: str  # for the one who points at it


def attempts(trials: Sequence[FrozenTrial]) -> list[Attempt]:
    """All attempts, each in the lane of a worker: of those on a host and device, the first that
    was free, since a worker that died is replaced by another process."""
    clock = Clock(trials)
    last = max((end_of(a) for t in trials for a in attempts_of(t)), default=0.0)
    free_at: dict[str, list[float]] = defaultdict(list)
    made = []
    for start, number, attempt, has_ended_it in sorted(
        (
            (a["start"], trial.number, a, trial.state.is_finished() and a is of[-1])
            for trial in trials
            for of in [attempts_of(trial)]
            for a in of
        ),
        key=lambda one: one[:2],
    ):
        is_running = "end" not in attempt
        end = last if is_running else attempt["end"]
        place = ", ".join(str(attempt[n]) for n in ("host", "device") if n in attempt) or "worker"
        lanes = free_at[place]
        lane = next((i for i, free in enumerate(lanes) if free <= start + 0.05), len(lanes))
        lanes[lane : lane + 1] = [end]
        reason = attempt.get("reason", "")
        kind = "running" if is_running else _kind(reason, has_ended_it)
        words = f"trial {number}, attempt {attempt.get('attempt', 1)}: {reason or 'not ended yet'}"
        begun = clock.hours(start)
        made.append(
            Attempt(f"{place} ({lane + 1})", begun, max(0.0, clock.hours(end) - begun), kind, words)
        )
    return made


def most_at_once(made: Sequence[Attempt]) -> int:
    """How many ran side by side, at most. There may be more lanes: a search that went on with other
    devices, or on a host of another name, has new ones."""
    # One of which nothing has been heard yet has no length.
    ends = [(a.start + max(a.hours, 1e-9), -1) for a in made]
    changes = sorted([(a.start, 1) for a in made] + ends)
    return max(itertools.accumulate((change for _, change in changes), initial=0))


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


def _kind(reason: str, has_ended_it: bool) -> str:
    """How an attempt ended; one after which the trial ran again, for whatever reason, has died."""
    if reason in ("complete", "pruned"):
        return reason
    if reason == _SEARCH_ENDED:
        return "interrupted"
    return "failed" if has_ended_it and reason in _FINISHED_OTHERWISE else "died"
