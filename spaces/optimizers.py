"""Plain values -> optimizer and learning-rate schedule.

    rate = learning_rate_schedule("warmup_cosine", 2e-3, total_steps=2_110)
    model.compile(make_optimizer("adamw", rate, weight_decay=0.02), ...)

The schedules are functions of the step alone, and end with the training (total_steps).

Keras has one learning rate for all variables, or MultiOptimizer, which is new in Keras 3.15, has no
learning_rate that ReduceLROnPlateau could lower, and takes its default for a layer whose path it
doesn't match. Hence the classes Layerwise..., of which a file that plain Keras reads must hold
nothing: `make_plain(model)` before `model.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras

# "plateau" is a constant here: keras.callbacks.ReduceLROnPlateau lowers it, and refuses schedules.
SCHEDULES = ("constant", "cosine", "exponential", "step", "warmup_cosine", "plateau")
OPTIMIZERS = ("adam", "adamw", "sgd")
WARMUP = 0.02  # fraction of the steps: over well before a trial is first compared; a guess
EXPONENTIAL_END = 0.01  # fraction of the first learning rate that is left at the end; a guess
# Drops to a tenth after half and three quarters, as in the ResNet paper (arXiv:1512.03385).
STEP_BOUNDARIES = (0.5, 0.75)
STEP_FACTOR = 0.1
# Offsets and the scale of a normalisation have no weights to keep small (arXiv:1706.05350).
NOT_DECAYED = ("bias", "gamma", "beta")


def learning_rate_schedule(
    name: str, learning_rate: float, *, total_steps: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """The schedule called name, whose highest value is learning_rate.

    Args:
        total_steps: batches of the whole training; the decay ends there.

    Raises:
        ValueError: if there is no such schedule, or total_steps is below 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is one of {SCHEDULES}. Received: {name!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps is at least 1. Received: {total_steps!r}")
    schedules = keras.optimizers.schedules
    if name == "cosine":
        return schedules.CosineDecay(learning_rate, total_steps)
    if name == "exponential":
        return schedules.ExponentialDecay(learning_rate, total_steps, EXPONENTIAL_END)
    if name == "step":
        values = [learning_rate * STEP_FACTOR**drops for drops in range(len(STEP_BOUNDARIES) + 1)]
        boundaries = [int(fraction * total_steps) for fraction in STEP_BOUNDARIES]
        return schedules.PiecewiseConstantDecay(boundaries, values)
    if name == "warmup_cosine":
        warmup_steps = max(1, int(WARMUP * total_steps))
        return schedules.CosineDecay(
            learning_rate / (warmup_steps + 1),  # from 0 the first batch would teach nothing
            max(1, total_steps - warmup_steps),
            warmup_target=learning_rate,
            warmup_steps=warmup_steps,
        )
    return learning_rate


def make_optimizer(
    name: str,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    *,
    weight_decay: float | None = None,
    momentum: float | None = None,
    layer_rates: Mapping[str, float] | None = None,
) -> keras.optimizers.Optimizer:
    """The optimizer called name.

    Args:
        weight_decay: "adamw" and "sgd": a weight loses this fraction of itself, times the
            learning rate, each step. Biases and the scales of batch normalisation lose nothing.
        momentum: "sgd" only; Nesterov's.
        layer_rates: learning rate of a layer over learning_rate, by the layer's name; 1 for those
            that it does not name. What a weight loses each step goes with its layer's rate.

    Raises:
        ValueError: if there is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is one of {OPTIMIZERS}. Received: {name!r}")
    settings: dict[str, Any] = {}
    if name != "adam":
        settings["weight_decay"] = weight_decay
    if name == "sgd":
        settings |= {"momentum": momentum, "nesterov": True}
    if layer_rates:
        return LAYERWISE[name](learning_rate, layer_rates=layer_rates, **settings)
    optimizer = LAYERWISE[name].plain(learning_rate, **settings)
    if name != "adam":
        optimizer.exclude_from_weight_decay(var_names=NOT_DECAYED)
    return optimizer


def make_plain(model: keras.Model) -> None:
    """Give a trained model Keras's own optimizer in place of a layerwise one, its state included.

    To be called before `model.save`: a file with a layerwise optimizer could be loaded only where
    this module is. Who trains the loaded model on does so with one learning rate for all layers.
    """
    layerwise = model.optimizer
    if not isinstance(layerwise, Layerwise):
        return
    config = model.get_compile_config()
    config["optimizer"] = keras.saving.serialize_keras_object(layerwise.as_plain())
    model.compile_from_config(config)
    model.optimizer.build(model.trainable_variables)
    if layerwise.built:
        for variable, value in zip(model.optimizer.variables, layerwise.variables, strict=True):
            variable.assign(value)


class Layerwise(keras.optimizers.Optimizer):
    """What the optimizers with a learning rate for each layer have in common.

    Args:
        layer_rates: as in `make_optimizer`.

    Raises:
        ValueError: at the first step, if a name is that of no layer which is trained.
    """

    plain: ClassVar[type[keras.optimizers.Optimizer]]  # Keras's own

    def __init__(self, *args: Any, layer_rates: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_rates = dict(layer_rates)

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        found = {name for variable in variables for name in variable.path.split("/")}
        if unknown := sorted(set(self.layer_rates) - found):
            raise ValueError(
                f"layer_rates names layers that are trained. Received: {', '.join(unknown)}"
            )
        rates = [self._rate(variable) for variable in variables]
        # Keras decays at the learning rate of all; these lose their share in `update_step`.
        slow = [variable for variable, rate in zip(variables, rates, strict=True) if rate != 1]
        self.exclude_from_weight_decay(var_list=slow, var_names=NOT_DECAYED)
        self._rates = tuple(rates)
        self._decayed = tuple(
            bool(self.weight_decay) and not any(name in variable.name for name in NOT_DECAYED)
            for variable in variables
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        if (rate := self._rates[index]) != 1:
            learning_rate = keras.ops.multiply(learning_rate, rate)
            if self._decayed[index]:
                lost = keras.ops.multiply(learning_rate, self.weight_decay)
                self.assign_sub(variable, keras.ops.multiply(variable, lost))
        super().update_step(gradient, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"layer_rates": dict(self.layer_rates)}

    def as_plain(self) -> keras.optimizers.Optimizer:
        """Keras's own of the same settings, without a state."""
        config = self.get_config()
        del config["layer_rates"], config["name"]
        return self.plain.from_config(config)

    def _rate(self, variable: Any) -> float:
        # The path of a variable, such as sequential/block5_conv1/kernel, depends on the model's
        # kind and on whether it was loaded.
        return next(
            (
                self.layer_rates[name]
                for name in variable.path.split("/")
                if name in self.layer_rates
            ),
            1.0,
        )


@keras.saving.register_keras_serializable("fmnist_search")
class LayerwiseAdam(Layerwise, keras.optimizers.Adam):
    plain = keras.optimizers.Adam


@keras.saving.register_keras_serializable("fmnist_search")
class LayerwiseAdamW(Layerwise, keras.optimizers.AdamW):
    plain = keras.optimizers.AdamW


@keras.saving.register_keras_serializable("fmnist_search")
class LayerwiseSGD(Layerwise, keras.optimizers.SGD):
    plain = keras.optimizers.SGD


LAYERWISE = {"adam": LayerwiseAdam, "adamw": LayerwiseAdamW, "sgd": LayerwiseSGD}
