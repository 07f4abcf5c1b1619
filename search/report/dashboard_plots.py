"""The winners' figures for Optuna's dashboard, which draws what it finds beside a study.

    notes.save_plots(study, dashboard_plots.of(source.read(study, folder)))

They are the report's own figures, each with a title, since the dashboard gives none. Its ground may
be dark and plotly's text is not, so that they bring a light one along.
"""

from __future__ import annotations

import json

import plotly.graph_objects as go

from search.report import training_figures, winner_figures, winner_section
from search.report.page import label
from search.report.source import Run, Winner

_MOST_CELLS = 400  # of a confusion matrix whose cells are named: more make it large
_MOST_CLASSES = 100  # of one that is drawn at all


def of(run: Run) -> dict[str, str]:
    """Plotly's JSON, a few kilobytes each, by names that stay: winner-1-accuracy and so on."""
    figures = {}
    for rank, winner in enumerate(run.winners, 1):
        title = f"Winner {rank}, trial {winner['trial']}"
        for name, figure in _curves(run, winner).items():
            figures[f"winner-{rank}-{name}"] = _json(figure, f"{title}: {name} while it trained")
        if figure := _confusion(run, winner):
            words = f"{title}: % of each class's test images, all seeds"
            figures[f"winner-{rank}-confusion"] = _json(figure, words)
    return figures


def _curves(run: Run, winner: Winner) -> dict[str, go.Figure]:
    predictions = run.predictions(winner) if run.is_comparison else {}
    history, _ = winner_section.history_of(run, winner, predictions)
    per_report = run.epochs_per_report
    found = {}
    for name in ("accuracy", "loss"):
        training = training_figures.training_of(history, name, per_report)
        if training.x:
            x = "epochs" if per_report else "reports"
            found[name] = training_figures.training_figure(training, name, x)
    return found


def _confusion(run: Run, winner: Winner) -> go.Figure | None:
    names = run.metrics["dataset"]["class_names"] if run.metrics else []
    if len(names) > _MOST_CLASSES:
        return None
    matrices = [seed["test"]["confusion_matrix"] for seed in winner["seeds"]]
    shares = winner_figures.confusion_shares(matrices)
    figure = winner_figures.confusion_figure(shares, names)
    if shares.size > _MOST_CELLS:
        figure.update_traces(customdata=None, hovertemplate="%{z:.1f} %<extra></extra>")
    return figure


def _json(figure: go.Figure, title: str) -> str:
    figure.update_layout(
        title={"text": label(title), "font": {"size": 15}, "x": 0.5},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 60, "r": 20, "t": 70, "b": 50},
    )
    spec = json.loads(figure.to_json())
    spec["layout"].pop("template", None)  # plotly's own is larger than all else
    return json.dumps(spec, separators=(",", ":"))
