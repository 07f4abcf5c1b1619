"""The moving average of a training's weights, which is measured and saved in their place.

    average_weights(model)       # before the first step
    training.train(model, ...)   # reports, best weights and the trained model are the average's

While the learning rate is high, the weights of a single step are noisy; their average classifies
better (arXiv:1803.05407), so that good points show earlier and what is compared at a rung is less a
matter of luck. What keeps it is Keras's own `use_ema`, which a saved model's config names; Keras
3.15 would measure validation with the steps' weights, and keep those as the best
(`SwapEMAWeights` changes the one or the other).
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

MOMENTUM = 0.99  # Keras's default: about the last hundred steps
_EARLY = 9  # at first the average is over the last ninth of the steps so far
# After so many steps only every so manieth counts: on a CPU a step of a small model with a million
# weights took an eighth longer for its average.
_ALL, _EVERY = 100, 4

_UPDATE = "_update_model_variables_moving_average"  # Keras's method


def average_weights(model: keras.Model) -> None:
    """Have a compiled model's optimizer keep an average of the weights, if it is to.

    Left as they are: an optimizer that does so already, one that has been built, and those that
    wrap others.
    """
    optimizer = model.optimizer
    if optimizer.built or optimizer.use_ema or _wraps(optimizer):
        return
    optimizer.use_ema, optimizer.ema_momentum = True, MOMENTUM
    setattr(optimizer, _UPDATE, _Update(optimizer))


def is_averaged(model: keras.Model) -> bool:
    return bool(getattr(model.optimizer, "use_ema", False)) and not _wraps(model.optimizer)


def shorten(model: keras.Model, num_steps: int) -> None:
    """For a short training by plain Keras, which has one momentum from the first step on: the one
    that `average_weights` comes to at the end."""
    if _UPDATE in vars(model.optimizer):
        model.optimizer.ema_momentum = min(MOMENTUM, num_steps / (num_steps + _EARLY))


class Averaged(keras.callbacks.Callback):
    """Puts the average in the weights' place from the end of a report's steps to the next report.

    To be the first of the callbacks: validation and all others see the average. Where a model's own
    `train_step` leaves the compiled optimizer unused, there is none, and nothing is done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Any] = []  # the weights of the last step, meanwhile; checkpoints keep it

    def on_train_begin(self, logs: Any = None) -> None:
        # Keras would put the average there again at the end of `fit`, over what a callback has set,
        # and on JAX in the same memory, which the next evaluation frees.
        self.model.optimizer.finalize_variable_values = lambda variables: None

    def on_train_end(self, logs: Any = None) -> None:
        del self.model.optimizer.finalize_variable_values

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if not self._steps:
            return
        for (variable, average), weights in zip(self._averaged(), self._steps, strict=True):
            # Another callback may have set it: that is kept.
            if np.array_equal(variable, average, equal_nan=True):
                variable.assign(weights)
        self._steps = []

    def on_test_begin(self, logs: Any = None) -> None:
        self._put()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._put()

    def _put(self) -> None:
        if self._steps or not self._is_kept():
            return
        for variable, average in self._averaged():
            self._steps.append(keras.ops.convert_to_numpy(variable))
            variable.assign(np.array(average))  # a copy: JAX would share the memory

    def _is_kept(self) -> bool:
        optimizer = self.model.optimizer
        update = vars(optimizer).get(_UPDATE)
        is_used = update is None or update.is_used
        return is_used and optimizer.built and int(optimizer.iterations) > 0

    def _averaged(self) -> list[tuple[Any, Any]]:
        """The variables, each with its average."""
        optimizer = self.model.optimizer
        averages = optimizer._model_variables_moving_average
        pairs = zip(optimizer._trainable_variables, averages, strict=True)
        return [pair for pair in pairs if pair[1] is not None]


def _wraps(optimizer: Any) -> bool:
    return hasattr(optimizer, "inner_optimizer") or hasattr(optimizer, "optimizers")


class _Update:
    """Moves the average towards the weights, in each step of an optimizer.

    In the place of Keras's own method, which has one momentum from the first step on: after fifty
    steps, a report of a small model, three fifths of the average would still be the weights before
    the first.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer):
        self.is_used = False
        self._optimizer = optimizer

    def __call__(self, variables: list[Any]) -> None:
        self.is_used = True
        done = self._optimizer.iterations
        is_early = done < _ALL
        share = keras.ops.maximum(1 - MOMENTUM, _EARLY / (keras.ops.cast(done, "float32") + _EARLY))
        share = keras.ops.where(is_early, share, _EVERY * share)
        is_due = keras.ops.logical_or(is_early, done % _EVERY == 0)
        if keras.backend.backend() == "tensorflow":
            keras.ops.cond(is_due, lambda: self._move(variables, share), lambda: None)
        else:  # JAX knows no assignment in a branch
            self._move(variables, keras.ops.where(is_due, share, 0.0))

    def _move(self, variables: list[Any], share: Any) -> None:
        averages = self._optimizer._model_variables_moving_average
        for variable, average in zip(variables, averages, strict=True):
            if average is None:
                continue
            # Keras sees to constraints after this.
            value = variable.constraint(variable) if variable.constraint else variable
            change = keras.ops.multiply(value - average, keras.ops.cast(share, variable.dtype))
            average.assign_add(change)
