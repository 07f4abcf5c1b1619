"""All that a worker does for a study with a space: its objective, and what becomes of a stored
point: trained again, written as a script, measured, asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from search import artifacts
from search.training import averaging, backend, complexity, training
from search.training.hypermodel import Images, trains_itself
from search.training.hyperparameters import ReplayedHyperParameters
from search.training.objective import Objective
from search.workers.protocol import Message


class KerasTasks(Objective):
    """Each public method is a task. Only `evaluate` sees the test set."""

    def retrain(self, tell: Callable[..., None], message: Message) -> Message:
        """Train a stored point on training and validation data together, and save the model.

        Args:
            message: params, seed, epochs (the schedule's length, in passes over the data),
                share (of it that is trained, 0 to 1), validated (train on the training part alone,
                as long as suits the point, and watch the validation part), path of the model, and
                perhaps checkpoint, a file.
        """
        while (outcome := self._retrained(tell, message)) is None:
            backend.release()
            tell(note="again, activations in float32")
        return outcome

    def _retrained(self, tell: Callable[..., None], message: Message) -> Message | None:
        """None if the model differs from what it says of stored activations: next time they are
        kept in float32, or it is trained on images."""
        self._begin(message["seed"])
        validated = message["validated"]
        chosen = self._data.at.train if validated else self._data.everywhere
        hp = ReplayedHyperParameters(message["params"])
        epochs = self._epochs(hp, message)
        space = self._space(round(epochs * len(chosen)))
        model = self._built(space, hp)
        callbacks = space.callbacks(hp)
        figures, trained_on = {}, ""
        if trains_itself(self._study.space):
            num_reports = max(1, round(epochs * message["share"]))
            progress = training.Progress(tell, num_reports, len(chosen))
            guards = [progress, keras.callbacks.TerminateOnNaN()]
            self._let_fit(space, hp, model, self._data.arrays(chosen), num_reports, guards)
            num_reports = len(progress.history.get("loss", [])) or num_reports
            trained: float = num_reports
            hp.check_all_read()
            if validated:
                figures = training.measured(model, self._data.arrays(self._data.at.val))
        else:
            hp.check_all_read()
            per_report = self._images_per_report
            plan = self._final_plan(hp, len(chosen), per_report, epochs * message["share"], message)
            progress = training.Progress(tell, plan.num_reports, plan.images_per_report)
            with self._data.feeding(model, lambda note: tell(note=note)) as feed:
                trained_on, val = feed.about, self._data.rows(feed.inputs, self._data.at.val)
                training.train(
                    feed.model,
                    self._data.rows(feed.inputs, chosen),
                    plan,
                    validation_data=val if validated else None,
                    callbacks=[*callbacks, progress, keras.callbacks.TerminateOnNaN()],
                    checkpoints=self._checkpoints(message, hp, plan, feed.inputs),
                )
                if validated:
                    figures = training.measured(feed.model, val)
                if not (progress.diverged or feed.holds(whole=model)):
                    return None
            num_reports = len(progress.history.get("loss", []))
            trained = num_reports * plan.steps_per_report * plan.batch_size / len(chosen)
        if progress.diverged:
            return {"outcome": "diverged", "reason": progress.diverged}
        if found := training.unsound(figures):
            return {"outcome": "diverged", "reason": f"{found} on the validation part"}
        # The last update may have come after the last loss, and a fit of its own may watch none.
        if not all(np.isfinite(array).all() for array in model.get_weights()):
            return {"outcome": "diverged", "reason": "weights that are not finite at its end"}
        space.before_saving(model)
        path = Path(message["path"])
        with artifacts.write_atomically(path, num_bytes=_num_bytes(model)) as beside:
            model.save(beside)
        kept = _kept_report(callbacks)
        return {
            "outcome": "complete",
            "sha256": artifacts.sha256(path),
            "history": progress.history,
            "seconds": progress.seconds,
            "parameters": model.count_params(),
            "trained_on": trained_on,
            "pretrained": space.is_pretrained(hp),
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
        from search.winners import evaluation

        path, pictures = Path(message["path"]), message["pictures"]
        problem = evaluation.predict_test(
            Path(message["model"]),
            self._settings["dataset"],
            path,
            message["history"],
            pictures_path=pictures,
        )
        if problem:
            return {"outcome": "diverged", "reason": problem}
        return {
            "outcome": "complete",
            "sha256": artifacts.sha256(path),
            "pictures_sha256": pictures and artifacts.sha256(pictures),
        }

    def predict(self, tell: Callable[..., None], message: Message) -> Message:
        """Class probabilities of image files: the mean over the models."""
        from search.data import image_folder
        from search.winners import evaluation

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
                reference, input_shape, num_classes), num_images in the training set, and
                kept_epochs, after which a training had its best weights (None: there was none).
        """
        from search.codegen import script

        data, num_images = message["data"], message["num_images"]
        images = Images(data["name"], tuple(data["input_shape"]), data["num_classes"])
        hp = ReplayedHyperParameters(message["params"])
        self._begin(message["seed"])
        epochs = self._epochs(hp, message)
        space = self._space(round(epochs * num_images), images)
        model = self._built(space, hp)
        own_fit = trains_itself(self._study.space)
        callbacks = space.callbacks(hp)
        if not own_fit:
            hp.check_all_read()
        trained = epochs * message["share"]
        if message["validated"]:
            # As long as made the model that was kept: nothing watches the script's training.
            trained = message["kept_epochs"] or trained
        plan = self._final_plan(hp, num_images, message["images_per_report"], trained, message)
        averaging.shorten(model, plan.num_reports * plan.steps_per_report)
        callbacks = [
            callback
            for callback in callbacks
            if not (message["validated"] and isinstance(callback, keras.callbacks.EarlyStopping))
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
            is_pretrained=space.is_pretrained(hp),
        )
        return {"outcome": "complete", "text": text}

    def _final_plan(
        self,
        hp: ReplayedHyperParameters,
        num_images: int,
        images_per_report: int,
        epochs: float,
        message: Message,
    ) -> training.Plan:
        num_reports = max(1, round(epochs * num_images / images_per_report))
        batch_size = self._batch_size(hp)
        return training.Plan(
            num_images, images_per_report, num_reports, batch_size, message["seed"]
        )

    def _epochs(self, hp: ReplayedHyperParameters, message: Message) -> float:
        """Of a comparison, those that suit the point, but never more than the run's."""
        epochs: float = message["epochs"]
        return min(epochs, self._space(1).epochs(hp)) if message["validated"] else epochs


def _num_bytes(model: keras.Model) -> int:
    """What its file takes, nearly: float32 weights and what the optimizer keeps of them."""
    optimizer = getattr(model, "optimizer", None)
    kept = optimizer.variables if optimizer else []
    return 4 * sum(math.prod(variable.shape) for variable in (*model.weights, *kept))


def _kept_report(callbacks: list[keras.callbacks.Callback]) -> int:
    """The report whose weights a training has left in its model: the last, or the best."""
    for callback in callbacks:
        is_best = getattr(callback, "restore_best_weights", False)
        if is_best and getattr(callback, "best_weights", None) is not None:
            return int(callback.best_epoch)
    return -1
