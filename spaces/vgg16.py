"""ImageNet's VGG16 with a head of its own: how deep it is trained is a hyperparameter.

    model = VGG16((28, 28, 1), 10, total_images=270_000).build(keras_tuner.HyperParameters())

The network is that of keras.applications, layer by layer under the same names, in one graph with
what prepares the images and with the head: its weights load with Keras's own loader, and the frozen
part can be cut off. Without augmentation, which is offered only where nothing is frozen, that part
gives the same activations for an image at each step.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import keras
import numpy as np

from spaces import blocks
from spaces.image import ImageSpace, Reader, Training

CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each block
NUM_BLOCKS = len(CONVOLUTIONS)
# Of ImageNet's pixels, blue green red: keras/src/applications/imagenet_utils.py, mode "caffe".
MEANS = (103.939, 116.779, 123.68)
# Blocks halve height and width: the last map of a smaller image is one pixel, already a vector.
LEAST_SIZE_WITH_A_MAP = 2 * 2**NUM_BLOCKS
RANDOM = "none"  # instead of a weights file


@dataclass(frozen=True)
class VGG16Architecture:
    """One architecture of the space, as plain values."""

    weights: str  # as the space takes it
    num_unfrozen_blocks: int  # the last ones, trained together with the head
    input_size: int  # pixels, height and width
    features: str  # how the last map becomes a vector
    dense_layers: int  # before the last layer
    dense_units: int
    head_batch_norm: bool  # of the vector, and of dense layers before their activation
    dropout: float  # before each dense layer, the last one included

    def outputs(self, x: Any, num_classes: int) -> Any:
        x = prepared(x, self.input_size)
        x = pretrained(x, self.weights, convolutions(self.num_unfrozen_blocks))
        x = blocks.FEATURES[self.features]()(x)
        if self.head_batch_norm:
            x = keras.layers.BatchNormalization(momentum=blocks.BATCH_NORM_MOMENTUM)(x)
        for _ in range(self.dense_layers):
            x = blocks.dropout(x, self.dropout)
            x = blocks.dense_block(x, self.dense_units, batch_norm=self.head_batch_norm)
        return blocks.probabilities(blocks.dropout(x, self.dropout), num_classes)


def convolutions(num_blocks: int) -> tuple[str, ...]:
    """Names of the layers with weights in the last blocks."""
    return tuple(
        f"block{block + 1}_conv{conv + 1}"
        for block in range(NUM_BLOCKS - num_blocks, NUM_BLOCKS)
        for conv in range(CONVOLUTIONS[block])
    )


def prepared(x: Any, size: int) -> Any:
    """Images (n, height, width, 1 or 3) in [0, 1] -> (n, size, size, 3) float32 as VGG16 takes
    them: blue green red, ImageNet's mean taken off, not scaled."""
    if x.shape[1:3] != (size, size):
        x = keras.layers.Resizing(size, size, dtype="float32")(x)
    if x.shape[-1] == 1:
        x = keras.layers.Concatenate(dtype="float32")([x, x, x])
    else:
        x = keras.ops.flip(x, axis=-1)
    # In float32 also under mixed precision, where 103.939 would be 104.
    return keras.layers.Rescaling(255.0, [-mean for mean in MEANS], dtype="float32")(x)


def pretrained(x: Any, weights: str, unfrozen: tuple[str, ...]) -> Any:
    """Prepared images -> the maps of VGG16's last block.

    Args:
        weights: "imagenet" (which Keras fetches, where they aren't cached), "none" for random
            ones, or a file that holds all of VGG16's without its top.
        unfrozen: names of the layers that are trained.

    Raises:
        ValueError: if the file is of another layout; the message names it and says what differs.
    """
    try:
        network = keras.applications.VGG16(
            include_top=False, weights=None if weights == RANDOM else weights, input_tensor=x
        )
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        if weights in (RANDOM, "imagenet"):
            raise
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{weights} is no file of VGG16's weights without its top (include_top=False): {why}"
        ) from error
    if weights == RANDOM:
        _set_random(network)
    for name in convolutions(NUM_BLOCKS):
        network.get_layer(name).trainable = name in unfrozen
    return network.output


