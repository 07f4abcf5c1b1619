"""Plain values -> optimizer and learning-rate schedule.

    rate = learning_rate_schedule("warmup_cosine", 2e-3, total_steps=2_110)
    model.compile(make_optimizer("adamw", rate, weight_decay=0.02), ...)

The schedules are functions of the step alone, and end with the training (total_steps).
"""

from __future__ import annotations

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
) -> keras.optimizers.Optimizer:
    """The optimizer called name.

    Args:
        weight_decay: "adamw" and "sgd": a weight loses this fraction of itself, times the
            learning rate, each step. Biases and the scales of batch normalisation lose nothing.
        momentum: "sgd" only; Nesterov's.

    Raises:
        ValueError: if there is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is one of {OPTIMIZERS}. Received: {name!r}")
    if name == "adam":
        return keras.optimizers.Adam(learning_rate)
    if name == "adamw":
        optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay)
    else:
        optimizer = keras.optimizers.SGD(
            learning_rate, momentum=momentum, nesterov=True, weight_decay=weight_decay
        )
    optimizer.exclude_from_weight_decay(var_names=NOT_DECAYED)
    return optimizer
