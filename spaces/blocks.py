"""Plain values in, layers out: the parts that the image models of this folder are made of.

    x = blocks.scaled(inputs)
    x = blocks.conv_block(x, 32, kernel_sizes=(3, 3), padding="same", activation="relu")
    outputs = blocks.head(blocks.pool(x, "max"), 10, features="flatten", dense_units=128)

A map never shrinks to nothing: a convolution wider than its map pads ("same" whatever was asked),
and a map less than two pixels high or wide is not pooled.
"""

from __future__ import annotations

from typing import Any

import keras

POOLINGS = {"max": keras.layers.MaxPooling2D, "average": keras.layers.AveragePooling2D}
FEATURES = {
    "flatten": keras.layers.Flatten,
    "average": keras.layers.GlobalAveragePooling2D,
    "max": keras.layers.GlobalMaxPooling2D,
}
# Keras's 0.99 is still a third initial values after the 100 batches before a first report, which
# would then judge a model by statistics that are not its own.
BATCH_NORM_MOMENTUM = 0.9


def scaled(x: Any) -> Any:
    """Raw pixels (n, height, width, channels) uint8 -> the same in [0, 1]."""
    return keras.layers.Rescaling(1 / 255)(x)


def conv_block(
    x: Any,
    filters: int,
    *,
    kernel_sizes: tuple[int, ...] = (3,),
    padding: str = "same",
    activation: str = "relu",
    batch_norm: bool = False,
) -> Any:
    """One convolution for each of kernel_sizes; batch normalisation stands before the activation.

    Args:
        x: maps (n, height, width, channels).
        padding: "same" keeps height and width; "valid" takes kernel_size - 1 off each, except
            where the map is smaller than the kernel: there the convolution pads.
        batch_norm: its offset replaces the convolution's bias.
    """
    for kernel_size in kernel_sizes:
        fits = min(x.shape[1:3]) >= kernel_size
        x = keras.layers.Conv2D(
            filters, kernel_size, padding=padding if fits else "same", use_bias=not batch_norm
        )(x)
        x = _activated(x, activation, batch_norm=batch_norm)
    return x


def dense_block(x: Any, units: int, *, activation: str = "relu", batch_norm: bool = False) -> Any:
    """A dense layer on vectors (n, length); batch normalisation as in `conv_block`."""
    x = keras.layers.Dense(units, use_bias=not batch_norm)(x)
    return _activated(x, activation, batch_norm=batch_norm)


def pool(x: Any, kind: str) -> Any:
    """Halve height and width by the "max" or "average" of 2x2; a map below 2x2 stays as it is."""
    if min(x.shape[1:3]) < 2:
        return x
    return POOLINGS[kind](2)(x)


def dropout(x: Any, rate: float) -> Any:
    """Dropout, or nothing at rate 0, so that a model's layers are those that do something."""
    if rate == 0:
        return x
    return keras.layers.Dropout(rate)(x)


def head(
    x: Any,
    num_classes: int,
    *,
    features: str = "flatten",
    dense_units: int = 0,
    activation: str = "relu",
    dropout_rate: float = 0.0,
) -> Any:
    """Maps -> class probabilities (n, num_classes) float32.

    Args:
        features: how a map becomes a vector: "flatten", or its global "average" or "max".
        dense_units: of the layer before the last; 0 for none.
        dropout_rate: before the last layer.
    """
    x = FEATURES[features]()(x)
    if dense_units:
        x = keras.layers.Dense(dense_units, activation=activation)(x)
    return probabilities(dropout(x, dropout_rate), num_classes)


def probabilities(x: Any, num_classes: int) -> Any:
    """Vectors -> class probabilities (n, num_classes) float32, also under mixed precision."""
    return keras.layers.Dense(num_classes, activation="softmax", dtype="float32")(x)


def _activated(x: Any, activation: str, *, batch_norm: bool) -> Any:
    if batch_norm:
        x = keras.layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM)(x)
    return keras.layers.Activation(activation)(x)
