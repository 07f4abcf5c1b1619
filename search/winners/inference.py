"""What a tested model says about images of the user's own.

rows = classify("cnn", Path("runs/cnn"), file_of_the_study, [Path("shoe.png")])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from search import artifacts
from search.errors import EXIT_NOTHING_USABLE, EXIT_USAGE, SearchError
from search.workers.pool import run_task


class Classified(NamedTuple):
    """One image's classes."""

    image: str
    classes: list[tuple[str, float]]  # name and confidence (fraction), the most likely first


def classify(
    study: str, folder: Path, study_file: Path, images: Sequence[Path], *, model: str = "winner",
    invert: bool = False,
) -> list[Classified]:  # fmt: skip
    """Let the winner, or all retrained models together, classify image files.

    Args:
        study: the name of the one that was run.
        folder: of a finished run.
        study_file: which may define layers of the model.
        images: PNG or JPEG, any size, grey or colour.
        model: "winner" (its first seed) or "ensemble" (the mean of all models' probabilities).
        invert: first make dark light and light dark.

    Raises:
        SearchError: if there is no tested model, or an image can't be read; it names the file.
    """
    for image in images:
        if not os.path.isfile(image):  # also where nobody may look
            raise SearchError(f"there is no image {str(image)!r}", exit_code=EXIT_USAGE)
    metrics = read_metrics(folder)
    if metrics["study"] != study:
        raise SearchError(
            f"the tested models in {folder} are those of study {metrics['study']!r}, not of "
            f"{study!r}",
            exit_code=EXIT_USAGE,
        )
    paths = artifacts.verified_models(metrics, folder)
    if model == "winner":
        paths = paths[:1]
    answer = run_task(
        study_file,
        {"precision": "float32"},  # a model keeps the precision it was saved with
        {
            "task": "predict",
            "models": [str(path) for path in paths],
            "images": [str(image) for image in images],
            "input_shape": metrics["dataset"]["input_shape"],
            "invert": invert,
        },
    )
    names = metrics["dataset"]["class_names"]
    return [
        Classified(str(image), sorted(zip(names, row, strict=True), key=lambda pair: -pair[1]))
        for image, row in zip(images, answer["probabilities"], strict=True)
    ]


def read_metrics(folder: Path) -> dict[str, Any]:
    """The content of a run's metrics.json.

    Raises:
        SearchError: if there is none yet, or it can't be read.
    """
    metrics = artifacts.read_json(folder / "metrics.json")
    if metrics is None:
        raise SearchError(
            f"{folder} has no tested model yet: there is no metrics.json. Search and retrain "
            "first: fmnist-search --study NAME",
            exit_code=EXIT_NOTHING_USABLE,
        )
    return dict(metrics)
