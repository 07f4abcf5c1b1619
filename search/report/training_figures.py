"""A winner while it trained: figures on training and validation data, and the gap between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from search.report import theme


class Training(NamedTuple):
    """One figure of a training, report by report."""

    x: list[float]  # epochs, or reports
    train: list[float]
    validation: list[float]


def training_of(
    history: Mapping[str, Sequence[float]], figure: str, per_report: float | None
) -> Training:
    """A figure on training and validation data, as far as both were measured.

    Args:
        history: one value a report, by names such as loss and val_loss.
        figure: "loss" or "accuracy".
        per_report: epochs, or None.
    """
    train, validation = (
        [round(float(value), 5) for value in history.get(name, [])]
        for name in (figure, f"val_{figure}")
    )
    reports = range(1, max(len(train), len(validation)) + 1)
    return Training(
        [round(report * (per_report or 1.0), 3) for report in reports], train, validation
    )


def gap(training: Training) -> list[float]:
    """Training less validation, at each report that has both."""
    both = zip(training.train, training.validation, strict=False)
    return [round(train - validation, 5) for train, validation in both]


def training_figure(training: Training, name: str, x: str) -> go.Figure:
    """Both curves, with the gap between them shaded."""
    figure = go.Figure()
    for values, part, color in (
        (training.train, "training", theme.ORANGE),
        (training.validation, "validation", theme.ACCENT),
    ):
        if values:
            figure.add_scatter(
                x=training.x[: len(values)],
                y=values,
                name=part,
                mode="lines+markers",
                line={"color": color, "width": 2},
                marker={"size": 4},
                fill="tonexty" if part == "validation" and training.train else None,
                fillcolor="rgba(128,128,128,0.14)",
                hovertemplate=f"{part}: %{{y:.4f}} at %{{x}}<extra></extra>",
            )
    return theme.styled(figure, x=x, y=name, legend=True)


def gap_figure(training: Training, x: str) -> go.Figure:
    gaps = [100 * value for value in gap(training)]
    figure = go.Figure(
        go.Bar(
            x=training.x[: len(gaps)],
            y=gaps,
            marker={"color": [theme.ORANGE if value > 0 else theme.ACCENT for value in gaps]},
            hovertemplate="%{y:+.2f} points at %{x}<extra></extra>",
        )
    )
    return theme.styled(figure, x=x, y="percentage points")
