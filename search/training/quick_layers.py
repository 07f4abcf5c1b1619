"""Two of Keras's layers, computed faster on CPUs: convolutions on a few positions, which are what
remains of deep networks for small images once their frozen part is cut off, and normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def fused_batch_norm() -> Iterator[None]:
    """Have what is traced in here normalise batches of images in one operation each way.

    On TensorFlow, Keras (3.15) composes it of ten, each of which reads and writes all maps: a
    tenth of a training step of study cnn's default point. TensorFlow's own, which oneDNN joins
    with the ReLU behind it, gives the same to rounding. In Keras's class, not in a layer of ours:
    models stay plain Keras, and anybody's have it.
    """
    if keras.backend.backend() != "tensorflow" or backend.visible_gpus():
        yield
        return
    layer = keras.layers.BatchNormalization
    plain = layer.call

    def call(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if mask is None and _can_be_fused(self, inputs):
            return _fused(self, inputs, is_training=bool(training and self.trainable))
        return plain(self, inputs, training=training, mask=mask)

    layer.call = call
    try:
        yield
    finally:
        layer.call = plain


def _can_be_fused(layer: Any, inputs: Any) -> bool:
    return (
        len(inputs.shape) == 4
        and layer.axis in (-1, 3)
        and keras.backend.result_type(inputs.dtype, "float32") == "float32"
        and not (getattr(layer, "renorm", False) or layer.synchronized)  # Keras 3.15 has the first
    )


def _fused(layer: Any, inputs: Any, *, is_training: bool) -> Any:
    """What Keras's `call` does."""
    import tensorflow as tf

    x = tf.cast(inputs, "float32")
    channels = x.shape[-1:]
    moving = [tf.cast(each, x.dtype) for each in (layer.moving_mean, layer.moving_variance)]
    known = [tf.zeros([0])] * 2 if is_training else moving
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.cast(layer.gamma, x.dtype) if layer.scale else tf.ones(channels),
        offset=tf.cast(layer.beta, x.dtype) if layer.center else tf.zeros(channels),
        mean=known[0],
        variance=known[1],
        epsilon=layer.epsilon,
        is_training=is_training,
    )
    if not is_training:
        return tf.cast(y, layer.compute_dtype)
    number = tf.cast(tf.reduce_prod(tf.shape(x)[:-1]), x.dtype)
    variance *= (number - 1) / number  # Keras keeps the batch's own, not what it says of others
    layer.moving_mean.assign(moving[0] * layer.momentum + mean * (1 - layer.momentum))
    layer.moving_variance.assign(moving[1] * layer.momentum + variance * (1 - layer.momentum))
    return tf.cast(y, layer.compute_dtype)
