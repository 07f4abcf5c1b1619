"""What spaces of image classifiers share: raw pixels in, augmentation, loss, optimizer, schedule.

    class Linear(ImageSpace):
        def architecture(self, reader):
            return LinearArchitecture(dropout=reader.fraction("dropout", 0.5))

A subclass reads what lies between scaled images and class probabilities, and brings its defaults;
`build` reads the training after it. A frozen dataclass of plain values stands between the two: all
hyperparameters are read before the first layer is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import keras
import keras_tuner

from spaces import augmentation, blocks, optimizers

MIN_SIZE = 8  # pixels, height and width
PLATEAU_FACTOR = 0.5
PLATEAU_PATIENCE = 1  # epochs


class Architecture(Protocol):
    """One architecture of a space, as plain values."""

    def outputs(self, x: Any, num_classes: int) -> Any:
        """Images (n, height, width, channels) in [0, 1] -> class probabilities (n, num_classes)
        float32."""


@dataclass(frozen=True)
class Training:
    """One way to train, as plain values."""

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
    # Learning rate of a layer over that of the others, by the layer's name.
    layer_rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    """Asks for hyperparameters by name; each has the space's default."""

    hp: keras_tuner.HyperParameters
    defaults: Mapping[str, Any]

    def whole(self, name: str, least: int, most: int, step: int = 1) -> int:
        return self.hp.Int(name, least, most, step=step, default=self.defaults[name])

    def fraction(self, name: str, most: float) -> float:
        return self.hp.Float(name, 0.0, most, step=0.05, default=self.defaults[name])

    def number(self, name: str, least: float, most: float, sampling: str) -> float:
        return self.hp.Float(name, least, most, sampling=sampling, default=self.defaults[name])

    def choice(self, name: str, values: Iterable[Any]) -> Any:
        return self.hp.Choice(name, list(values), default=self.defaults[name])

    def switch(self, name: str) -> bool:
        return self.hp.Boolean(name, default=self.defaults[name])


class ImageSpace(keras_tuner.HyperModel, ABC):
    """A space of classifiers of small images, from 8x8 pixels.

    A subclass narrows it, or moves its defaults, by class attributes:

        class SmallCNN(CNN):
            max_blocks = 2
            defaults = CNN.defaults | {"num_blocks": 2}

    Args:
        input_shape: (height, width, channels) of raw uint8 pixels.
        total_images: images seen in a whole training; the schedules end there.

    Raises:
        ValueError: if the images are smaller.
    """

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
        if min(input_shape[:2]) < MIN_SIZE:
            raise ValueError(
                f"Images are at least {MIN_SIZE}x{MIN_SIZE} pixels. Received: {input_shape=}"
            )
        self.input_shape = input_shape
        self.num_classes = num_classes
        self.total_images = total_images

    @abstractmethod
    def architecture(self, reader: Reader) -> Architecture:
        """Read all that an architecture needs, the same names at every point."""

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """The compiled model of the point that hp holds: raw uint8 images in, float32 class
        probabilities out; labels are one-hot."""
        reader = Reader(hp, self.defaults)
        architecture = self.architecture(reader)
        training = self._training(reader)
        inputs = keras.Input(self.input_shape, dtype="uint8")
        x = blocks.scaled(inputs)
        x = augmentation.augmented(
            x, flip=training.flip, shift=training.shift, erasing=training.erasing
        )
        model = keras.Model(inputs, architecture.outputs(x, self.num_classes))
        rate = optimizers.learning_rate_schedule(
            training.schedule,
            training.learning_rate,
            total_steps=max(1, self.total_images // training.batch_size),
        )
        model.compile(
            optimizers.make_optimizer(
                training.optimizer,
                rate,
                weight_decay=training.weight_decay,
                momentum=training.momentum,
                layer_rates=training.layer_rates,
            ),
            loss=keras.losses.CategoricalCrossentropy(label_smoothing=training.label_smoothing),
            metrics=["accuracy"],
        )
        return model

    def callbacks(self, hp: keras_tuner.HyperParameters) -> list[keras.callbacks.Callback]:
        """What the point needs beside its model; patience is in epochs."""
        if self._training(Reader(hp, self.defaults)).schedule != "plateau":
            return []
        return [
            keras.callbacks.ReduceLROnPlateau(
                monitor="val_loss", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
            )
        ]

    def before_saving(self, model: keras.Model) -> None:
        optimizers.make_plain(model)

    def _training(self, reader: Reader) -> Training:
        return Training(
            **self._augmentation(reader),
            label_smoothing=reader.fraction("label_smoothing", self.max_label_smoothing),
            batch_size=reader.choice("batch_size", self.batch_sizes),
            schedule=reader.choice("schedule", self.schedules),
            **self._optimizer(reader),
        )

    def _augmentation(self, reader: Reader) -> dict[str, Any]:
        return {
            "flip": reader.switch("flip"),
            "shift": reader.whole("shift", 0, self.max_shift),
            "erasing": reader.fraction("erasing", self.max_erasing),
        }

    def _optimizer(self, reader: Reader) -> dict[str, Any]:
        """One call at any point registers the settings of the optimizers not chosen too, in their
        conditional scopes."""
        chosen = reader.choice("optimizer", self.learning_rates)
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
                with reader.hp.conditional_scope("optimizer", [optimizer]):
                    settings[optimizer][setting] = reader.number(
                        f"{optimizer}_{setting}", *ranges[optimizer], sampling
                    )
        return {"optimizer": chosen, **settings[chosen]}
