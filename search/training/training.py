"""One training, from a compiled model to its history: short reports instead of long epochs.

A report is a Keras epoch of `images_per_report` images, so that every Keras callback works at the
finer grain, a bad trial ends after a fraction of an epoch, and equal steps mean equal images.
"""

from __future__ import annotations

import inspect
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from search.training import averaging, backend, quick_layers
from search.training.checkpoints import Checkpoints
from search.workers.protocol import RemoteTrial

MONITOR = "val_accuracy"
Data = tuple[backend.Rows | np.ndarray, np.ndarray]  # inputs and labels


@dataclass(frozen=True)
class Plan:
    """How long a training lasts and in which order it sees its images."""

    num_images: int  # in the training set
    images_per_report: int
    num_reports: int
    batch_size: int
    seed: int

    @property
    def steps_per_report(self) -> int:
        return max(1, round(self.images_per_report / self.batch_size))

    @property
    def reports_per_epoch(self) -> float:
        return self.num_images / (self.steps_per_report * self.batch_size)

    def order(self) -> np.ndarray:
        """Positions of the images to come, (steps * batch_size,) int32.

        Epoch after epoch, each a permutation by (seed, epoch): any place in it can be found again.
        """
        length = self.num_reports * self.steps_per_report * self.batch_size
        epochs = range(math.ceil(length / self.num_images))
        permutations = [
            np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
            for epoch in epochs
        ]
        return np.concatenate(permutations)[:length].astype(np.int32)


def train(
    model: keras.Model,
    train_data: Data,
    plan: Plan,
    *,
    validation_data: Data | None,
    callbacks: Sequence[keras.callbacks.Callback],
    checkpoints: Checkpoints | None = None,
    on_resume: Callable[[int], None] = lambda reports: None,
) -> dict[str, list[float]]:
    """Train a compiled model.

    Where its optimizer keeps an average of the weights, reports measure the average, callbacks see
    it, and the trained model has it.

    Args:
        train_data: what the model reads (images as (n, height, width, channels) uint8, or
            activations of a frozen part), and (n,) class numbers.
        validation_data: the same, measured at each report; None for none.
        callbacks: those that count, count epochs; converted to reports here.
        checkpoints: of an earlier attempt at this training, which goes on there; and of this one.
        on_resume: told how many reports the earlier attempt has made, if it goes on there.

    Returns:
        Keras's history: one value a report for each of loss, accuracy, val_loss, val_accuracy; of
        this attempt's reports.
    """
    for callback in callbacks:
        count_in_reports(
            callback, plan.reports_per_epoch, has_validation=validation_data is not None
        )
    callbacks = list(callbacks)
    if averaging.is_averaged(model):
        # A space's own callback for it would exchange the two once more.
        own = keras.callbacks.SwapEMAWeights
        callbacks = [each for each in callbacks if not isinstance(each, own)]
        callbacks.insert(0, averaging.Averaged())
    _build(model, train_data[1][:1])
    at_once = backend.steps_at_once(model, callbacks, plan.steps_per_report)
    if at_once != model.steps_per_execution:
        model.steps_per_execution = at_once
        model.train_function = model.test_function = None  # the space may have had them made
    done = 0
    if checkpoints:
        checkpoints.watch(model, callbacks)
        callbacks.append(checkpoints)
        if done := checkpoints.reports:
            on_resume(done)
    # Of one that was killed at its end nothing is read, but Keras refuses an empty generator.
    begin = min(done, plan.num_reports - 1)
    order = plan.order()[begin * plan.steps_per_report * plan.batch_size :]
    inputs, labels = train_data[0], as_loss_wants(model, train_data[1])
    with (
        backend.feeding(model, inputs, labels, order, plan.batch_size) as batches,
        quick_layers.fused_batch_norm(),
    ):
        history = model.fit(
            batches,
            initial_epoch=done,
            epochs=plan.num_reports,
            steps_per_epoch=plan.steps_per_report,
            validation_data=_validation(model, validation_data),
            callbacks=callbacks,
            shuffle=False,  # the order is the plan's
            verbose=0,
        )
    return {name: [float(np.mean(v)) for v in values] for name, values in history.history.items()}


