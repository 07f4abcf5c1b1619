"""The third section: what the winners have learned, and what they get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from search import results
from search.report import images, page, training_figures, winner_figures
from search.report.bars import name_of
from search.report.page import Html
from search.report.source import Run, Winner
from search.winners.pictures import MISCLASSIFIED

_MOST_WITH_IMAGES = 12  # winners: each adds 0.2 MB to the page, of large images 1 MB
_NO_FILE = "the file is missing or not what was written. The run's own command makes it again"


def parts(run: Run) -> list[Html]:
    if not run.winners:
        return [page.note("Nothing has been retrained and measured yet.")]
    first, *others = run.winners
    made = [page.paragraph(f"Of {name_of(first, run)}. {_origin(first)}"), *_whole(run, first)]
    made += [
        page.folded(
            f"{name_of(winner, run)}: test accuracy {winner['test']['mean']['accuracy']:.4f}",
            _whole(run, winner) if rank <= _MOST_WITH_IMAGES else _of_one(run, winner),
        )
        for rank, winner in enumerate(others, 2)
    ]
    return made


def _whole(run: Run, winner: Winner) -> list[Html]:
    pictures = run.pictures(winner)
    return [*_of_one(run, winner), *_images(run, pictures), *_learned(pictures)]


def _origin(winner: Winner) -> str:
    return f"Begun from {winner['weights']}." if winner["weights"] else ""


def _of_one(run: Run, winner: Winner) -> list[Html]:
    predictions = run.predictions(winner)
    made = _training(run, winner, predictions)
    names = run.metrics["dataset"]["class_names"] if run.metrics else []
    shares = winner_figures.confusion_shares(
        [seed["test"]["confusion_matrix"] for seed in winner["seeds"]]
    )
    confused = ", ".join(
        f"{true} as {said} ({share:.1%})"
        for true, said, share in winner_figures.most_confused(shares, names)
    )
    size = min(900, max(380, 150 + 34 * len(names)))
    made.append(
        page.plot(
            "Confusion matrix",
            winner_figures.confusion_figure(shares, names),
            "Percent of each class's test images, over all seeds. "
            + (f"The commonest errors: {confused}." if confused else "No errors."),
            height=size,
            least_width=min(size, 560),
        )
    )
    num_seeds = len(winner["seeds"])
    seeds = "one seed" if num_seeds == 1 else f"mean over {num_seeds} seeds"
    made += [
        page.heading("By class", f"On the test set, {seeds}."),
        page.table(("class", "precision", "recall", "F1", "images"), _classes(winner, names)),
    ]
    if not predictions:
        return [*made, page.note(f"No ROC curves and no calibration: {_NO_FILE}.")]
    probabilities, labels = predictions["probabilities"], predictions["labels"]
    bins, error = winner_figures.calibration(probabilities, labels)
    area = winner["seeds"][0]["test"]["roc_auc"]
    curves = page.plot(
        "ROC curves",
        winner_figures.roc_figure(probabilities, labels, names),
        f"Each class against the rest, first seed. Mean area under the curve: {area:.4f}. The "
        "axis ends where nearly all of each class are found.",
        height=400,
    )
    reliability = page.plot(
        "Calibration",
        winner_figures.calibration_figure(bins),
        f"How often the model is right (vertical) when it is so sure (horizontal), first seed; "
        f"larger dots are more images. Expected calibration error: {error:.1%}.",
        height=400,
    )
    return [*made, page.columns([curves, reliability])]


def _training(run: Run, winner: Winner, predictions: Mapping[str, np.ndarray]) -> list[Html]:
    """Curves of the search's trial; of a comparison, of the first seed's training."""
    history, whose = history_of(run, winner, predictions)
    per_report = run.epochs_per_report
    x = "epochs" if per_report else "reports"
    made = []
    for figure in ("accuracy", "loss"):
        training = training_figures.training_of(history, figure, per_report)
        if training.validation or training.train:
            title = f"{figure.capitalize()} while it trained"
            drawn = training_figures.training_figure(training, figure, x)
            made.append(page.plot(title, drawn, f"{whose} Shaded: the gap.", height=300))
    training = training_figures.training_of(history, "accuracy", per_report)
    if gaps := training_figures.gap(training):
        caption = (
            f"At the end {100 * gaps[-1]:+.1f} points. Above zero it knows its training images "
            "better than others; below, dropout or augmentation make training harder"
            + (
                ", or the averaged weights, of which validation figures are, are ahead of those of "
                "the steps, of which training figures are."
                if run.started["fixed"].get("average_weights")
                else "."
            )
        )
        title = "Training less validation accuracy"
        made.append(page.plot(title, training_figures.gap_figure(training, x), caption, height=300))
    if not made:
        return [page.note("No training curves were stored for this winner.")]
    return [page.columns(made, narrow=True)]


def history_of(
    run: Run, winner: Winner, predictions: Mapping[str, np.ndarray]
) -> tuple[dict[str, list[float]], str]:
    """A winner's training, one value a report by names such as loss and val_loss; and which
    training it is."""
    if run.is_comparison:
        name = "history_"
        found = {
            k.removeprefix(name): v.tolist() for k, v in predictions.items() if k.startswith(name)
        }
        return found, "The training of the first seed."
    trial = run.trial(winner["trial"])
    reports = results.history(trial.user_attrs) if trial else {}
    steps = sorted(reports, key=int)
    names = dict.fromkeys(name for step in steps for name in reports[step])
    history = {
        name: [reports[step][name] for step in steps]
        for name in names
        if all(name in reports[step] for step in steps)
    }
    return history, "The search's trial."


def _classes(winner: Winner, names: list[str]) -> list[tuple[Any, ...]]:
    rows = []
    for name in names:
        of = [seed["test"]["per_class"][name] for seed in winner["seeds"]]
        means = (float(np.mean([one[f] for one in of])) for f in ("precision", "recall", "f1"))
        rows.append((name, *(_bar(mean) for mean in means), f"{of[0]['support']:,}"))
    return rows


def _bar(share: float) -> Html:
    return Html(f'{share:.3f}<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>')


def _images(run: Run, pictures: Mapping[str, np.ndarray]) -> list[Html]:
    if not pictures:
        return [page.note(f"No images, filters or activations: {_NO_FILE}.")]
    names = run.metrics["dataset"]["class_names"] if run.metrics else []
    num_wrong = len(pictures["misclassified_labels"])
    made = [
        page.heading(
            "Misclassified images",
            "Predicted class, confidence, true class; the surest errors first"
            + (f" ({num_wrong} of them)." if num_wrong == MISCLASSIFIED else "."),
        ),
        images.judged(pictures, "misclassified", names),
    ]
    if not num_wrong:
        made = [page.note("No test image is misclassified.")]
    return [
        *made,
        page.heading("Predictions on sample images", "The first test images of each class."),
        images.judged(pictures, "samples", names),
    ]


def _learned(pictures: Mapping[str, np.ndarray]) -> list[Html]:
    if not pictures:
        return []
    if "filters" not in pictures:
        return [page.note("No filters of a Conv2D layer could be read from this model.")]
    num_filters, height, width = int(pictures["num_filters"]), *pictures["filters"].shape[:2]
    shown = pictures["filters"].shape[-1]
    of = f"The first {shown} of {num_filters}" if shown < num_filters else f"All {shown}"
    return [
        page.heading(
            "First-layer filters",
            f"{of} filters of the first convolution, {height}x{width} pixels, each from its lowest "
            "weight (black) to its highest (white).",
        ),
        images.filters(pictures),
        page.heading(
            "First-layer activation maps",
            f"What the first {min(shown, images.MOST_MAPS)} of these filters make of a few test "
            f"images, before normalisation and activation where those are layers of their own.",
        ),
        images.maps(pictures),
    ]
