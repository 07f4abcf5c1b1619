"""What a winner does right and wrong: what its predictions on the test set are worth.

Each figure is computed by one function, as plain values, and drawn by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from search.report import theme
from search.report.page import label

BINS = 15  # of confidence
_MOST_POINTS = 150  # of a ROC curve
_MOST_CELLS_WITH_NUMBERS = 400  # of a confusion matrix


class Bin(NamedTuple):
    """Predictions of about one confidence."""

    confidence: float  # mean
    accuracy: float
    images: int


def confusion_shares(matrices: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Over all seeds, how the images of each class were classified.

    Args:
        matrices: one for each seed; rows: label, columns: prediction.

    Returns:
        (classes, classes) float; a row sums to 1, or to 0 where a class has no image.
    """
    total = np.sum([np.asarray(matrix, float) for matrix in matrices], axis=0)
    return total / np.maximum(total.sum(axis=1, keepdims=True), 1)


def confusion_figure(shares: np.ndarray, class_names: Sequence[str]) -> go.Figure:
    names = [label(name) for name in class_names]
    percent = np.round(100 * shares, 2)
    shows_numbers = shares.size <= _MOST_CELLS_WITH_NUMBERS
    figure = go.Figure(
        go.Heatmap(
            z=percent.tolist(),
            # By position: two classes of one name, and names that are numbers, stay apart.
            x=list(range(len(names))),
            y=list(range(len(names))),
            text=[[_number(cell) for cell in row] for row in percent] if shows_numbers else None,
            texttemplate="%{text}" if shows_numbers else None,
            customdata=[[f"{row} as {column}" for column in names] for row in names],
            hovertemplate="%{customdata}: %{z:.1f} %<extra></extra>",
            colorscale=theme.SCALE,
            zmin=0,
            zmax=100,
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    ticks = {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False}
    figure.update_xaxes(**ticks, tickangle=-40)
    figure.update_yaxes(**ticks, autorange="reversed")
    return theme.styled(figure, x="predicted", y="true class")


def most_confused(shares: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, str, float]]:
    """The three commonest errors: true class, predicted class, share of the true class."""
    errors = shares.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:3]
    places = [(int(at // len(errors)), int(at % len(errors))) for at in order]
    return [
        (class_names[i], class_names[j], float(errors[i, j])) for i, j in places if errors[i, j]
    ]


def roc(probabilities: np.ndarray, labels: np.ndarray, of: int) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of one class against the rest, from (0, 0) to (1, 1).

    Args:
        probabilities: (n, classes).
        labels: (n,) class numbers, `of` and others among them.
        of: the class.
    """
    from sklearn import metrics

    false, true, _ = metrics.roc_curve(labels == of, probabilities[:, of])
    if len(false) > _MOST_POINTS:
        # Evenly along both axes: most of the curve's points lie in the corner.
        along = false + true
        kept = np.unique(
            np.searchsorted(along, np.linspace(0, 2, _MOST_POINTS)).clip(0, len(along) - 1)
        )
        kept = np.unique(np.concatenate([[0], kept, [len(along) - 1]]))
        false, true = false[kept], true[kept]
    return false, true


def roc_figure(
    probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> go.Figure:
    figure = go.Figure()
    for of in np.unique(labels):
        if np.all(labels == of):
            continue
        false, true = roc(probabilities, labels, int(of))
        figure.add_scatter(
            x=[round(float(rate), 5) for rate in false],
            y=[round(float(rate), 5) for rate in true],
            name=label(class_names[of]),
            mode="lines",
            line={
                "color": theme.CATEGORIES[of % len(theme.CATEGORIES)],
                "dash": ("solid", "dash", "dot")[of // len(theme.CATEGORIES) % 3],
                "width": 1.8,
            },
            hovertemplate="%{fullData.name}: %{y:.3f} found at %{x:.3f} false<extra></extra>",
        )
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": theme.FAINT, "dash": "dot", "width": 1},
        showlegend=False,
        hoverinfo="skip",
    )
    end = _where_found(figure)
    figure.update_xaxes(range=[-0.01 * end, end])
    figure.update_yaxes(range=[0, 1.01])
    return theme.styled(figure, x="false positive rate", y="true positive rate", legend=True)


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> tuple[list[Bin], float]:
    """How often a prediction of some confidence is right.

    Args:
        probabilities: (n, classes).
        labels: (n,) class numbers.

    Returns:
        Bins of equal width that hold images; and the expected calibration error: the mean distance
        of confidence and accuracy, weighted by images (Guo et al. 2017, fraction).
    """
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels
    at = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        Bin(
            float(confidence[at == i].mean()), float(is_right[at == i].mean()), int((at == i).sum())
        )
        for i in np.unique(at)
    ]
    error = sum(one.images * abs(one.confidence - one.accuracy) for one in bins) / len(labels)
    return bins, float(error)


def calibration_figure(bins: Sequence[Bin]) -> go.Figure:
    most = max(one.images for one in bins)
    figure = go.Figure(
        [
            go.Scatter(
                x=[0, 1],
                y=[0, 1],
                mode="lines",
                line={"color": theme.FAINT, "dash": "dot", "width": 1},
                hoverinfo="skip",
            ),
            go.Scatter(
                x=[round(one.confidence, 4) for one in bins],
                y=[round(one.accuracy, 4) for one in bins],
                mode="lines+markers",
                line={"color": theme.ACCENT, "width": 2},
                marker={"size": [5 + 13 * (one.images / most) ** 0.5 for one in bins]},
                text=[f"{one.images:,} images" for one in bins],
                hovertemplate="confidence %{x:.1%}, right %{y:.1%}<br>%{text}<extra></extra>",
            ),
        ]
    )
    lowest = max(0.0, min(one.confidence for one in bins) - 0.05)
    figure.update_xaxes(tickformat=".0%", range=[lowest, 1.02])
    figure.update_yaxes(tickformat=".0%", range=[0, 1.04])
    return theme.styled(figure, x="confidence", y="right")


def _where_found(figure: go.Figure) -> float:
    """The least of some false positive rates at which 98 % of each class are found, or 1."""
    for end in (0.05, 0.1, 0.2, 0.5):
        reached = [
            np.interp(end, trace.x, trace.y) for trace in figure.data if trace.showlegend is None
        ]
        if min(reached, default=0.0) >= 0.98:
            return end
    return 1.0


def _number(percent: float) -> str:
    """A cell's text: empty where there is nothing to read."""
    return "" if percent < 0.05 else f"{percent:.0f}" if percent >= 10 else f"{percent:.1f}"
