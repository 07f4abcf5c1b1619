import time

import keras
import keras_tuner
import numpy as np
import pytest
from keras import layers, ops

from search.training import complexity
from spaces.cnn import CNN
from spaces.resnet import ResNet
from tests.spaces.points import point


def model_of(layer, *shapes):
    inputs = [keras.Input(shape) for shape in shapes]
    return keras.Model(inputs, layer(inputs if len(inputs) > 1 else inputs[0]))


# Counted by hand: 2 a multiplication and addition, 1 a bias, 1 an activation, 5 a softmax.
@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (layers.Dense(7), (5,), 2 * 5 * 7 + 7),
        (layers.Dense(7, use_bias=False), (5,), 2 * 5 * 7),
        (layers.Dense(7, "relu"), (3, 5), 3 * (2 * 5 * 7 + 7 + 7)),
        (layers.Dense(7, "softmax"), (5,), 2 * 5 * 7 + 7 + 5 * 7),
        (layers.EinsumDense("bte,ef->btf", (3, 7), bias_axes="f"), (3, 5), 3 * (2 * 5 * 7 + 7)),
        (layers.EinsumDense("...te,etf->...f", (7,)), (3, 5), 2 * 3 * 5 * 7),
        (layers.Conv1D(4, 3), (10, 2), 8 * 4 * (2 * 3 * 2 + 1)),
        (layers.Conv2D(4, 3), (8, 6, 2), 6 * 4 * 4 * (2 * 9 * 2 + 1)),
        (layers.Conv2D(4, (3, 5), padding="same"), (8, 6, 2), 48 * 4 * (2 * 15 * 2 + 1)),
        (layers.Conv2D(4, 3, strides=2, padding="same"), (7, 7, 2), 16 * 4 * (2 * 9 * 2 + 1)),
        (layers.Conv2D(4, 3, dilation_rate=2), (8, 8, 2), 16 * 4 * (2 * 9 * 2 + 1)),
        (layers.Conv2D(4, 3, groups=2, activation="relu"), (8, 6, 2), 24 * 4 * (2 * 9 + 1 + 1)),
        (layers.Conv3D(4, 2), (3, 3, 3, 2), 8 * 4 * (2 * 8 * 2 + 1)),
        (
            layers.Conv2DTranspose(4, 3, strides=2, padding="same"),
            (5, 5, 2),
            25 * 2 * 9 * 2 * 4 + 10 * 10 * 4,
        ),
        (layers.DepthwiseConv2D(3), (8, 6, 2), 24 * 2 * (2 * 9 + 1)),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 6, 2), 24 * 4 * (2 * 9 + 1)),
        (layers.SeparableConv2D(4, 3), (8, 6, 2), 24 * (2 * 9 * 2 + 2 * 2 * 4 + 4)),
        (layers.BatchNormalization(), (4, 4, 3), 2 * 48),
        (layers.LayerNormalization(), (4, 3), 7 * 12),
        (layers.GroupNormalization(1), (4, 3), 7 * 12),
        (layers.UnitNormalization(), (4, 3), 3 * 12),
        (layers.SpectralNormalization(layers.Dense(7)), (5,), 2 * 5 * 7 + 7),
        (layers.Rescaling(1 / 255), (4, 4, 1), 2 * 16),
        (layers.Activation("silu"), (4, 3), 12),
        (layers.Activation("linear"), (4, 3), 0),
        (layers.Activation("softmax"), (4, 3), 5 * 12),
        (layers.Softmax(), (4, 3), 5 * 12),
        (layers.LeakyReLU(), (4, 3), 12),
        (layers.MaxPooling2D(2), (5, 4, 3), 4 * 2 * 2 * 3),
        (layers.AveragePooling2D(3, 1, "same"), (5, 4, 3), 9 * 5 * 4 * 3),
        (layers.GlobalAveragePooling2D(), (5, 4, 3), 60),
        (layers.GlobalMaxPooling1D(), (5, 4), 20),
        (layers.UpSampling2D(2, interpolation="nearest"), (3, 3, 2), 0),
        (layers.UpSampling2D(2, interpolation="bilinear"), (3, 3, 2), 2 * 4 * 72),
        (layers.Resizing(6, 6), (3, 3, 2), 2 * 4 * 72),
        (layers.SimpleRNN(4), (6, 3), 6 * 2 * (3 * 4 + 4 * 4 + 4)),
        (layers.LSTM(4, return_sequences=True), (6, 3), 6 * 2 * 4 * (3 * 4 + 4 * 4 + 4)),
        (layers.ConvLSTM2D(4, 3, padding="same"), (6, 5, 5, 3), 6 * 25 * 2 * 4 * (63 * 4 + 4)),
        (
            layers.Bidirectional(layers.SimpleRNN(4), merge_mode="sum"),
            (6, 3),
            2 * 6 * 2 * (3 * 4 + 4 * 4 + 4) + 4,
        ),
        (layers.TimeDistributed(layers.Conv2D(4, 3)), (5, 8, 6, 2), 5 * 24 * 4 * (2 * 9 * 2 + 1)),
    ],
    ids=lambda value: value.name if isinstance(value, keras.Layer) else None,
)
def test_a_layer(layer, shape, expected):
    assert complexity.flops(model_of(layer, shape)) == expected


