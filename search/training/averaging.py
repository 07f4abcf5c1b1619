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

import functools
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
    # Keras's own has one momentum from the first step on. After fifty steps, a report of a small
    # model, three fifths of the average would still be the weights before the first.
    setattr(optimizer, _UPDATE, functools.partial(_update, optimizer))


def is_averaged(model: keras.Model) -> bool:
    return bool(getattr(model.optimizer, "use_ema", False)) and not _wraps(model.optimizer)


def shorten(model: keras.Model, num_steps: int) -> None:
    """For a short training by plain Keras, which has one momentum from the first step on: the one
    that `average_weights` comes to at the end."""
    if _UPDATE in vars(model.optimizer):
        model.optimizer.ema_momentum = min(MOMENTUM, num_steps / (num_steps + _EARLY))


class Averaged(keras.callbacks.Callback):
    """Puts the average in the weights' place from the end of a report's steps to the next report.

    To be the first of the callbacks: validation and all others see the average.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Any] = []  # the weights of the last step, meanwhile; checkpoints keep it

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
        if self._steps:
            return
        for variable, average in self._averaged():
            self._steps.append(keras.ops.convert_to_numpy(variable))
            variable.assign(np.array(average))  # a copy: JAX would share the memory

    def _averaged(self) -> list[tuple[Any, Any]]:
        """The variables, each with its average."""
        optimizer = self.model.optimizer
        averages = optimizer._model_variables_moving_average
        pairs = zip(optimizer._trainable_variables, averages, strict=True)
        return [pair for pair in pairs if pair[1] is not None]


def _wraps(optimizer: Any) -> bool:
    return hasattr(optimizer, "inner_optimizer") or hasattr(optimizer, "optimizers")


def _update(optimizer: Any, variables: list[Any]) -> None:
    """Move the average towards the weights, in a step of the optimizer."""
    done = optimizer.iterations
    is_early = done < _ALL
    share = keras.ops.maximum(1 - MOMENTUM, _EARLY / (keras.ops.cast(done, "float32") + _EARLY))
    share = keras.ops.where(is_early, share, _EVERY * share)
    is_due = keras.ops.logical_or(is_early, done % _EVERY == 0)

    def move(share: Any) -> None:
        averages = optimizer._model_variables_moving_average
        for variable, average in zip(variables, averages, strict=True):
            if average is not None:
                change = keras.ops.multiply(
                    variable - average, keras.ops.cast(share, variable.dtype)
                )
                average.assign_add(change)

    if keras.backend.backend() == "tensorflow":
        keras.ops.cond(is_due, lambda: move(share), lambda: None)
    else:  # JAX knows no assignment in a branch
        move(keras.ops.where(is_due, share, 0.0))
