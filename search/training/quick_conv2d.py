"""Convolutions on a few positions, faster than Keras's own on CPUs: what remains of deep networks
for small images once their frozen part is cut off."""

from __future__ import annotations

from typing import Any

import keras

from search.training import backend

# Positions of an image up to which convolutions are sums of matrix products. Time of a training
# step of 128 images, 512 to 512 channels, against Keras's convolution (TensorFlow 2.21, float32,
# AVX-512): 2x2 a quarter, 4x4 two thirds.
_FEW_POSITIONS = 16


def quick(layer: Any) -> Any:
    """The layer, or what computes a small convolution faster."""
    can_be_quick = (
        type(layer) is keras.layers.Conv2D
        and not backend.visible_gpus()
        and layer.padding == "same"
        and layer.strides == layer.dilation_rate == (1, 1)
        and layer.groups == 1
        and layer.data_format == "channels_last"
        and all(size % 2 for size in layer.kernel_size)
        and layer.compute_dtype == "float32"
        and layer.quantization_mode is None
        and layer.activity_regularizer is None
    )
    return QuickConv2D(layer) if can_be_quick else layer


class QuickConv2D(keras.layers.Layer):
    """A Conv2D on few positions: a matrix product for each element of its kernel.

    On 2x2 positions a 3x3 kernel multiplies mostly padding, and TensorFlow is slow at what is left.
    """

    def __init__(self, layer: keras.layers.Conv2D):
        super().__init__(name=layer.name, trainable=layer.trainable)
        self.layer = layer
        self.built = True

    def call(self, x: Any) -> Any:
        height, width = x.shape[1:3]
        if not (height and width and height * width <= _FEW_POSITIONS):
            return self.layer(x)
        rows, columns, channels, filters = self.layer.kernel.shape
        elements = keras.ops.reshape(self.layer.kernel, (rows * columns, channels, filters))
        total: Any = self.layer.bias if self.layer.use_bias else 0.0
        for at, element in enumerate(keras.ops.unstack(elements, rows * columns)):
            down, right = at // columns - rows // 2, at % columns - columns // 2
            if abs(down) >= height or abs(right) >= width:
                continue  # it meets padding only
            seen = x[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
            part = keras.ops.matmul(keras.ops.reshape(seen, (-1, channels)), element)
            part = keras.ops.reshape(part, (-1, *seen.shape[1:3], filters))
            padding = [(max(-shift, 0), max(shift, 0)) for shift in (down, right)]
            total = total + keras.ops.pad(part, ((0, 0), *padding, (0, 0)))
        return self.layer.activation(total)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)
