"""What a worker does with a task: trial -> hyperparameters -> model -> training -> value."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_tuner

from search import artifacts, backend, datasets, training
from search.hyperparameters import ReplayedHyperParameters, TrialHyperParameters, describe
from search.protocol import Message, RemoteTrial
from studies.study import Study


class KerasTasks:
    """The tasks of a study with a space. Holds the training data; never sees the test set.

    Args:
        study: with a space.
        settings: of the run, as the coordinator resolved them.
    """

    def __init__(self, study: Study, settings: Message):
        self._study = study
        self._settings = settings
        self._dataset = datasets.find(settings["dataset"])
        self.precision = backend.use_precision(settings["precision"])
        self._split = datasets.load_split(settings["dataset"])

    def describe(self) -> Message:
        """The space, and the study's known points made whole."""
        hp = keras_tuner.HyperParameters()
        space = self._space(self._search_images)
        _build(space, hp)
        points = [self._complete(space, point) for point in self._study.known_points]
        return {
            "space": describe(hp),
            "known_points": points,
            "precision": self.precision,
            "num_reports": self._num_reports,
        }

    def trial(self, trial: RemoteTrial, message: Message) -> Message:
        """Train one point, report as it goes, and return its value on all validation images."""
        keras.utils.set_random_seed(message["seed"])
        space = self._space(self._search_images)
        hp = TrialHyperParameters(trial)
        model = _build(space, hp)
        # Now, since a trial that is pruned is finished before this function is.
        trial.set_user_attr("parameters", model.count_params())
        batch_size = hp.values.get("batch_size", self._study.batch_size)
        plan = self._plan(len(self._split.x_train), self._num_reports, batch_size, message["seed"])
        report = training.Report(trial, plan.images_per_report)
        best_weights = keras.callbacks.EarlyStopping(
            training.MONITOR, mode="max", patience=plan.num_reports, restore_best_weights=True
        )
        training.train(
            model,
            (self._split.x_train, self._split.y_train),
            plan,
            validation_data=(self._split.x_monitor, self._split.y_monitor),
            callbacks=[*_callbacks(space, hp), best_weights, report],
        )
        if report.diverged:
            return {"outcome": "diverged", "reason": report.diverged}
        if report.pruned:
            return {"outcome": "pruned"}
        value = training.accuracy(model, (self._split.x_val, self._split.y_val))
        return {"outcome": "complete", "value": value}

    def retrain(self, tell: Callable[..., None], message: Message) -> Message:
        """Train a stored point on training and validation data together, and save the model.

        Args:
            message: params, seed, epochs (the schedule's length, in passes over the data),
                share (of it that is trained, 0 to 1) and path of the model.
        """
        keras.utils.set_random_seed(message["seed"])
        x, y = datasets.load_train(self._settings["dataset"])
        total = round(message["epochs"] * len(x))
        space = self._space(total)
        hp = ReplayedHyperParameters(message["params"])
        model = _build(space, hp)
        hp.check_all_read()
        num_reports = max(1, round(total * message["share"] / self._settings["images_per_report"]))
        batch_size = hp.values.get("batch_size", self._study.batch_size)
        plan = self._plan(len(x), num_reports, batch_size, message["seed"])
        history = training.train(
            model,
            (x, y),
            plan,
            validation_data=None,
            callbacks=[
                *_callbacks(space, hp),
                training.Progress(tell, plan),
                keras.callbacks.TerminateOnNaN(),
            ],
        )
        if not math.isfinite(history["loss"][-1]):
            return {"outcome": "diverged", "reason": f"loss was {history['loss'][-1]}"}
        path = Path(message["path"])
        with artifacts.write_atomically(path) as beside:
            model.save(beside)
        return {
            "outcome": "complete",
            "sha256": artifacts.sha256(path),
            "history": history,
            "parameters": model.count_params(),
            "epochs": num_reports * plan.steps_per_report * batch_size / len(x),
        }

    def evaluate(self, tell: Callable[..., None], message: Message) -> Message:
        """Measure a saved winner on the test set."""
        from search import evaluation

        path = Path(message["path"])
        evaluation.predict_test(
            Path(message["model"]), self._settings["dataset"], path, message["history"]
        )
        return {"outcome": "complete", "sha256": artifacts.sha256(path)}

    @property
    def _search_images(self) -> int:
        return self._num_reports * self._settings["images_per_report"]

    @property
    def _num_reports(self) -> int:
        images = self._settings["epochs"] * len(self._split.x_train)
        return max(1, round(images / self._settings["images_per_report"]))

    def _plan(self, num_images: int, num_reports: int, batch_size: int, seed: int) -> training.Plan:
        return training.Plan(
            num_images, self._settings["images_per_report"], num_reports, batch_size, seed
        )

    def _space(self, total_images: int) -> Any:
        """The study's HyperModel; a class is made for this data set and this length of training."""
        space = self._study.space
        if not inspect.isclass(space):
            return space
        known = {
            "input_shape": self._dataset.input_shape,
            "num_classes": self._dataset.num_classes,
            "total_images": total_images,
        }
        taken = inspect.signature(space).parameters
        return space(**{name: value for name, value in known.items() if name in taken})

    def _complete(self, space: Any, point: dict[str, Any]) -> dict[str, Any]:
        hp = ReplayedHyperParameters(point, complete=True)
        try:
            _build(space, hp)
            hp.check_all_read()
        except ValueError as error:
            raise ValueError(f"known_points of study {self._study.name!r}: {error}") from None
        return dict(hp.values)


def _build(space: Any, hp: keras_tuner.HyperParameters) -> keras.Model:
    model = space.build(hp) if isinstance(space, keras_tuner.HyperModel) else space(hp)
    # Which of Keras's accuracies the name means, it decides by the shape of the labels.
    names = model.get_compile_config().get("metrics") or []
    if "accuracy" not in names:
        raise ValueError(
            f"A space compiles its models with metrics=['accuracy']. Received: metrics={names}"
        )
    return model


def _callbacks(space: Any, hp: keras_tuner.HyperParameters) -> list[keras.callbacks.Callback]:
    """A space may bring callbacks of its own: a method `callbacks(hp)`, patience in epochs."""
    return space.callbacks(hp) if hasattr(space, "callbacks") else []
