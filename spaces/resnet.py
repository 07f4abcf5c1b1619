"""Residual networks: stages of residual blocks, each of half the height and width of the last.

    model = ResNet((28, 28, 1), 10, total_images=270_000).build(keras_tuner.HyperParameters())

The defaults are a strong model as it stands. Three rules keep the dearest point at less than five
times the defaults' cost: a stage of several blocks has so many fewer filters that it costs no more
than a stage of one, about (depth is weighed against width, not against time), no layer has more
than MAX_FILTERS filters, and the size of kernel is a choice for the stem only, where a map has few
channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import keras

from spaces import blocks
from spaces.image import ImageSpace, Reader

MAX_FILTERS = 256


@dataclass(frozen=True)
class ResNetArchitecture:
    """One architecture of the space, as plain values."""

    num_stages: int
    blocks_per_stage: int  # of two 3x3 convolutions each
    filters: int  # of the first stage, were it one block: see `stage_filters`
    growth: float  # filters of a stage over those of the stage before
    stem_kernel_size: int  # of the convolution before the first stage
    order: str  # "post": convolve, normalise, activate; "pre": normalise, activate, convolve
    shortcut: str  # where shapes differ; see `_projected`
    block_dropout: float  # between a block's convolutions
    head_dropout: float  # before the last layer

    def stage_filters(self, stage: int) -> int:
        """Filters of stage 0, 1, ...: a multiple of 8, the width of a CPU's vector.

        A convolution's cost grows with the square of its filters, a stage's with its blocks: hence
        the square root.
        """
        first = max(8, int(self.filters / self.blocks_per_stage**0.5) // 8 * 8)
        return min(MAX_FILTERS, int(first * self.growth**stage) // 8 * 8)

    def outputs(self, x: Any, num_classes: int) -> Any:
        x = _convolved(x, self.stage_filters(0), self.stem_kernel_size)
        if self.order == "post":
            x = _activated(x)
        for stage in range(self.num_stages):
            for block in range(self.blocks_per_stage):
                x = residual_block(
                    x,
                    self.stage_filters(stage),
                    halve=stage > 0 and block == 0,
                    order=self.order,
                    shortcut=self.shortcut,
                    dropout_rate=self.block_dropout,
                )
        if self.order == "pre":
            x = _activated(x)
        return blocks.head(x, num_classes, features="average", dropout_rate=self.head_dropout)


class ResNet(ImageSpace):
    """The space of residual networks for small images, from 8x8 pixels."""

    max_stages: ClassVar[int] = 4
    max_blocks_per_stage: ClassVar[int] = 3
    filters: ClassVar[tuple[int, int, int]] = (16, 64, 8)  # least, most, step
    growths: ClassVar[tuple[float, ...]] = (1.0, 1.5, 2.0)
    stem_kernel_sizes: ClassVar[tuple[int, ...]] = (3, 5, 7)
    orders: ClassVar[tuple[str, ...]] = ("post", "pre")
    shortcuts: ClassVar[tuple[str, ...]] = ("projection", "average_projection")
    max_dropout: ClassVar[float] = 0.5
    defaults: ClassVar[dict[str, Any]] = ImageSpace.defaults | {
        "num_stages": 3,
        "blocks_per_stage": 1,
        "filters": 32,
        "growth": 2.0,
        "stem_kernel_size": 3,
        "order": "post",
        "shortcut": "projection",
        "block_dropout": 0.0,
        "head_dropout": 0.2,
    }

    def architecture(self, reader: Reader) -> ResNetArchitecture:
        return ResNetArchitecture(
            num_stages=reader.whole("num_stages", 1, self.max_stages),
            blocks_per_stage=reader.whole("blocks_per_stage", 1, self.max_blocks_per_stage),
            filters=reader.whole("filters", *self.filters),
            growth=reader.choice("growth", self.growths),
            stem_kernel_size=reader.choice("stem_kernel_size", self.stem_kernel_sizes),
            order=reader.choice("order", self.orders),
            shortcut=reader.choice("shortcut", self.shortcuts),
            block_dropout=reader.fraction("block_dropout", self.max_dropout),
            head_dropout=reader.fraction("head_dropout", self.max_dropout),
        )


def residual_block(
    x: Any,
    filters: int,
    *,
    halve: bool,
    order: str = "post",
    shortcut: str = "projection",
    dropout_rate: float = 0.0,
) -> Any:
    """Two 3x3 convolutions, and a shortcut past them that is added to what they give.

    Args:
        x: maps (n, height, width, channels).
        halve: height and width, rounded up: a map never vanishes.
        order: "post" ends in an activation (arXiv:1512.03385); "pre" begins with one, and nothing
            but the sum stands between one block and the next (arXiv:1603.05027).
        shortcut: where height, width or channels change: "projection" or "average_projection".
        dropout_rate: between the convolutions (arXiv:1605.07146).
    """
    inner = _activated(x) if order == "pre" else x
    skipped = x
    if halve or x.shape[-1] != filters:
        skipped = _projected(inner, filters, halve=halve, kind=shortcut)
        if order == "post":
            skipped = _normalised(skipped)
    inner = _activated(_convolved(inner, filters, 3, strides=2 if halve else 1))
    inner = _convolved(blocks.dropout(inner, dropout_rate), filters, 3)
    if order == "pre":
        return keras.layers.Add()([skipped, inner])
    return keras.layers.Activation("relu")(keras.layers.Add()([skipped, _normalised(inner)]))


def _projected(x: Any, filters: int, *, halve: bool, kind: str) -> Any:
    """A 1x1 convolution; to halve, "projection" sees one pixel of four (arXiv:1512.03385) and
    "average_projection" their average (ResNet-D, arXiv:1812.01187)."""
    if halve and kind == "average_projection":
        return _convolved(keras.layers.AveragePooling2D(2, padding="same")(x), filters, 1)
    return _convolved(x, filters, 1, strides=2 if halve else 1)


def _convolved(x: Any, filters: int, kernel_size: int, *, strides: int = 1) -> Any:
    """The batch normalisation that follows each convolution, sooner or later, has the bias."""
    return keras.layers.Conv2D(
        filters, kernel_size, strides=strides, padding="same", use_bias=False
    )(x)


def _normalised(x: Any) -> Any:
    return keras.layers.BatchNormalization(momentum=blocks.BATCH_NORM_MOMENTUM)(x)


def _activated(x: Any) -> Any:
    return keras.layers.Activation("relu")(_normalised(x))
