"""trial -> hyperparameters -> model -> training -> value, in a worker."""

from __future__ import annotations

import dataclasses
import math
import traceback
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np

from search import folders
from search.data import datasets
from search.training import averaging, backend, complexity, limits, training
from search.training.checkpoints import Checkpoints
from search.training.hypermodel import (
    Images,
    Space,
    check_can_be_loaded,
    ends_in_float32,
    trains_itself,
    value_of_fit,
)
from search.training.hyperparameters import ReplayedHyperParameters, TrialHyperParameters, describe
from search.training.training_data import Arrays, TrainingData
from search.workers.protocol import Draft, Message, RemoteTrial, TrialEnded
from studies.study import Study


class Objective:
    """The objective of a study with a space, and what else is done with its points.

    Args:
        study: with a space.
        settings: of the run, as the coordinator resolved them.
    """

    def __init__(self, study: Study, settings: Message):
        self._study = study
        self._settings = settings
        self.precision = backend.use_precision(settings["precision"])

    def _begin(self, seed: int) -> None:
        """Set what a model depends on beside its point: the names that Keras gives to layers (it
        counts those of other models, too), precision, which it then forgets, and random numbers."""
        keras.utils.clear_session(free_memory=False)
        backend.use_precision(self.precision)
        keras.utils.set_random_seed(seed)

    @cached_property
    def _data(self) -> TrainingData:
        folder = Path(self._settings["folder"]) / folders.FEATURES
        return TrainingData(self._settings["dataset"], folder, self._settings["cache_size"])

    @cached_property
    def _dataset(self) -> datasets.Dataset:
        return datasets.find(self._settings["dataset"])

    def describe(self) -> Message:
        """The space, and the study's known points made whole.

        Raises:
            ValueError: if the space's default point, or a known one, can't be used.
        """
        self._begin(0)
        hp = keras_tuner.HyperParameters()
        space = self._space(self._search_images)
        model = space.build(hp)
        described = describe(hp, space.build)
        check_can_be_loaded(model)
        if self._settings["precision"] == "auto" and not ends_in_float32(model):
            # A space that wasn't written for mixed precision ends in bfloat16, which has so few
            # digits that probabilities tie.
            self.precision = backend.use_precision("float32")
        return {
            "space": described,
            "known_points": [self._complete(space, point) for point in self._study.known_points],
            "precision": self.precision,
            "num_reports": self._num_reports,
            "images_per_report": self._images_per_report,
            "images_per_epoch": len(self._data.at.train),
            "num_images": len(self._data.everywhere),
            "num_monitored": len(self._data.at.monitor),
            "pretrained": [self._is_pretrained(point) for point in self._study.known_points],
            "own_fit": trains_itself(self._study.space),
        }

    def trial(self, trial: RemoteTrial, message: Message) -> Message:
        """Train one point, report as it goes, and return its value on all validation images."""
        space = self._space(self._search_images)
        if (num_drafts := message.get("drafts", 1)) > 1:
            drafts = [trial.draft(number) for number in range(num_drafts)]
            min(drafts, key=lambda draft: self._cost(space, draft)).take()
        self._begin(message["seed"])
        hp = TrialHyperParameters(trial)
        try:
            model = self._built(space, hp)
        except ValueError as error:  # the default point is a model, as `describe` has seen
            if _is_from_here(error):  # what a suggestion was refused for is a mistake in the code
                raise
            return {"outcome": "invalid", "reason": f"it can't be built: {error}"}
        try:
            check_can_be_loaded(model)
        except ValueError as error:  # another branch of the space than the one described
            return {"outcome": "invalid", "reason": str(error)}
        # Now, since a trial that is pruned is finished before this function is.
        trial.set_user_attr("parameters", complexity.parameters(model))
        trial.set_user_attr("flops", complexity.flops(model))
        if self._settings["weights"]:
            trial.set_user_attr("pretrained", space.is_pretrained(hp))
        batch_size = self._batch_size(hp)
        trial.set_user_attr("memory", complexity.training_bytes(model, batch_size))
        if too_much := limits.excess(model, batch_size, self._study):
            return {"outcome": "invalid", "reason": too_much}
        own_fit = trains_itself(self._study.space)
        report = training.Report(trial, self._images_per_report, must_have_it=not own_fit)
        value = None
        if own_fit:
            arrays = self._data.arrays(self._data.at.train)
            returned = self._let_fit(space, hp, model, arrays, self._num_reports, [report])
            if not (report.diverged or report.pruned):
                value = value_of_fit(returned, report.values)
        else:
            plan = training.Plan(
                len(self._data.at.train),
                self._images_per_report,
                self._num_reports,
                batch_size,
                message["seed"],
            )
            value = self._fit(space, hp, model, plan, report, trial, message)
        if report.diverged:
            return {"outcome": "diverged", "reason": report.diverged}
        if report.pruned:
            return {"outcome": "pruned"}
        if value is None:
            value = training.accuracy(model, self._data.arrays(self._data.at.val))
        if not math.isfinite(value):
            return {"outcome": "diverged", "reason": f"the value was {value}"}
        return {"outcome": "complete", "value": value}

    def _batch_size(self, hp: keras_tuner.HyperParameters) -> int:
        return int(hp.values.get("batch_size", self._settings["batch_size"]))

    def _cost(self, space: Space, draft: Draft) -> float:
        """Operations for one image; infinite where the point can't be trained."""
        self._begin(0)
        hp = TrialHyperParameters(draft)
        try:
            model = self._built(space, hp)
        except TrialEnded:
            raise
        except Exception:  # if all drafts fail, the first one's trial says how
            return math.inf
        batch_size = self._batch_size(hp)
        return (
            math.inf if limits.excess(model, batch_size, self._study) else complexity.flops(model)
        )

    def _built(self, space: Space, hp: keras_tuner.HyperParameters) -> keras.Model:
        """The point's model, ready to be trained as the study says."""
        model = space.build(hp)
        if self._settings["average_weights"] and not trains_itself(self._study.space):
            averaging.average_weights(model)
        return model

    def _fit(
        self,
        space: Space,
        hp: TrialHyperParameters,
        model: keras.Model,
        plan: training.Plan,
        report: training.Report,
        trial: RemoteTrial,
        message: Message,
    ) -> float | None:
        """Train as the product does; the model is left with its best weights. Their accuracy on
        all validation images, unless the trial ended early, or the model differs from what it says
        of stored activations: then it is to be asked itself."""
        best_weights = keras.callbacks.EarlyStopping(
            training.MONITOR, mode="max", patience=plan.num_reports, restore_best_weights=True
        )
        with self._data.feeding(model, lambda note: trial.progress(note=note)) as feed:
            trial.set_user_attr("cached", feed.cached)
            if feed.about:
                trial.set_user_attr("trained_on", feed.about)
            training.train(
                feed.model,
                self._data.rows(feed.inputs, self._data.at.train),
                plan,
                validation_data=self._data.rows(feed.inputs, self._data.at.monitor),
                callbacks=[*space.callbacks(hp), best_weights, report],
                checkpoints=self._checkpoints(message, hp, plan, feed.inputs),
                on_resume=trial.resume,
            )
            if report.diverged or report.pruned:
                return None
            if feed.holds():
                return training.accuracy(
                    feed.model, self._data.rows(feed.inputs, self._data.at.val)
                )
        coarse = "too coarse for what it became: its value is from images"
        trial.set_user_attr("trained_on", f"{feed.about}, {coarse}")
        return None

    def _checkpoints(
        self,
        message: Message,
        hp: keras_tuner.HyperParameters,
        plan: training.Plan,
        inputs: np.ndarray,
    ) -> Checkpoints | None:
        """Of the training that a message asks for, where it says in which file; on these inputs."""
        if not message.get("checkpoint"):
            return None
        asked = {name: message.get(name) for name in ("task", "epochs", "share", "validated")}
        identity = {
            **asked,
            "params": hp.values,
            "plan": dataclasses.asdict(plan),
            "precision": self.precision,
            "dataset": self._settings["dataset"],
            "weights": self._settings["weights"],
            "inputs": str(inputs.dtype),
        }
        return Checkpoints(Path(message["checkpoint"]), identity)

    def _let_fit(
        self,
        space: Space,
        hp: keras_tuner.HyperParameters,
        model: keras.Model,
        train: Arrays,
        epochs: int,
        callbacks: list[keras.callbacks.Callback],
    ) -> Any:
        """Let the space train, in whole epochs; what its fit returns.

        It may unpack validation_data, so it gets some in a retraining as well, though these images
        are then among those that it trains on: nothing is chosen by them.
        """
        return space.fit(
            hp,
            model,
            (train[0], training.as_loss_wants(model, train[1])),
            validation_data=self._validation_data(model),
            epochs=epochs,
            callbacks=callbacks,
        )

    def _validation_data(self, model: keras.Model) -> Arrays:
        x, y = self._data.arrays(self._data.at.val)
        return x, training.as_loss_wants(model, y)

    @property
    def _images_per_report(self) -> int:
        """A whole epoch where the space trains itself, as Keras's own callbacks count; else what
        the run says, but an epoch at most, so that a small data set isn't trained for many."""
        epoch = len(self._data.at.train)
        if trains_itself(self._study.space):
            return epoch
        trial = math.ceil(min(1.0, self._settings["epochs"]) * epoch)
        return min(self._settings["images_per_report"], trial)

    @property
    def _num_reports(self) -> int:
        images = self._settings["epochs"] * len(self._data.at.train)
        return max(1, round(images / self._images_per_report))

    @property
    def _search_images(self) -> int:
        return self._num_reports * self._images_per_report

    def _space(self, total_images: int, images: Images | None = None) -> Space:
        if images is None:
            data = self._dataset
            images = Images(data.name, data.input_shape, data.num_classes)
        return Space(self._study.space, images, total_images, self._settings["weights"])

    def _is_pretrained(self, point: dict[str, Any]) -> bool:
        return self._space(1).is_pretrained(ReplayedHyperParameters(point, complete=True))

    def _complete(self, space: Space, point: dict[str, Any]) -> dict[str, Any]:
        self._begin(0)
        hp = ReplayedHyperParameters(point, complete=True)
        try:
            space.build(hp)
            space.callbacks(hp)
            if not trains_itself(self._study.space):  # what its fit reads is not known yet
                hp.check_all_read()
        except ValueError as error:
            raise ValueError(f"known_points of study {self._study.name!r}: {error}") from None
        return dict(hp.values)


def _is_from_here(error: Exception) -> bool:
    """Whether this project raised it, and not Keras or the space."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
