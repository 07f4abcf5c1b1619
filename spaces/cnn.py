"""Convolutional networks: blocks of convolutions and pooling, then a dense head.

    model = CNN((28, 28, 1), 10, total_images=270_000).build(keras_tuner.HyperParameters())

The defaults are a strong model as it stands. Two rules keep the dearest point at about five times
the defaults' cost: the second size of kernel is offered to the first convolution only, where a map
has few channels, and no layer has more than MAX_FILTERS filters. A third bounds the dense layer's
weights: the last block may keep its map only where that is at most MAX_KEPT_MAP pixels wide (of
images above SMALL_IMAGE a few blocks still leave tens of millions; a study's `max_parameters` or
`max_memory` refuses such points). A fourth keeps shallow networks from being blind: a map that is
wider than about MAX_GLOBAL_MAP pixels is flattened, unless the images are so large that this would
make too many weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from spaces import blocks
from spaces.image import ImageSpace, Reader

MAX_FILTERS = 256
MAX_KEPT_MAP = 8
# A global average or maximum of one or two blocks says which edges an image has, not where. Of six
# such networks, drawn at random and trained on 6 x 20 000 images of Fashion-MNIST, none had more
# than 73 % right; of the ten others that learnt at all, none had less than 77 %.
MAX_GLOBAL_MAP = 4  # pixels, after as many halvings as there are blocks
SMALL_IMAGE = 32  # pixels, height and width, at most


@dataclass(frozen=True)
class CNNArchitecture:
    """One architecture of the space, as plain values."""

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

    def block_filters(self, block: int) -> int:
        """Filters of block 0, 1, ...: a multiple of 8, the width of a CPU's vector."""
        return max(8, min(MAX_FILTERS, int(self.filters * self.growth**block) // 8 * 8))

    def outputs(self, x: Any, num_classes: int) -> Any:
        for block in range(self.num_blocks):
            kernel_sizes = [3] * self.convs_per_block
            if block == 0:
                kernel_sizes[0] = self.first_kernel_size
            x = blocks.conv_block(
                x,
                self.block_filters(block),
                kernel_sizes=tuple(kernel_sizes),
                padding=self.padding,
                activation=self.activation,
                batch_norm=self.batch_norm,
            )
            last = block == self.num_blocks - 1
            if not last or self.last_block_pools or max(x.shape[1:3]) > MAX_KEPT_MAP:
                x = blocks.pool(x, self.pooling)
            x = blocks.dropout(x, self.conv_dropout)
        return blocks.head(
            x,
            num_classes,
            features=self.features,
            dense_units=self.dense_units,
            activation=self.activation,
            dropout_rate=self.dense_dropout,
        )


class CNN(ImageSpace):
    """The space of convolutional networks for small images, from 8x8 pixels."""

    max_blocks: ClassVar[int] = 5
    max_convs_per_block: ClassVar[int] = 2
    filters: ClassVar[tuple[int, int, int]] = (16, 64, 16)  # least, most, step
    growths: ClassVar[tuple[float, ...]] = (1.0, 1.5, 2.0)
    first_kernel_sizes: ClassVar[tuple[int, ...]] = (3, 5)
    paddings: ClassVar[tuple[str, ...]] = ("same", "valid")
    poolings: ClassVar[tuple[str, ...]] = ("max", "average")
    activations: ClassVar[tuple[str, ...]] = ("relu", "elu", "silu")
    features: ClassVar[tuple[str, ...]] = ("flatten", "average", "max")
    max_conv_dropout: ClassVar[float] = 0.5
    max_dense_dropout: ClassVar[float] = 0.5
    dense_units: ClassVar[tuple[int, int, int]] = (0, 512, 64)
    defaults: ClassVar[dict[str, Any]] = ImageSpace.defaults | {
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
    }

    def architecture(self, reader: Reader) -> CNNArchitecture:
        num_blocks = reader.whole("num_blocks", 1, self.max_blocks)
        return CNNArchitecture(
            num_blocks=num_blocks,
            convs_per_block=reader.whole("convs_per_block", 1, self.max_convs_per_block),
            filters=reader.whole("filters", *self.filters),
            growth=reader.choice("growth", self.growths),
            first_kernel_size=reader.choice("first_kernel_size", self.first_kernel_sizes),
            padding=reader.choice("padding", self.paddings),
            pooling=reader.choice("pooling", self.poolings),
            last_block_pools=reader.switch("last_block_pools"),
            activation=reader.choice("activation", self.activations),
            batch_norm=reader.switch("batch_norm"),
            conv_dropout=reader.fraction("conv_dropout", self.max_conv_dropout),
            features=self._features(reader, num_blocks),
            dense_units=reader.whole("dense_units", *self.dense_units),
            dense_dropout=reader.fraction("dense_dropout", self.max_dense_dropout),
        )

    def _features(self, reader: Reader, num_blocks: int) -> str:
        size = max(self.input_shape[:2])
        enough = [
            count
            for count in range(1, self.max_blocks + 1)
            if size > SMALL_IMAGE or size / 2**count <= MAX_GLOBAL_MAP
        ]
        if not enough:
            return "flatten"
        with reader.hp.conditional_scope("num_blocks", enough):
            features = reader.choice("features", self.features)
        return features if num_blocks in enough else "flatten"
