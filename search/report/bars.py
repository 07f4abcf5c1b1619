"""The result as a bar chart beside what was published of the same data."""

from __future__ import annotations

from typing import NamedTuple

import plotly.graph_objects as go

from search import results
from search.report import references, theme
from search.report.page import label
from search.report.source import Run, Winner

_OURS, _BASELINE, _FIELD = "this run", "published baselines", "field's references"
# A name may be longer than its bar: what is published has colours that ink can be read on.
_COLORS = {_OURS: theme.ACCENT, _BASELINE: theme.PEACH, _FIELD: theme.FAINT}


class Bar(NamedTuple):
    """One system's test accuracy."""

    name: str
    accuracy: float  # fraction
    std: float | None  # over seeds; None for what was published
    group: str


def bars(run: Run) -> list[Bar]:
    """This run's winners, and what was published of the same data; the best first."""
    made = []
    for winner in run.winners:
        test = winner["test"]
        made.append(
            Bar(name_of(winner, run), test["mean"]["accuracy"], test["std"]["accuracy"], _OURS)
        )
    ensemble = run.metrics["ensemble"] if run.metrics else None
    if ensemble and not run.is_comparison:
        name = f"ensemble of {ensemble['models']} models"
        made.append(Bar(name, ensemble["test"]["accuracy"], None, _OURS))
    if run.dataset and run.dataset["reference"] == references.DATASET:
        published = ((references.BASELINES, _BASELINE), (references.FIELD, _FIELD))
        made += [
            Bar(name, accuracy, None, group)
            for of, group in published
            for name, accuracy in of.items()
        ]
    return sorted(made, key=lambda bar: -bar.accuracy)


def bars_figure(bars_: list[Bar]) -> go.Figure:
    """Horizontal bars, named inside, so that a phone's width is enough; the axis begins below the
    worst, which the caption says."""
    figure, start = go.Figure(), axis_start(bars_)
    for group, color in _COLORS.items():
        of = [(place, bar) for place, bar in enumerate(bars_) if bar.group == group]
        if not of:
            continue
        figure.add_bar(
            base=start,
            x=[round(100 * bar.accuracy - start, 3) for _, bar in of],
            y=[place for place, _ in of],
            name=group,
            orientation="h",
            marker={"color": color},
            error_x={
                "type": "data",
                "array": [100 * (bar.std or 0.0) for _, bar in of],
                "visible": any(bar.std for _, bar in of),
                "color": theme.INK,
                "thickness": 1.3,
                "width": 3,
            },
            text=[_named(bar) for _, bar in of],
            textposition="auto",
            insidetextanchor="start",
            constraintext="none",
            insidetextfont={"color": "#ffffff" if group == _OURS else theme.INK},
            hovertemplate="%{text} %<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", showgrid=False, showticklabels=False)
    best = 100 * max(bar.accuracy + (bar.std or 0.0) for bar in bars_)
    figure.update_xaxes(range=[start, min(100.5, best + 1)], ticksuffix=" %")
    return theme.styled(figure, legend=True, bargap=0.28)


def axis_start(bars_: list[Bar]) -> float:
    """Where the axis of a bar chart begins, in percent: a multiple of 10 below all bars."""
    return max(0.0, 10 * ((100 * min(bar.accuracy for bar in bars_) - 2) // 10))


def name_of(winner: Winner, run: Run) -> str:
    """A point of a comparison by its value, with what it began from; else the trial."""
    if not run.is_comparison:
        return f"{run.name}, trial {winner['trial']}"
    name = results.point_name(winner["params"])
    return f"{name} ({winner['weights']})" if winner["weights"] else name


def _named(bar: Bar) -> str:
    if bar.group == _OURS:
        return f"<b>{100 * bar.accuracy:.2f}  {label(bar.name)}</b>"
    published = ", published" if bar.group == _BASELINE else ""
    return f"{100 * bar.accuracy:.1f}  {label(bar.name)}{published}"


def caption(bars_: list[Bar]) -> str:
    """What the chart shows, and whose the figures are."""
    words = [f"Percent of the test images; the axis begins at {axis_start(bars_):.0f} %."]
    if any(bar.std for bar in bars_):
        words.append("Whiskers: standard deviation over seeds.")
    if any(bar.group == _FIELD for bar in bars_):
        words.append(f"References: {references.SOURCE}, as published there, not measured here.")
    return " ".join(words)