@pytest.mark.parametrize(
    "layer",
    [
        layers.Flatten(),
        layers.Reshape((8, 6)),
        layers.Permute((2, 1, 3)),
        layers.ZeroPadding2D(),
        layers.Cropping2D(),
        layers.Dropout(0.5),
        layers.SpatialDropout2D(0.5),
        layers.GaussianNoise(0.1),
        layers.RandomFlip(),
        layers.RandomErasing(),
        layers.Identity(),
    ],
    ids=lambda layer: layer.name,
)
def test_what_moves_numbers_or_trains_costs_nothing(layer):
    assert complexity.flops(model_of(layer, (4, 4, 3))) == 0


@pytest.mark.parametrize(
    ("layer", "num_inputs", "expected"),
    [
        (layers.Add(), 2, 12),
        (layers.Multiply(), 3, 2 * 12),
        (layers.Average(), 3, 3 * 12),
        (layers.Concatenate(), 3, 0),
        (layers.Dot(axes=2), 2, 2 * 4 * 4 * 3),
        (layers.Attention(), 2, 16 * (2 * 3 + 5 + 2 * 3)),
        (layers.AdditiveAttention(), 2, 16 * (4 * 3 + 5 + 2 * 3)),
    ],
    ids=lambda value: value.name if isinstance(value, keras.Layer) else None,
)
def test_a_layer_of_several_inputs(layer, num_inputs, expected):
    assert complexity.flops(model_of(layer, *[(4, 3)] * num_inputs)) == expected


@pytest.mark.parametrize("order", ["positional", "named"])
def test_attention_of_several_heads(order):
    query, value = keras.Input((4, 6)), keras.Input((5, 3))
    attend = layers.MultiHeadAttention(num_heads=2, key_dim=7, value_dim=8)
    if order == "positional":
        outputs = attend(query, value)
    else:
        outputs = attend(key=value, value=value, query=query)
    projections = (
        4 * (2 * 6 * 14 + 14) + 5 * (2 * 3 * 14 + 14) + 5 * (2 * 3 * 16 + 16) + 4 * (2 * 16 * 6 + 6)
    )
    attention = 2 * 4 * 7 + 2 * 4 * 5 * (2 * 7 + 5 + 2 * 8)
    assert complexity.flops(keras.Model([query, value], outputs)) == projections + attention


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x: x + 1.0, 12),
        (lambda x: x * x, 12),
        (lambda x: ops.mean(x, axis=1), 12),
        (lambda x: ops.softmax(x), 5 * 12),
        (lambda x: ops.reshape(x, (-1, 12)), 0),
        (lambda x: x[:, :2], 0),
        (lambda x: ops.matmul(x, ops.transpose(x, (0, 2, 1))), 2 * 4 * 4 * 3),
        (lambda x: ops.einsum("bij,bkj->bik", x, x), 2 * 4 * 4 * 3),
        (lambda x: ops.einsum("...ij,...kj->...ik", x, x), 2 * 4 * 4 * 3),
    ],
)
def test_an_operation(operation, expected):
    assert complexity.flops(model_of(operation, (4, 3))) == expected


class Doubled(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(5, use_bias=False)

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, x):
        return self.inner(x) * 2


def test_a_layer_of_ones_own_uses_each_weight_at_each_position():
    assert complexity.flops(model_of(Doubled(), (4, 3))) == 4 * 2 * 3 * 5
    assert complexity.flops(model_of(layers.Lambda(lambda x: x[:, :1]), (4, 3))) == 12


def test_a_subclass_of_a_keras_layer_is_that_layer():
    class Mine(layers.Conv2D):
        pass

    assert complexity.flops(model_of(Mine(4, 3), (8, 6, 2))) == 24 * 4 * (2 * 9 * 2 + 1)


def test_a_rule_that_fails_leaves_an_estimate():
    class Quantised(layers.Dense):
        @property
        def kernel(self):
            raise AttributeError("no kernel")

        def build(self, input_shape):
            self.codes = self.add_weight(shape=(3, 7))

        def call(self, x):
            return ops.matmul(x, self.codes)

    assert complexity.flops(model_of(Quantised(7), (4, 3))) == 4 * 2 * 3 * 7


def test_a_shared_layer_counts_each_time_its_weights_once():
    dense = layers.Dense(5)
    inputs = keras.Input((5,))
    model = keras.Model(inputs, dense(dense(dense(inputs))))
    assert complexity.flops(model) == 3 * (2 * 5 * 5 + 5)
    assert complexity.parameters(model) == 5 * 5 + 5


def test_layers_that_lead_nowhere_do_not_count():
    inputs = keras.Input((5,))
    layers.Dense(100)(inputs)
    assert complexity.flops(keras.Model(inputs, layers.Dense(5)(inputs))) == 2 * 5 * 5 + 5


