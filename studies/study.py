"""What a study says: a frozen dataclass that each file of this folder (or one of yours) fills in.

    study = Study(name="mine", space=MyHyperModel, epochs=5)

The docstring of the file has four headings: Goal, Scientific (what is compared), Nuisance (what is
tuned so that the comparison is fair), Fixed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Also the name of a folder and of an Optuna study: nothing that a shell or a path could misread.
NAME_RULE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
SAMPLERS = ("tpe", "random", "qmc")
PRUNERS = ("asha", "median", "none")


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question and all that is needed to answer it.

    Raises:
        ValueError: if a field is outside its rule; the message gives the rule and the value.
    """

    name: str
    # A HyperModel (class or instance) or a function build(hp). A class is called with those of
    # input_shape, num_classes (or classes), total_images (images seen in a whole training) and
    # weights (the file, or "none") that it takes. Or text that says where it is: "file.py:name",
    # relative to the study's own file, or "module:name".
    space: Any = None
    # Instead of a space: a function of an Optuna trial that returns the value to maximise. A trial
    # that is too far behind at a report ends there, whether or not it asks `should_prune`.
    # Nothing is retrained afterwards.
    objective: Callable[[Any], float] | None = None
    dataset: str | Path = "fashion_mnist"  # or a path, relative to the study's own file
    trials: int = 100
    epochs: float = 5  # passes over the training part, at most, for one trial
    final_epochs: float | None = None  # of a winner's retraining; None: as many as served it best
    images_per_report: int = 12_800  # a multiple of every batch size up to 512
    batch_size: int = 128  # where the space has no hyperparameter of that name
    # Validation, and the trained model, are of the moving average of the weights over the last
    # hundred steps or so, instead of those of the last one. Not where the space trains itself.
    average_weights: bool = True
    sampler: str = "tpe"
    pruner: str = "asha"
    first_rung: int = 1  # reports before a trial can be pruned
    reduction_factor: int = 3  # one trial in so many goes on
    # Tried first; pruned only where behind like any other and where, besides, a complete trial was
    # ahead at the same report. The space's defaults fill what a point leaves out.
    known_points: tuple[dict[str, Any], ...] = ()
    # Nothing is searched: each known point is trained on the training part, over several seeds,
    # with the validation part watched at each report, and measured on the test set.
    compare: bool = False
    # Of a comparison, for each known point: what was published of it, fractions and nats by names
    # such as train_accuracy, val_loss, test_f1; empty where nothing was.
    published: tuple[Mapping[str, float], ...] = ()
    # Pretrained ones, for a space that takes them: "imagenet", "none" for random ones, or a file,
    # relative to the study's own.
    weights: str | Path | None = None
    # Points with more are refused before they cost anything.
    max_parameters: int | None = None
    max_flops: int | None = None  # of one image through the model
    max_memory: int | None = None  # bytes, of one step of its training, about

    def __post_init__(self) -> None:
        if not NAME_RULE.fullmatch(self.name):
            raise ValueError(
                f"A study's name is 1 to 64 of A-Z a-z 0-9 . _ - without a leading dot. "
                f"Received: name={self.name!r}"
            )
        if (self.space is None) == (self.objective is None):
            raise ValueError(
                "A study has either a space or an objective. "
                f"Received: space={self.space!r}, objective={self.objective!r}"
            )
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is one of {SAMPLERS}. Received: {self.sampler!r}")
        if self.pruner not in PRUNERS:
            raise ValueError(f"pruner is one of {PRUNERS}. Received: {self.pruner!r}")
        for field in ("dataset", "weights"):
            value = getattr(self, field)
            if not isinstance(value, str | Path) and (field, value) != ("weights", None):
                raise ValueError(f"{field} is a name or a path. Received: {value!r}")
            if isinstance(value, Path):  # workers tell of the study in JSON
                object.__setattr__(self, field, str(value))
        for field in ("trials", "images_per_report", "batch_size", "first_rung"):
            if not isinstance(value := getattr(self, field), int) or value < 1:
                raise ValueError(f"{field} is a whole number of at least 1. Received: {value!r}")
        if not isinstance(self.average_weights, bool):
            raise ValueError(
                f"average_weights is True or False. Received: {self.average_weights!r}"
            )
        for field in ("max_parameters", "max_flops", "max_memory"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field} is a whole number of at least 1. Received: {value!r}")
        if not isinstance(self.known_points, tuple | list) or not all(
            isinstance(point, Mapping) for point in self.known_points
        ):
            raise ValueError(
                "known_points is a tuple of dictionaries, each with a point's values by name; of "
                f"one point ({{...}},). Received: {self.known_points!r}"
            )
        if self.compare and (self.space is None or not self.known_points):
            raise ValueError(
                "A study that compares has a space and known_points. "
                f"Received: space={self.space!r}, known_points={self.known_points!r}"
            )
        if len(self.published) not in (0, len(self.known_points)):
            raise ValueError(
                "published has an entry for each of the known_points. "
                f"Received: {len(self.published)} for {len(self.known_points)}"
            )
        for name in {name for figures in self.published for name in figures}:
            part, _, figure = name.partition("_")
            if part not in ("train", "val", "test") or not figure:
                raise ValueError(
                    "published names a part's figure, such as train_loss, val_accuracy, test_f1. "
                    f"Received: {name!r}"
                )
        if not isinstance(self.reduction_factor, int) or self.reduction_factor < 2:
            raise ValueError(
                "reduction_factor is a whole number of at least 2. "
                f"Received: {self.reduction_factor!r}"
            )
        for field in ("epochs", "final_epochs"):
            value = getattr(self, field)
            if field == "final_epochs" and value is None:
                continue
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"{field} is a number above 0. Received: {value!r}")
