"""What a report is made from: the study, metrics.json and evaluation/*.npz, read once.

    run = source.read(study, Path("runs/cnn"), "Which network is best?")

Nothing here needs the data set or Keras, so that a report can be made again on any machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from search import artifacts, results
from search.errors import EXIT_NOTHING_USABLE, SearchError

NAME = "report.html"
Winner = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run as it was at one moment."""

    name: str
    question: str  # the first line of the study's file
    folder: Path
    started: Mapping[str, Any]  # the study's attribute `run`
    trials: Sequence[FrozenTrial]
    metrics: Mapping[str, Any] | None = None  # None where nothing was retrained, or not yet
    seconds: float = 0.0  # in which at least one trial ran
    saved_share: float = 0.0

    @property
    def kind(self) -> str:
        """space, objective or comparison."""
        return str(self.started["fixed"]["kind"])

    @property
    def is_comparison(self) -> bool:
        return self.kind == "comparison"

    @property
    def value_name(self) -> str:
        return results.value_name(self.started)

    @property
    def winners(self) -> Sequence[Winner]:
        return self.metrics["winners"] if self.metrics else []

    @property
    def dataset(self) -> Mapping[str, Any] | None:
        return self.started.get("dataset")

    @cached_property
    def finished(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials if trial.state.is_finished()]

    @cached_property
    def complete(self) -> list[FrozenTrial]:
        """The best first; of equals, the earlier one."""
        complete = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))

    @cached_property
    def mark(self) -> str:
        """Another one where a report would show something else; 64 hexadecimal digits."""
        trials = [
            (
                trial.number,
                trial.state.name,
                trial.last_step,
                len(trial.user_attrs.get("attempts", [])),
            )
            for trial in self.trials
        ]
        shown = [self.name, self.question, dict(self.started), self.metrics, trials]
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()

    @property
    def epochs_per_report(self) -> float | None:
        """None where a report isn't counted in epochs."""
        images, epoch = (self.started.get(n) for n in ("images_per_report", "images_per_epoch"))
        return images / epoch if images and epoch else None

    def trial(self, number: int) -> FrozenTrial | None:
        return next((trial for trial in self.trials if trial.number == number), None)

    def predictions(self, winner: Winner) -> Mapping[str, np.ndarray]:
        """What search/winners/evaluation.py wrote of the first seed; empty where it is missing."""
        return self._arrays(winner["seeds"][0], "evaluation")

    def pictures(self, winner: Winner) -> Mapping[str, np.ndarray]:
        """What search/winners/pictures.py wrote of the first seed; empty where it is missing."""
        return self._arrays(winner["seeds"][0], "pictures")

    def _arrays(self, seed: Mapping[str, Any], what: str) -> Mapping[str, np.ndarray]:
        path = self.folder / str(seed.get(what, ""))
        if what not in seed or not path.is_file():
            return {}
        if artifacts.sha256(path) != seed[f"{what}_sha256"]:
            return {}
        try:
            with np.load(path) as saved:
                return dict(saved)
        except (OSError, ValueError, zipfile.BadZipFile):
            return {}


def read(study: optuna.Study, folder: Path, question: str = "") -> Run:
    """Everything that is there by now.

    Raises:
        SearchError: if no trial was started yet, or metrics.json can't be read.
    """
    started = study.user_attrs.get("run")
    if started is None:
        raise SearchError(
            f"the run of {study.study_name!r} in {folder} has not begun: there is nothing to show",
            exit_code=EXIT_NOTHING_USABLE,
        )
    trials = study.get_trials(deepcopy=False)
    return Run(
        study.study_name,
        question,
        folder,
        started,
        trials,
        _metrics(folder, study.study_name),
        results.Clock(trials).seconds,
        results.saved_share(study),
    )


def thinned(ranked: Sequence[T], most: int) -> list[T]:
    """Of more than `most` the first two thirds of so many, and a random draw of the others."""
    if len(ranked) <= most:
        return list(ranked)
    num_best = most * 2 // 3
    return [*ranked[:num_best], *random.Random(0).sample(ranked[num_best:], most - num_best)]


def left_out(num: int, most: int, what: str) -> str:
    """What `thinned` has done to so many, as a sentence; empty where it left none out."""
    if num <= most:
        return ""
    num_best = most * 2 // 3
    others = most - num_best
    return (
        f" Of {num:,} {what} the best {num_best} are drawn, and {others} others, chosen at random."
    )


def mark_of(file: Path) -> str | None:
    """The mark of what a report shows; None where there is none, or it bears none."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            head = stream.read(1000)
    except OSError:
        return None
    found = re.search(r'<meta name="made-from" content="([0-9a-f]{64})">', head)
    return found[1] if found else None


def _metrics(folder: Path, name: str) -> Mapping[str, Any] | None:
    metrics = artifacts.read_json(folder / "metrics.json")
    return metrics if metrics and metrics.get("study") == name else None