@pytest.mark.parametrize("size", [8, None], ids=["of one size", "of any size"])
def test_a_nested_model_counts_with_the_sizes_that_it_is_called_on(size):
    stem = [layers.Conv2D(2, 3, padding="same"), layers.MaxPooling2D(2)]
    nested = keras.Sequential([keras.Input((size, size, 1)), *stem])
    outer = keras.Sequential([keras.Input((size, size, 1)), nested, layers.ReLU()])
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, outer(inputs))
    assert complexity.flops(model) == 64 * 2 * (2 * 9 + 1) + 4 * 32 + 32


def test_one_image_of_a_batch_of_fixed_size():
    inputs = keras.Input(batch_shape=(32, 5))
    assert complexity.flops(keras.Model(inputs, layers.Dense(7)(inputs))) == 2 * 5 * 7 + 7


def test_a_model_without_a_graph_has_a_lower_bound():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(7)

        def call(self, x):
            return self.dense(x)

    model = Mine()
    with pytest.raises(ValueError, match=r"isn't built has no shapes. Received: <Mine"):
        complexity.flops(model)
    model(np.zeros((1, 5)))
    assert complexity.flops(model) == 2 * (5 * 7 + 7)


# Billions of multiplications and additions, counted once: ResNet-50 3.8 (arXiv:1512.03385, table
# 1; 4.1 is of a later variant that halves maps in its 3x3 convolutions), VGG-16 15.5, of which its
# dense layers have 0.12.
def test_published_figures():
    resnet50 = keras.applications.ResNet50(weights=None)
    assert complexity.flops(resnet50) / 2e9 == pytest.approx(3.87, rel=0.01)
    vgg16 = keras.applications.VGG16(weights=None, include_top=False)  # of any size
    inputs = keras.Input((224, 224, 3))
    convolutions = complexity.flops(keras.Model(inputs, vgg16(inputs)))
    assert convolutions / 2e9 == pytest.approx(15.5 - 0.12, rel=0.01)


def of_space(space, values, shape=(28, 28, 1)):
    return space(shape, 10, 12_800).build(point(values))


def hyper_xception():
    space = keras_tuner.applications.HyperXception(input_shape=(32, 32, 3), classes=10)
    return space.build(point({}))


def counted_by_tensorflow(model):
    import tensorflow as tf
    from tensorflow.python.profiler import model_analyzer, option_builder

    images = tf.TensorSpec((1, *model.input_shape[1:]), model.inputs[0].dtype)
    call = tf.function(lambda x: model(x, training=False)).get_concrete_function(images)
    options = option_builder.ProfileOptionBuilder.float_operation() | {"output": "none"}
    return model_analyzer.profile(call.graph, options=options).total_float_ops


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's profiler")
@pytest.mark.parametrize(
    "build",
    [
        lambda: of_space(CNN, {}),
        lambda: of_space(ResNet, {"order": "pre", "shortcut": "average_projection"}),
        hyper_xception,
        lambda: keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), classes=10),
    ],
    ids=["cnn", "resnet", "xception", "vgg16"],
)
def test_tensorflow_counts_the_same(build):
    model = build()
    assert complexity.flops(model) == pytest.approx(counted_by_tensorflow(model), rel=0.01)


def test_a_training_step_keeps_tensors_from_the_first_trained_layer_on():
    """What comes before has no gradient; a frozen layer behind hands one on."""
    stem, trained, behind = (layers.Conv2D(n, 3, padding="same") for n in (7, 2, 5))
    stem.trainable = behind.trainable = False
    inputs = keras.Input((8, 8, 1))
    x = stem(layers.Rescaling(1 / 255)(inputs))
    x = layers.Flatten()(behind(layers.ReLU()(trained(x))))
    model = keras.Model(inputs, layers.Dense(3)(x))
    in_training = trained.count_params() + model.layers[-1].count_params()
    numbers = 64 * (2 + 2 + 5 + 5) + 3  # with the activation's, and the same again, flattened
    expected = 4 * (model.count_params() + 3 * in_training + 2 * 10 * numbers)
    assert complexity.training_bytes(model, 10) == expected


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_training_step_keeps_the_tensors_of_a_model_in_a_model(is_trained):
    def stack(x):
        for filters in (4, 8):
            x = layers.Conv2D(filters, 3, padding="same")(x)
        return layers.GlobalAveragePooling2D()(x)

    inner_inputs, inputs = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    base = keras.Model(inner_inputs, stack(inner_inputs))
    base.trainable = is_trained
    nested = keras.Model(inputs, layers.Dense(3)(base(inputs)))
    flat = keras.Model(base.inputs, layers.Dense(3)(base.outputs[0]))
    assert complexity.training_bytes(nested, 10) == complexity.training_bytes(flat, 10)


def test_counting_takes_a_few_milliseconds():
    model = of_space(ResNet, {"num_stages": 4, "blocks_per_stage": 3})
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        complexity.flops(model)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05