def _build(model: keras.Model, y: np.ndarray) -> None:
    """Make the variables of optimizer and metrics, which would come with the first step.

    TensorFlow traces a step that makes variables twice: a new model's first step took 1.5 to 5
    seconds of CPU, and takes half of it.
    """
    if model.run_eagerly:
        return
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    if type(model).compute_metrics is keras.Model.compute_metrics:
        predicted = keras.ops.zeros((len(y), *model.output_shape[1:]))
        model.compute_metrics(None, as_loss_wants(model, y), predicted)
        model.reset_metrics()


def measured(model: keras.Model, data: Data) -> dict[str, float]:
    """Loss, accuracy (the fraction classified as labelled), and what else it was compiled with."""
    figures = model.evaluate(_validation(model, data), verbose=0, return_dict=True)
    return _numbers(figures)


def accuracy(model: keras.Model, data: Data) -> float:
    """Fraction of images that the model classifies as labelled."""
    return measured(model, data)[MONITOR.removeprefix("val_")]


def as_loss_wants(model: keras.Model, y: np.ndarray) -> np.ndarray:
    """Labels as the compiled loss takes them.

    Args:
        y: (n,) class numbers.

    Returns:
        y itself for a sparse loss; (n, 1) float32 for a model that ends in one number; else
        one-hot (n, classes) float32.
    """
    num_outputs = model.output_shape[-1]
    if num_outputs == 1:
        return y[:, np.newaxis].astype(np.float32)
    (given,) = keras.tree.flatten(model.loss)  # a dictionary or a list may hold it
    loss = keras.losses.get(given)
    function = getattr(loss, "fn", loss)  # a loss class wraps its function; `name` is the user's
    one_hot = np.eye(num_outputs, dtype=np.float32)
    if _is_sparse(function, one_hot):
        return y
    return one_hot[y]


def _is_sparse(loss: Any, one_hot: np.ndarray) -> bool:
    """By the name of Keras's own losses; one of the user's is asked which labels it knows right
    predictions from wrong ones by."""
    name = getattr(loss, "__name__", type(loss).__name__)
    if hasattr(keras.losses, name):
        return "sparse" in name
    one_hot = np.concatenate([one_hot, one_hot])  # not as many labels as classes
    tells = _tells_right_from_wrong(loss, one_hot, one_hot)
    if tells:
        return False
    return tells is None or bool(_tells_right_from_wrong(loss, one_hot.argmax(1), one_hot))


def _tells_right_from_wrong(loss: Any, labels: np.ndarray, one_hot: np.ndarray) -> bool | None:
    """Whether it is lower for right predictions; None where it fails, as it may at such labels."""
    right = 0.9 * one_hot + 0.1 / one_hot.shape[1]
    means = []
    try:
        for predicted in (right, np.roll(right, 1, axis=0)):
            of = loss(keras.ops.convert_to_tensor(labels), keras.ops.convert_to_tensor(predicted))
            means.append(float(keras.ops.mean(of)))
    except Exception:  # whatever a function of the user's raises
        return None
    return means[0] < means[1] - 1e-6


class Report(keras.callbacks.Callback):
    """Tells a trial each report's figures, and stops the training where the trial says so.

    Stops through `model.stop_training`, since an exception raised in a callback would skip
    `on_train_end` of all of them.

    Args:
        trial: receives MONITOR at steps 1, 2, ... and answers `should_prune`.
        images: seen between two reports, for the speed.
        must_have_it: whether a report without it is an error; else nothing is told of it.
    """

    def __init__(self, trial: RemoteTrial | Any, images: int, *, must_have_it: bool = False):
        super().__init__()
        self.pruned = False
        self.diverged = ""
        self.values: list[float] = []
        self.training_seconds = 0.0
        self.validation_seconds = 0.0
        self._step = 0
        self._trial = trial
        self._images = images
        self._must_have_it = must_have_it
        # A training loop of the user's own may call on_epoch_end only.
        self._began = time.monotonic()
        self._tested = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._began, self._tested = time.monotonic(), 0.0

    def on_test_begin(self, logs: Any = None) -> None:
        self._tested = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        now = time.monotonic()
        tested = self._tested or now
        self.training_seconds += tested - self._began
        self.validation_seconds += now - tested
        figures = _numbers(logs)
        # A fit of the user's own may train twice, and Keras counts anew.
        step = self._step = max(epoch + 1, self._step + 1)
        if found := unsound(figures):
            self.diverged = f"{found} at report {step}"
            self.model.stop_training = True
            return
        if MONITOR not in figures:  # nothing to compare with other trials
            if self._must_have_it:
                raise ValueError(
                    f"The model's figures have no {MONITOR}, by which trials are compared: "
                    "`metrics` and `test_step` of its own must keep the metric 'accuracy'. "
                    f"Received: {sorted(figures)}"
                )
            return
        self.values.append(figures[MONITOR])
        self._trial.report(
            figures[MONITOR],
            step,
            metrics=figures | _learning_rate(self.model),
            images_per_second=self._images / max(1e-9, tested - self._began),
            training_seconds=self.training_seconds,
            validation_seconds=self.validation_seconds,
        )
        self._began = time.monotonic()
        if self._trial.should_prune():
            self.pruned = True
            self.model.stop_training = True


