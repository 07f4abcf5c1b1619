"""Layers computed in another way give what Keras's own give."""

from __future__ import annotations

from contextlib import nullcontext

import keras
import numpy as np
import pytest
from keras import layers

from search.training import quick_layers, training

ON_TENSORFLOW = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="on JAX everything is compiled together"
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
@pytest.mark.parametrize("positions", [(1, 1), (2, 2), (3, 5), (4, 4), (5, 5)])
def test_a_quick_convolution_is_a_convolution(positions, kernel, bias):
    layer = layers.Conv2D(
        3, kernel, padding="same", activation="tanh", use_bias=bias, bias_initializer="normal"
    )
    x = np.random.default_rng(0).standard_normal((2, *positions, 5)).astype(np.float32)
    expected = layer(x)
    np.testing.assert_allclose(quick_layers.QuickConv2D(layer)(x), expected, rtol=0, atol=1e-5)


def step(layer, x, is_training):
    """What a step computes: outputs, gradients, and the statistics that are kept."""
    import tensorflow as tf

    def run():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=is_training)
            loss = tf.reduce_sum(tf.reshape(y, [-1]) * tf.sin(tf.range(tf.size(y), dtype=y.dtype)))
        return [y, *tape.gradient(loss, [x, *layer.trainable_variables])]

    return [*tf.function(run)(), *layer.non_trainable_variables]


@ON_TENSORFLOW
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("shape", [(7, 5, 3, 8), (2, 1, 1, 4), (1, 1, 1, 3)])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"momentum": 0.5}])
def test_a_fused_normalisation_is_keras_s_own(shape, options, is_training):
    import tensorflow as tf

    x = tf.constant(np.random.default_rng(0).normal(3, 2, shape), tf.float32)
    found = []
    for fused in (False, True):
        keras.utils.set_random_seed(0)
        layer = layers.BatchNormalization(
            beta_initializer="normal", gamma_initializer="normal", epsilon=0.01, **options
        )
        layer.build(shape)
        layer.moving_mean.assign(np.arange(shape[-1]))
        layer.moving_variance.assign(np.arange(shape[-1]) + 0.5)
        with quick_layers.fused_batch_norm() if fused else nullcontext():
            found.append(step(layer, x, is_training))
    assert len(found[0]) == len(found[1])
    for own, quick in zip(*found, strict=True):
        np.testing.assert_allclose(quick, own, rtol=1e-4, atol=1e-5)


def operations(layer, x, **options):
    import tensorflow as tf

    traced = tf.function(lambda x: layer(x, **options)).get_concrete_function(
        tf.TensorSpec((None, *x.shape[1:]), x.dtype)
    )
    return {operation.type for operation in traced.graph.get_operations()}


@ON_TENSORFLOW
def test_only_maps_are_normalised_in_one_operation():
    x = np.zeros((4, 3, 3, 2), np.float32)
    with quick_layers.fused_batch_norm():
        assert "FusedBatchNormV3" in operations(layers.BatchNormalization(), x, training=True)
        for layer, of in (
            (layers.BatchNormalization(axis=1), x),
            (layers.BatchNormalization(), x[:, 0]),
            (layers.BatchNormalization(), x[:, 0, 0]),
            (layers.BatchNormalization(dtype="float64"), x.astype(np.float64)),
        ):
            assert "FusedBatchNormV3" not in operations(layer, of, training=True)
    assert "FusedBatchNormV3" not in operations(layers.BatchNormalization(), x, training=True)


@ON_TENSORFLOW
@pytest.mark.parametrize("is_training", [True, False])
def test_under_mixed_precision_it_is_float32_inside(is_training):
    x, found = np.random.default_rng(0).normal(3, 2, (7, 5, 3, 8)).astype(np.float32), []
    for context in (nullcontext, quick_layers.fused_batch_norm):
        layer = layers.BatchNormalization(dtype="mixed_bfloat16")
        with context():
            y = layer(x, training=is_training)
        assert y.dtype.name == "bfloat16"
        found.append([np.asarray(y, np.float32), layer.moving_mean, layer.moving_variance])
    for own, quick in zip(*found, strict=True):
        np.testing.assert_allclose(quick, own, rtol=1e-2, atol=1e-5)  # two of bfloat16's steps


@ON_TENSORFLOW
def test_a_frozen_normalisation_keeps_its_statistics():
    layer = layers.BatchNormalization(trainable=False)
    with quick_layers.fused_batch_norm():
        y = layer(np.full((4, 3, 3, 2), 7, np.float32), training=True)
    np.testing.assert_allclose(y, 7, rtol=1e-3)  # mean 0, variance 1, as they begin
    np.testing.assert_array_equal(layer.moving_mean, 0)


class Sees(layers.Layer):
    """Notes how batches are normalised while it is traced."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x):
        self.seen.append(layers.BatchNormalization.call)
        return x


@ON_TENSORFLOW
def test_a_training_is_with_it_and_leaves_keras_as_it_was():
    own, sees = layers.BatchNormalization.call, Sees()
    model = keras.Sequential(
        [keras.Input((2, 2, 1)), layers.BatchNormalization(), sees, layers.Flatten(),
         layers.Dense(3, activation="softmax")]
    )  # fmt: skip
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    sees.seen.clear()
    plan = training.Plan(20, 10, 2, 5, 0)
    x = np.random.default_rng(0).integers(0, 256, (20, 2, 2, 1)).astype(np.uint8)
    training.train(model, (x, np.arange(20) % 3), plan, validation_data=None, callbacks=[])
    assert sees.seen
    assert own not in sees.seen
    assert layers.BatchNormalization.call is own
