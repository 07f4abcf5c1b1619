"""Colours of the page and its figures, light and dark.

A figure names its colours as they are on light ground; page.js puts in those for dark ground. So a
colour of a figure is one of these, written as here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

ACCENT = "#2a78d6"
TEAL = "#1baf7a"
AMBER = "#eda100"
VIOLET = "#4a3aa7"
RED = "#e34948"
ORANGE = "#eb6834"
PINK = "#e87ba4"
GREEN = "#008300"
GREY = "#8f8e88"
FAINT = "#c6c5be"
PEACH = "#f6c3a6"
INK = "#1f1e1c"
_LIGHT_RAMP = (
    "#edf4fc",
    "#cbe0f8",
    "#a3c8f3",
    "#78abeb",
    "#4b8cdf",
    "#266bc2",
    "#174b8e",
    "#0c2f5d",
)
_DARK_RAMP = (
    "#1d2630",
    "#1b3654",
    "#1e4c7e",
    "#2665ab",
    "#3b82d3",
    "#6aa5e8",
    "#a2c8f4",
    "#d9e9fc",
)

# light -> dark
COLORS = {
    ACCENT: "#4f97ec",
    TEAL: "#22a57a",
    AMBER: "#d39a1b",
    VIOLET: "#9a8ff0",
    RED: "#ec6b6a",
    ORANGE: "#e0703f",
    PINK: "#d96a94",
    GREEN: "#43a243",
    GREY: "#85847e",
    FAINT: "#53524e",
    PEACH: "#7c4426",
    INK: "#f0efeb",
    **dict(zip(_LIGHT_RAMP, _DARK_RAMP, strict=True)),
}
CATEGORIES = (ACCENT, ORANGE, TEAL, VIOLET, AMBER, PINK, GREEN, RED, GREY, INK)
# From next to nothing to much; in both themes the lowest is near the ground's colour.
SCALE = [[i / (len(_LIGHT_RAMP) - 1), color] for i, color in enumerate(_LIGHT_RAMP)]


def shade(fraction: float) -> str:
    """A colour of the scale that can be told from the ground.

    Args:
        fraction: 0 to 1.
    """
    usable = _LIGHT_RAMP[1:]
    return usable[min(len(usable) - 1, int(fraction * len(usable)))]


def styled(
    figure: go.Figure, *, x: str = "", y: str = "", legend: bool = False, **layout: object
) -> go.Figure:
    """The figure with its axes named, and without what the page says in its own words."""
    figure.update_layout(
        title=None,
        width=None,
        showlegend=legend,
        plot_bgcolor="rgba(0,0,0,0)",
        paper_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "title": None},
        **layout,
    )
    # Optuna has a trace for infeasible trials, which are none.
    figure.data = [t for t in figure.data if t.type != "scatter" or t.x is None or len(t.x)]
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    if x:
        figure.update_xaxes(title={"text": x, "standoff": 8})
    if y:
        figure.update_yaxes(title={"text": y, "standoff": 8})
    return figure


def focus(values: Sequence[float]) -> list[float] | None:
    """A range for an axis that leaves out a few far-off low values; None where none is far off."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 8:
        return None
    least, low, high = min(finite), float(np.percentile(finite, 10)), max(finite)
    if high - least < 2 * (high - low) or high == low:
        return None
    margin = 0.08 * (high - low)
    return [round(low - 3 * margin, 6), round(high + margin, 6)]


def around(values: Sequence[float]) -> list[float]:
    """A range for an axis that shows all of them; a single one would have 1 to either side."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.01 * abs(high) or 1.0
    return [round(low - margin, 6), round(high + margin, 6)]