class Progress(keras.callbacks.Callback):
    """Tells how far a winner's training has come, keeps its history, and stops it at a figure that
    is not finite.

    Args:
        tell: called with step, of, accuracy and images_per_second.
        num_reports: that will come.
        images: seen between two of them.
    """

    def __init__(self, tell: Any, num_reports: int, images: int):
        super().__init__()
        self.history: dict[str, list[float]] = {}
        self.diverged = ""
        self.seconds = 0.0  # of training, also that before a kill: checkpoints keep it
        self._tell = tell
        self._num_reports = num_reports
        self._images = images
        self._began = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        figures = _numbers(logs)
        if found := unsound(figures):
            self.diverged = self.diverged or f"{found} at report {epoch + 1}"
            self.model.stop_training = True
            return
        for name, value in figures.items():
            self.history.setdefault(name, []).append(value)
        now = time.monotonic()
        self.seconds += now - self._began
        self._tell(
            step=epoch + 1,
            of=max(epoch + 1, self._num_reports),
            accuracy=figures.get("accuracy", 0.0),
            images_per_second=self._images / max(1e-9, now - self._began),
        )
        self._began = now


def _numbers(logs: Mapping[str, Any] | None) -> dict[str, float]:
    """Of a metric that has a number for each class, the mean."""
    return {name: float(np.mean(value)) for name, value in (logs or {}).items()}


def unsound(figures: dict[str, float]) -> str:
    """Which figure is not finite, if any."""
    found = (f"{name} was {value}" for name, value in figures.items() if not math.isfinite(value))
    return next(found, "")


def _learning_rate(model: keras.Model) -> dict[str, float]:
    """Of the step that comes next."""
    rate = getattr(getattr(model, "optimizer", None), "learning_rate", None)
    return {} if rate is None else {"learning_rate": float(keras.ops.convert_to_numpy(rate))}


def _validation(model: keras.Model, data: Data | None) -> Any:
    if data is None:
        return None
    return backend.validation_batches(data[0], as_loss_wants(model, data[1]))


def count_in_reports(
    callback: keras.callbacks.Callback, reports_per_epoch: float, *, has_validation: bool
) -> None:
    """Make a callback written for epochs count reports, which are Keras's epochs here."""
    for name in ("patience", "cooldown", "start_from_epoch"):
        epochs = getattr(callback, name, None)
        # A patience of 0 is one of 1 to Keras: it ends with the first epoch that is no better.
        if isinstance(epochs, numbers.Real) and (epochs or name == "patience"):
            setattr(callback, name, max(1, round(max(1.0, float(epochs)) * reports_per_epoch)))
    if isinstance(callback, keras.callbacks.LearningRateScheduler):
        callback.schedule = _once_an_epoch(callback.schedule, reports_per_epoch)
    monitor = getattr(callback, "monitor", None)
    if not has_validation and isinstance(monitor, str):
        # A winner trains on all data: what a callback watched on the validation part, it now
        # watches on the training part.
        callback.monitor = monitor.removeprefix("val_")


def _once_an_epoch(schedule: Callable[..., float], reports_per_epoch: float) -> Any:
    """A schedule by epochs, from 0, that is asked where one begins."""

    try:
        inspect.signature(schedule).bind(0, 0.0)
        takes_rate = True
    except (TypeError, ValueError):  # it takes the epoch alone, or is written in C
        takes_rate = False

    def by_report(report: int, rate: float) -> float:
        epoch = int(report / reports_per_epoch)
        if report and epoch == int((report - 1) / reports_per_epoch):
            return rate
        try:
            return schedule(epoch, rate) if takes_rate else schedule(epoch)
        except TypeError as error:  # Keras would ask once more, without the rate
            raise ValueError(f"LearningRateScheduler's schedule: {error}") from error

    return by_report
