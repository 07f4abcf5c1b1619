"""What a worker does with a task: trial -> hyperparameters -> model -> training -> value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np

from search import artifacts, backend, complexity, datasets, folders, limits, training
from search.checkpoints import Checkpoints
from search.hypermodel import (
    Images,
    Space,
    check_can_be_loaded,
    ends_in_float32,
    trains_itself,
    value_of_fit,
)
from search.hyperparameters import ReplayedHyperParameters, TrialHyperParameters, describe
from search.protocol import Message, RemoteTrial
from search.training_data import Arrays, TrainingData
from studies.study import Study


class KerasTasks:
    """The tasks of a study with a space. Only `evaluate` sees the test set.

    Args:
        study: with a space.
        settings: of the run, as the coordinator resolved them.
    """

    def __init__(self, study: Study, settings: Message):
        self._study = study
        self._settings = settings
        self.precision = backend.use_precision(settings["precision"])

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
        hp = keras_tuner.HyperParameters()
        space = self._space(self._search_images)
        model = space.build(hp)
        described = describe(hp)
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
            "pretrained": [self._is_pretrained(point) for point in self._study.known_points],
        }

    def trial(self, trial: RemoteTrial, message: Message) -> Message:
        """Train one point, report as it goes, and return its value on all validation images."""
        keras.utils.set_random_seed(message["seed"])
        space = self._space(self._search_images)
        hp = TrialHyperParameters(trial)
        model = space.build(hp)
        try:
            check_can_be_loaded(model)
        except ValueError as error:  # another branch of the space than the one described
            return {"outcome": "invalid", "reason": str(error)}
        # Now, since a trial that is pruned is finished before this function is.
        trial.set_user_attr("parameters", complexity.parameters(model))
        trial.set_user_attr("flops", complexity.flops(model))
        batch_size = hp.values.get("batch_size", self._study.batch_size)
        if too_much := limits.excess(model, batch_size, self._study):
            return {"outcome": "invalid", "reason": too_much}
        report = training.Report(trial, self._images_per_report)
        value = None
        if trains_itself(self._study.space):
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
            checkpoints = self._checkpoints(message, hp, plan)
            if checkpoints and checkpoints.reports:
                trial.resume(checkpoints.reports)
            value = self._fit(space, hp, model, plan, report, trial.progress, checkpoints)
        if report.diverged:
            return {"outcome": "diverged", "reason": report.diverged}
        if report.pruned:
            return {"outcome": "pruned"}
        if value is None:
            value = training.accuracy(model, self._data.arrays(self._data.at.val))
        if not math.isfinite(value):
            return {"outcome": "diverged", "reason": f"the value was {value}"}
        return {"outcome": "complete", "value": value}

    def retrain(self, tell: Callable[..., None], message: Message) -> Message:
        """Train a stored point on training and validation data together, and save the model.

        Args:
            message: params, seed, epochs (the schedule's length, in passes over the data),
                share (of it that is trained, 0 to 1), validated (train on the training part alone,
                as long as suits the point, and watch the validation part), path of the model, and
                perhaps checkpoint, a file.
        """
        keras.utils.set_random_seed(message["seed"])
        validated = message["validated"]
        chosen = self._data.at.train if validated else self._data.everywhere
        hp = ReplayedHyperParameters(message["params"])
        epochs = self._epochs(hp, message)
        space = self._space(round(epochs * len(chosen)))
        model = space.build(hp)
        callbacks = space.callbacks(hp)
        figures = {}
        if trains_itself(self._study.space):
            num_reports = max(1, round(epochs * message["share"]))
            progress = training.Progress(tell, num_reports, len(chosen))
            guards = [progress, keras.callbacks.TerminateOnNaN()]
            self._let_fit(space, hp, model, self._data.arrays(chosen), num_reports, guards)
            trained: float = len(progress.history.get("loss", [])) or num_reports
            hp.check_all_read()
            if validated:
                figures = training.measured(model, self._data.arrays(self._data.at.val))
        else:
            hp.check_all_read()
            per_report = self._images_per_report
            plan = self._final_plan(hp, len(chosen), per_report, epochs * message["share"], message)
            progress = training.Progress(tell, plan.num_reports, plan.images_per_report)
            with self._data.feeding(model, lambda note: tell(note=note)) as (part, inputs):
                training.train(
                    part,
                    self._data.rows(inputs, chosen),
                    plan,
                    validation_data=self._data.rows(inputs, self._data.at.val)
                    if validated
                    else None,
                    callbacks=[*callbacks, progress, keras.callbacks.TerminateOnNaN()],
                    checkpoints=self._checkpoints(message, hp, plan),
                )
                if validated:
                    figures = training.measured(part, self._data.rows(inputs, self._data.at.val))
            num_reports = len(progress.history.get("loss", []))
            trained = num_reports * plan.steps_per_report * plan.batch_size / len(chosen)
        last_loss = progress.history.get("loss", [0.0])[-1]
        if not math.isfinite(last_loss):
            return {"outcome": "diverged", "reason": f"loss was {last_loss}"}
        space.before_saving(model)
        path = Path(message["path"])
        with artifacts.write_atomically(path) as beside:
            model.save(beside)
        kept = _kept_report(callbacks)
        return {
            "outcome": "complete",
            "sha256": artifacts.sha256(path),
            "history": progress.history,
            "parameters": model.count_params(),
            "epochs": trained,
            "flops": complexity.flops(model),
            "kept_epochs": trained if kept < 0 else trained * (kept + 1) / num_reports,
            "validation": figures,
            "train": {
                name: values[kept]
                for name, values in progress.history.items()
                if validated and not name.startswith(("val_", "learning_rate"))
            },
        }

    def evaluate(self, tell: Callable[..., None], message: Message) -> Message:
        """Measure a saved winner on the test set.

        Args:
            message: model; history of its training; path of the predictions, and of the pictures
                or None.
        """
        from search import evaluation

        path, pictures = Path(message["path"]), message["pictures"]
        evaluation.predict_test(
            Path(message["model"]),
            self._settings["dataset"],
            path,
            message["history"],
            pictures_path=pictures,
        )
        return {
            "outcome": "complete",
            "sha256": artifacts.sha256(path),
            "pictures_sha256": pictures and artifacts.sha256(pictures),
        }

    def predict(self, tell: Callable[..., None], message: Message) -> Message:
        """Class probabilities of image files: the mean over the models."""
        from search import evaluation, image_folder

        x = np.stack(
            [
                image_folder.read_image(Path(image), message["input_shape"], message["invert"])
                for image in message["images"]
            ]
        )
        votes = [evaluation.predict(Path(model), x) for model in message["models"]]
        return {"outcome": "complete", "probabilities": np.mean(votes, axis=0).tolist()}

    def script(self, tell: Callable[..., None], message: Message) -> Message:
        """A stored point as a script of its own; the data need not be there.

        Args:
            message: as of `retrain`, without a path; images_per_report, title, data (name,
                reference, input_shape, num_classes) and num_images in the training set.
        """
        from search.codegen import script

        data, num_images = message["data"], message["num_images"]
        images = Images(data["name"], tuple(data["input_shape"]), data["num_classes"])
        hp = ReplayedHyperParameters(message["params"])
        space = self._space(round(message["epochs"] * num_images), images)
        model = space.build(hp)
        own_fit = trains_itself(self._study.space)
        if not own_fit:
            hp.check_all_read()
        epochs = message["epochs"] * message["share"]
        plan = self._final_plan(hp, num_images, message["images_per_report"], epochs, message)
        callbacks = [
            callback
            for callback in space.callbacks(hp)
            if message["stops"] or not isinstance(callback, keras.callbacks.EarlyStopping)
        ]
        for callback in [] if own_fit else callbacks:  # a fit of its own counts epochs
            training.count_in_reports(callback, plan.reports_per_epoch, has_validation=False)
        text = script.script(
            model,
            script.Training(
                seed=message["seed"],
                precision=self.precision,
                batch_size=plan.batch_size,
                steps_per_report=plan.steps_per_report,
                num_reports=plan.num_reports,
                num_images=num_images,
            ),
            title=message["title"],
            dataset=script.DataSource(
                name=data["reference"],
                input_shape=images.input_shape,
                num_classes=images.num_classes,
            ),
            callbacks=callbacks,
            own_fit=own_fit,
        )
        return {"outcome": "complete", "text": text}

    def _fit(
        self,
        space: Space,
        hp: TrialHyperParameters,
        model: keras.Model,
        plan: training.Plan,
        report: training.Report,
        tell: Callable[..., None],
        checkpoints: Checkpoints | None,
    ) -> float | None:
        """Train as the product does; the model is left with its best weights. Their accuracy on
        all validation images, unless the trial ended early."""
        best_weights = keras.callbacks.EarlyStopping(
            training.MONITOR, mode="max", patience=plan.num_reports, restore_best_weights=True
        )
        with self._data.feeding(model, lambda note: tell(note=note)) as (part, inputs):
            training.train(
                part,
                self._data.rows(inputs, self._data.at.train),
                plan,
                validation_data=self._data.rows(inputs, self._data.at.monitor),
                callbacks=[*space.callbacks(hp), best_weights, report],
                checkpoints=checkpoints,
            )
            if report.diverged or report.pruned:
                return None
            return training.accuracy(part, self._data.rows(inputs, self._data.at.val))

    def _checkpoints(
        self, message: Message, hp: keras_tuner.HyperParameters, plan: training.Plan
    ) -> Checkpoints | None:
        """Of the training that a message asks for, where it says in which file."""
        if not message.get("checkpoint"):
            return None
        asked = {name: message.get(name) for name in ("task", "epochs", "share", "validated")}
        identity = {
            **asked,
            "params": hp.values,
            "plan": dataclasses.asdict(plan),
            "precision": self.precision,
            "weights": self._settings["weights"],
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

    def _final_plan(
        self,
        hp: ReplayedHyperParameters,
        num_images: int,
        images_per_report: int,
        epochs: float,
        message: Message,
    ) -> training.Plan:
        num_reports = max(1, round(epochs * num_images / images_per_report))
        batch_size = hp.values.get("batch_size", self._study.batch_size)
        return training.Plan(
            num_images, images_per_report, num_reports, batch_size, message["seed"]
        )

    def _epochs(self, hp: ReplayedHyperParameters, message: Message) -> float:
        """Of a comparison, those that suit the point, but never more than the run's."""
        epochs: float = message["epochs"]
        return min(epochs, self._space(1).epochs(hp)) if message["validated"] else epochs

    def _space(self, total_images: int, images: Images | None = None) -> Space:
        if images is None:
            data = self._dataset
            images = Images(data.name, data.input_shape, data.num_classes)
        return Space(self._study.space, images, total_images, self._settings["weights"])

    def _is_pretrained(self, point: dict[str, Any]) -> bool:
        return self._space(1).is_pretrained(ReplayedHyperParameters(point, complete=True))

    def _complete(self, space: Space, point: dict[str, Any]) -> dict[str, Any]:
        hp = ReplayedHyperParameters(point, complete=True)
        try:
            space.build(hp)
            if not trains_itself(self._study.space):  # what its fit reads is not known yet
                hp.check_all_read()
        except ValueError as error:
            raise ValueError(f"known_points of study {self._study.name!r}: {error}") from None
        return dict(hp.values)


def _kept_report(callbacks: list[keras.callbacks.Callback]) -> int:
    """The report whose weights a training has left in its model: the last, or the best."""
    for callback in callbacks:
        is_best = getattr(callback, "restore_best_weights", False)
        if is_best and getattr(callback, "best_weights", None) is not None:
            return int(callback.best_epoch)
    return -1
