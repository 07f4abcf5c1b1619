"""Multi-layer perceptrons: dense layers on the pixels in a row, without any notion of their place.

    model = MLP((28, 28, 1), 10, total_images=500_000).build(keras_tuner.HyperParameters())

The defaults are a strong model as it stands; the dearest point costs less than twice as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import keras

from spaces import blocks
from spaces.image import ImageSpace, Reader


@dataclass(frozen=True)
class MLPArchitecture:
    """One architecture of the space, as plain values."""

    num_layers: int  # hidden ones
    units: int  # of the first layer
    shrink: float  # units of a layer over those of the layer before
    activation: str
    batch_norm: bool
    input_dropout: float  # of the pixels
    dropout: float  # after each hidden layer

    def outputs(self, x: Any, num_classes: int) -> Any:
        x = blocks.dropout(keras.layers.Flatten()(x), self.input_dropout)
        for layer in range(self.num_layers):
            x = blocks.dense_block(
                x,
                int(self.units * self.shrink**layer),
                activation=self.activation,
                batch_norm=self.batch_norm,
            )
            x = blocks.dropout(x, self.dropout)
        return blocks.probabilities(x, num_classes)


class MLP(ImageSpace):
    """The space of multi-layer perceptrons for small images, from 8x8 pixels."""

    max_layers: ClassVar[int] = 4
    units: ClassVar[tuple[int, int, int]] = (64, 512, 64)  # least, most, step
    shrinks: ClassVar[tuple[float, ...]] = (0.5, 1.0)
    activations: ClassVar[tuple[str, ...]] = ("relu", "elu", "silu")
    max_input_dropout: ClassVar[float] = 0.3
    max_dropout: ClassVar[float] = 0.5
    defaults: ClassVar[dict[str, Any]] = ImageSpace.defaults | {
        "num_layers": 2,
        "units": 512,
        "shrink": 1.0,
        "activation": "relu",
        "batch_norm": True,
        "input_dropout": 0.0,
        "dropout": 0.2,
        "shift": 0,
    }

    def architecture(self, reader: Reader) -> MLPArchitecture:
        return MLPArchitecture(
            num_layers=reader.whole("num_layers", 1, self.max_layers),
            units=reader.whole("units", *self.units),
            shrink=reader.choice("shrink", self.shrinks),
            activation=reader.choice("activation", self.activations),
            batch_norm=reader.switch("batch_norm"),
            input_dropout=reader.fraction("input_dropout", self.max_input_dropout),
            dropout=reader.fraction("dropout", self.max_dropout),
        )