def _set_random(network: keras.Model) -> None:
    """The same weights at each call, as a file would give: a frozen part is the same function in
    every model. Their variance (arXiv:1502.01852) keeps thirteen layers trainable."""
    rng = np.random.default_rng(0)
    for name in convolutions(NUM_BLOCKS):
        kernel, bias = network.get_layer(name).weights
        spread = (2 / math.prod(kernel.shape[:3])) ** 0.5
        kernel.assign(spread * rng.standard_normal(kernel.shape, "float32"))
        bias.assign(np.zeros(bias.shape, "float32"))


class VGG16(ImageSpace):
    """The space of heads on, and fine-tunings of, a VGG16 that was trained on ImageNet.

    Args:
        input_shape: as of every ImageSpace, with 1 or 3 channels.
        weights: "imagenet", "none" for random ones (always the same), or a file in one of Keras's
            layouts.
    """

    input_sizes: ClassVar[tuple[int, ...]] = (32, 48, 64)
    max_dense_layers: ClassVar[int] = 2
    dense_units: ClassVar[tuple[int, int, int]] = (64, 512, 64)  # least, most, step
    features: ClassVar[tuple[str, ...]] = ("flatten", "average", "max")
    max_dropout: ClassVar[float] = 0.5
    # Of the unfrozen blocks' learning rate over the head's.
    rate_ratios: ClassVar[tuple[float, float]] = (1e-3, 1.0)
    # VGG16 has no normalisation to bear the rates of a network that has.
    learning_rates: ClassVar[dict[str, tuple[float, float]]] = {
        "adam": (1e-4, 1e-2),
        "adamw": (1e-4, 1e-2),
        "sgd": (1e-3, 0.1),
    }
    defaults: ClassVar[dict[str, Any]] = ImageSpace.defaults | {
        "num_unfrozen_blocks": 2,
        "unfrozen_rate_ratio": 0.05,
        "input_size": 32,
        "features": "average",
        "dense_layers": 1,
        "dense_units": 256,
        "head_batch_norm": True,
        "dropout": 0.3,
        "adamw_learning_rate": 1e-3,
        "sgd_learning_rate": 0.01,
    }

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        total_images: int,
        weights: str = "imagenet",
    ) -> None:
        super().__init__(input_shape, num_classes, total_images)
        if input_shape[2] not in (1, 3):
            raise ValueError(f"Images are grey (1 channel) or RGB (3). Received: {input_shape=}")
        self.weights = weights

    def architecture(self, reader: Reader) -> VGG16Architecture:
        num_unfrozen_blocks = reader.whole("num_unfrozen_blocks", 0, NUM_BLOCKS)
        input_size = reader.choice("input_size", self.input_sizes)
        features = None
        if with_a_map := [size for size in self.input_sizes if size >= LEAST_SIZE_WITH_A_MAP]:
            with reader.hp.conditional_scope("input_size", with_a_map):
                features = reader.choice("features", self.features)
        dense_layers = reader.whole("dense_layers", 0, self.max_dense_layers)
        some = list(range(1, self.max_dense_layers + 1))
        with reader.hp.conditional_scope("dense_layers", some):
            dense_units = reader.whole("dense_units", *self.dense_units)
        return VGG16Architecture(
            weights=self.weights,
            num_unfrozen_blocks=num_unfrozen_blocks,
            input_size=input_size,
            features=features or "flatten",
            dense_layers=dense_layers,
            dense_units=dense_units or 0,
            head_batch_norm=reader.switch("head_batch_norm"),
            dropout=reader.fraction("dropout", self.max_dropout),
        )

    def _training(self, reader: Reader) -> Training:
        num_unfrozen_blocks = reader.whole("num_unfrozen_blocks", 0, NUM_BLOCKS)
        some = list(range(1, NUM_BLOCKS + 1))
        with reader.hp.conditional_scope("num_unfrozen_blocks", some):
            ratio = reader.number("unfrozen_rate_ratio", *self.rate_ratios, "log")
        rates = dict.fromkeys(convolutions(num_unfrozen_blocks), ratio)
        return replace(super()._training(reader), layer_rates=rates)

    def _augmentation(self, reader: Reader) -> dict[str, Any]:
        """None where a block is frozen: its activations for an image are computed once."""
        with reader.hp.conditional_scope("num_unfrozen_blocks", [NUM_BLOCKS]):
            augmentation = super()._augmentation(reader)
        if reader.hp.get("num_unfrozen_blocks") < NUM_BLOCKS:
            return {"flip": False, "shift": 0, "erasing": 0.0}
        return augmentation
