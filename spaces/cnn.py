"""Convolutional networks: blocks of convolutions and pooling, then a dense head.

    model = CNN((28, 28, 1), 10, total_images=270_000).build(keras_tuner.HyperParameters())

The defaults are a strong model as it stands. Two rules keep the dearest point at about five times
the defaults' cost: the second size of kernel is offered to the first convolution only, where a map
has few channels, and no layer has more than MAX_FILTERS filters. A third bounds the dense layer's
weights: the last block may keep its map only where that is at most MAX_KEPT_MAP pixels wide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import keras_tuner

from spaces import augmentation, blocks, optimizers

MAX_FILTERS = 256
MAX_KEPT_MAP = 8
PLATEAU_FACTOR = 0.5
PLATEAU_PATIENCE = 1  # epochs


@dataclass(frozen=True)
class CNNPoint:
    """One point of the space, as plain values."""

    num_blocks: int
    convs_per_block: int
    filters: int  # of the first block
    growth: float  # filters of a block over those of the block before
    first_kernel_size: int  # of the first convolution; the others are 3x3
    padding: str
    pooling: str
    last_block_pools: bool
    activation: str
    batch_norm: bool
    conv_dropout: float  # after each block
    features: str  # how the last map becomes a vector
    dense_units: int  # 0: no dense layer before the last
    dense_dropout: float  # before the last layer
    flip: bool
    shift: int  # pixels
    erasing: float  # probability
    label_smoothing: float
    batch_size: int
    schedule: str
    optimizer: str
    learning_rate: float
    weight_decay: float | None = None
    momentum: float | None = None

    def block_filters(self, block: int) -> int:
        """Filters of block 0, 1, ...: a multiple of 8, the width of a CPU's vector."""
        return min(MAX_FILTERS, int(self.filters * self.growth**block) // 8 * 8)


class CNN(keras_tuner.HyperModel):
    """The space of convolutional networks for small images, from 8x8 pixels.

    A subclass narrows it, or moves its defaults:

        class SmallCNN(CNN):
            max_blocks = 2
            defaults = CNN.defaults | {"num_blocks": 2}

    Args:
        input_shape: (height, width, channels) of raw uint8 pixels.
        total_images: images seen in a whole training; the schedules end there.
    """

    max_blocks: ClassVar[int] = 5
    max_convs_per_block: ClassVar[int] = 2
    filters: ClassVar[tuple[int, int, int]] = (16, 64, 16)  # least, most, step
    growths: ClassVar[tuple[float, ...]] = (1.0, 1.5, 2.0)
    first_kernel_sizes: ClassVar[tuple[int, ...]] = (3, 5)
    paddings: ClassVar[tuple[str, ...]] = ("same", "valid")
    poolings: ClassVar[tuple[str, ...]] = ("max", "average")
    activations: ClassVar[tuple[str, ...]] = ("relu", "elu", "silu")
    features: ClassVar[tuple[str, ...]] = ("flatten", "average", "max")
    max_dropout: ClassVar[float] = 0.5
    dense_units: ClassVar[tuple[int, int, int]] = (0, 512, 64)
    max_shift: ClassVar[int] = 3
    max_erasing: ClassVar[float] = 0.5
    max_label_smoothing: ClassVar[float] = 0.2
    batch_sizes: ClassVar[tuple[int, ...]] = (64, 128, 256)
    schedules: ClassVar[tuple[str, ...]] = optimizers.SCHEDULES
    learning_rates: ClassVar[dict[str, tuple[float, float]]] = {
        "adam": (1e-4, 1e-2),
        "adamw": (1e-4, 1e-2),
        "sgd": (1e-3, 0.5),
    }
    weight_decays: ClassVar[dict[str, tuple[float, float]]] = {
        "adamw": (1e-3, 0.2),
        "sgd": (1e-5, 1e-2),
    }
    momenta: ClassVar[dict[str, tuple[float, float]]] = {"sgd": (0.8, 0.99)}
    defaults: ClassVar[dict[str, Any]] = {
        "num_blocks": 3,
        "convs_per_block": 2,
        "filters": 32,
        "growth": 2.0,
        "first_kernel_size": 3,
        "padding": "same",
        "pooling": "max",
        "last_block_pools": True,
        "activation": "relu",
        "batch_norm": True,
        "conv_dropout": 0.1,
        "features": "flatten",
        "dense_units": 256,
        "dense_dropout": 0.3,
        "flip": True,
        "shift": 2,
        "erasing": 0.0,
        "label_smoothing": 0.0,
        "batch_size": 128,
        "schedule": "warmup_cosine",
        "optimizer": "adamw",
        "adam_learning_rate": 1e-3,
        "adamw_learning_rate": 2e-3,
        "adamw_weight_decay": 2e-2,
        "sgd_learning_rate": 0.05,
        "sgd_weight_decay": 5e-4,
        "sgd_momentum": 0.9,
    }

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, total_images: int
    ) -> None:
        super().__init__()
        if min(input_shape[:2]) < 8:
            raise ValueError(f"Images are at least 8x8 pixels. Received: {input_shape=}")
        self.input_shape = input_shape
        self.num_classes = num_classes
        self.total_images = total_images

    def _read(self, hp: keras_tuner.HyperParameters) -> CNNPoint:
        """All that is asked of hp: one call at any point registers the whole space, as the
        settings of the optimizers not chosen are asked for too, in their conditional scopes."""
        default = self.defaults

        def whole(name: str, least: int, most: int, step: int = 1) -> int:
            return hp.Int(name, least, most, step=step, default=default[name])

        def fraction(name: str, most: float) -> float:
            return hp.Float(name, 0.0, most, step=0.05, default=default[name])

        def choice(name: str, values: Iterable[Any]) -> Any:
            return hp.Choice(name, list(values), default=default[name])

        def switch(name: str) -> bool:
            return hp.Boolean(name, default=default[name])

        return CNNPoint(
            num_blocks=whole("num_blocks", 1, self.max_blocks),
            convs_per_block=whole("convs_per_block", 1, self.max_convs_per_block),
            filters=whole("filters", *self.filters),
            growth=choice("growth", self.growths),
            first_kernel_size=choice("first_kernel_size", self.first_kernel_sizes),
            padding=choice("padding", self.paddings),
            pooling=choice("pooling", self.poolings),
            last_block_pools=switch("last_block_pools"),
            activation=choice("activation", self.activations),
            batch_norm=switch("batch_norm"),
            conv_dropout=fraction("conv_dropout", self.max_dropout),
            features=choice("features", self.features),
            dense_units=whole("dense_units", *self.dense_units),
            dense_dropout=fraction("dense_dropout", self.max_dropout),
            flip=switch("flip"),
            shift=whole("shift", 0, self.max_shift),
            erasing=fraction("erasing", self.max_erasing),
            label_smoothing=fraction("label_smoothing", self.max_label_smoothing),
            batch_size=choice("batch_size", self.batch_sizes),
            schedule=choice("schedule", self.schedules),
            **self._read_optimizer(hp),
        )

    def _read_optimizer(self, hp: keras_tuner.HyperParameters) -> dict[str, Any]:
        default = self.defaults
        chosen = hp.Choice("optimizer", list(self.learning_rates), default=default["optimizer"])
        settings: dict[str, dict[str, float]] = {}
        for optimizer in self.learning_rates:
            settings[optimizer] = {}
            for setting, sampling, ranges in (
                ("learning_rate", "log", self.learning_rates),
                ("weight_decay", "log", self.weight_decays),
                ("momentum", "linear", self.momenta),
            ):
                if optimizer not in ranges:
                    continue
                name = f"{optimizer}_{setting}"
                with hp.conditional_scope("optimizer", [optimizer]):
                    settings[optimizer][setting] = hp.Float(
                        name, *ranges[optimizer], sampling=sampling, default=default[name]
                    )
        return {"optimizer": chosen, **settings[chosen]}

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """The compiled model of the point that hp holds: raw uint8 images in, float32 class
        probabilities out; labels are one-hot."""
        point = self._read(hp)
        inputs = keras.Input(self.input_shape, dtype="uint8")
        x = blocks.scaled(inputs)
        x = augmentation.augmented(x, flip=point.flip, shift=point.shift, erasing=point.erasing)
        outputs = self._body(x, point)
        rate = optimizers.learning_rate_schedule(
            point.schedule,
            point.learning_rate,
            total_steps=max(1, self.total_images // point.batch_size),
        )
        model = keras.Model(inputs, outputs)
        model.compile(
            optimizers.make_optimizer(
                point.optimizer, rate, weight_decay=point.weight_decay, momentum=point.momentum
            ),
            loss=keras.losses.CategoricalCrossentropy(label_smoothing=point.label_smoothing),
            metrics=["accuracy"],
        )
        return model

    def _body(self, x: Any, point: CNNPoint) -> Any:
        for block in range(point.num_blocks):
            kernel_sizes = [3] * point.convs_per_block
            if block == 0:
                kernel_sizes[0] = point.first_kernel_size
            x = blocks.conv_block(
                x,
                point.block_filters(block),
                kernel_sizes=tuple(kernel_sizes),
                padding=point.padding,
                activation=point.activation,
                batch_norm=point.batch_norm,
            )
            last = block == point.num_blocks - 1
            if not last or point.last_block_pools or max(x.shape[1:3]) > MAX_KEPT_MAP:
                x = blocks.pool(x, point.pooling)
            x = blocks.dropout(x, point.conv_dropout)
        return blocks.head(
            x,
            self.num_classes,
            features=point.features,
            dense_units=point.dense_units,
            activation=point.activation,
            dropout_rate=point.dense_dropout,
        )

    def callbacks(self, hp: keras_tuner.HyperParameters) -> list[keras.callbacks.Callback]:
        """What the point needs beside its model; patience is in epochs."""
        if self._read(hp).schedule != "plateau":
            return []
        return [
            keras.callbacks.ReduceLROnPlateau(
                monitor="val_loss", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
            )
        ]
