import keras
import numpy as np
import pytest
from keras import layers

from search.training import backend, features, quick_layers
from search.training.backend import Rows

SIZE = 8  # of the images


@pytest.fixture(autouse=True)
def _alike():
    keras.utils.set_random_seed(1)  # sums in another order differ more with some weights
    yield
    keras.config.set_dtype_policy("float32")


def images(n=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 1)).astype(np.uint8)


def labels(n=40):
    return np.arange(n) % 3


def conv(filters=4, trainable=False, **options):
    return layers.Conv2D(
        filters, 3, padding="same", activation="relu", trainable=trainable, **options
    )


def normalization(**options):
    return layers.BatchNormalization(trainable=False, **options)


def compiled(model, **options):
    options = {"optimizer": keras.optimizers.Adam(0.01), "metrics": ["accuracy"]} | options
    model.compile(loss="sparse_categorical_crossentropy", **options)
    return model


def graph(*steps):
    """A model of steps in a row, with a trainable head."""
    inputs = x = keras.Input((SIZE, SIZE, 1), dtype="uint8")
    for step in (layers.Rescaling(1 / 255), *steps):
        x = step(x)
    x = layers.Flatten()(x)
    return compiled(keras.Model(inputs, layers.Dense(3, activation="softmax")(x)))


def chain():
    return compiled(
        keras.Sequential(
            [
                keras.Input((SIZE, SIZE, 1)),
                layers.Rescaling(1 / 255),
                conv(),
                layers.Flatten(),
                layers.Dense(3, activation="softmax"),
            ]
        )
    )


def adapted():
    layer = layers.Normalization()
    layer.adapt(images().astype(np.float32))
    return layer


def residual(x):
    return layers.Add()([conv()(conv()(x)), x])


def crossed(x):
    """Two tensors lead out of the frozen layers; before them there is one."""
    start = conv()(x)
    return layers.Add()([conv(trainable=True)(conv()(start)), start])


def crossed_at_once(x):
    return layers.Concatenate()([conv()(x), conv(trainable=True)(x)])


def past_all(x):
    return layers.Concatenate()([conv()(x), x])


def past_a_base(x):
    start = conv()(x)
    return layers.Concatenate()([small_base()(start), start])


def beside_a_base(x):
    start = conv()(x)
    frozen = conv()(start)
    return layers.Concatenate()([small_base()(start), frozen])


def small_base():
    return keras.Sequential([keras.Input((SIZE, SIZE, 4)), conv(), conv(2, trainable=True)])


def shared(x):
    layer = conv()
    middle = conv(1, trainable=True)(layer(x))
    return layer(middle)


def base(*inner, trainable=False):
    model = keras.Sequential([keras.Input((SIZE, SIZE, 1)), *inner])
    if not trainable:
        model.trainable = False
    return model


def partly_frozen_base(x):
    inputs = keras.Input((SIZE, SIZE, 1))
    y = conv(8, trainable=True)(layers.MaxPooling2D()(residual(inputs)))
    return keras.Model(inputs, layers.MaxPooling2D()(y))(x, training=False)


def partly_frozen(name=None):
    """A base and a head, nothing else."""
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.Flatten()(partly_frozen_base(inputs))
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name=name)(x))


def arithmetic(x):
    return conv()(x * 2.0 - keras.ops.ones((1, 1)))


class Jitter(layers.Layer):
    """Random in training, without a generator of its own by which one could tell."""

    def call(self, x, training=None):
        return x + keras.random.uniform(keras.ops.shape(x)) if training else x


class Counting(layers.Layer):
    """Changes in every call, and shows it in nothing but a weight."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), trainable=False, initializer="zeros")

    def call(self, x):
        self.count.assign_add(1.0)
        return x


CUTS = {
    "sequential": (chain, (256,)),
    "frozen, then trained": (lambda: graph(conv(), conv(2, trainable=True)), (8, 8, 4)),
    "a skip in the prefix": (lambda: graph(residual), (256,)),
    "two tensors cross: before them": (lambda: graph(crossed), (8, 8, 4)),
    "the images go past a layer": (lambda: graph(past_all, conv(trainable=True)), (8, 8, 5)),
    "past a base": (lambda: graph(past_a_base), (8, 8, 4)),
    "beside a base": (lambda: graph(beside_a_base), (8, 8, 4)),
    "a base alone": (lambda: compiled(partly_frozen()), (4, 4, 4)),
    "a layer in both parts": (lambda: graph(shared), (8, 8, 4)),
    "operations": (lambda: graph(arithmetic), (256,)),
    "batch normalization, frozen": (lambda: graph(conv(), normalization()), (256,)),
    "a frozen base": (lambda: graph(base(conv(), normalization())), (256,)),
    "a partly frozen base": (lambda: graph(partly_frozen_base), (4, 4, 4)),
    "a frozen base behind adapted scaling": (lambda: graph(adapted(), base(conv())), (256,)),
    "dropout": (lambda: graph(conv(), layers.Dropout(0.5), conv(2)), (8, 8, 4)),
    "dropout that drops nothing": (lambda: graph(conv(), layers.Dropout(0.0)), (256,)),
    "noise": (lambda: graph(conv(), layers.MaxPooling2D(), layers.GaussianNoise(1.0)), (4, 4, 4)),
    "statistics that move": (
        lambda: graph(conv(), layers.BatchNormalization(center=False, scale=False)),
        (8, 8, 4),
    ),
    "a random layer of the user's": (lambda: graph(conv(), Jitter()), (8, 8, 4)),
    "a layer that adds a loss": (
        lambda: graph(conv(), conv(2, activity_regularizer="l2")),
        (8, 8, 4),
    ),
}


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.steps = keras.Sequential([conv(), layers.Flatten(), layers.Dense(3, "softmax")])
        self(np.zeros((1, SIZE, SIZE, 1), np.float32))

    def call(self, x):
        return self.steps(x)


class OwnTraining(keras.Model):
    """Functional, but what it does with its images in training is its own."""

    def train_step(self, *data):
        raise AssertionError("not called")


def all_frozen(model):
    model.trainable = False
    return compiled(model)


def own_training():
    model = graph(conv())
    return compiled(OwnTraining(model.inputs, model.outputs))


NOT_CUT = {
    "nothing frozen": lambda: graph(conv(trainable=True)),
    "no frozen weights": lambda: graph(layers.MaxPooling2D()),
    # Its weights are constants, but to store what it makes of an image costs more than it does.
    "next to no work before what is trained": lambda: graph(adapted(), conv(16, trainable=True)),
    "everything frozen": lambda: all_frozen(chain()),
    "augmentation first": lambda: graph(layers.RandomFlip(), conv()),
    "noise first": lambda: graph(layers.GaussianNoise(0.1), conv()),
    "a random layer of the user's first": lambda: graph(Jitter(), conv()),
    "a layer that counts": lambda: graph(Counting(), conv()),
    "branches": lambda: graph(crossed_at_once),
    # Keras hands training=True to it, whatever it was called with.
    "dropout in a base that is called with training=False": lambda: graph(
        lambda x: base(layers.Dropout(0.5), conv())(x, training=False)
    ),
    "not compiled": lambda: keras.Sequential([keras.Input((8, 8, 1)), conv(), layers.Dense(3)]),
    "a class of the user's": lambda: compiled(Subclass()),
    "a training step of the user's": own_training,
}


def assert_near(a, b, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=tolerance
    )


def cut(model):
    parts = features.cut(model)
    assert parts is not None
    return parts


# Where it is cut


@pytest.mark.parametrize(("make", "shape"), CUTS.values(), ids=CUTS)
def test_cuts_at_the_deepest_constant_tensor(make, shape):
    model = make()
    parts = cut(model)
    assert parts.prefix.output_shape == (None, *shape)
    assert parts.prefix.trainable_variables == []
    activations = parts.prefix.predict_on_batch(images())
    assert_near(parts.rest.predict_on_batch(activations), model.predict_on_batch(images()))


@pytest.mark.parametrize("make", NOT_CUT.values(), ids=NOT_CUT)
def test_is_not_cut(make):
    assert features.cut(make()) is None


def test_trying_a_layer_leaves_its_weights():
    model = graph(Counting(), conv())
    features.cut(model)
    assert model.layers[2].count.numpy() == 0


def test_trying_does_not_move_the_random_state_of_the_training():
    model = graph(conv(), layers.Dropout(0.5))
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    features.cut(model)
    for was, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(was, keras.ops.convert_to_numpy(variable))


def test_images_of_the_callers_are_tried():
    """Where the shape is open, made-up ones are 32x32."""
    inputs = keras.Input((None, None, 1), dtype="uint8")
    x = layers.GlobalAveragePooling2D()(conv()(layers.CenterCrop(4, 4)(inputs)))
    model = compiled(keras.Model(inputs, layers.Dense(3, "softmax")(x)))
    for tried in (None, images()):
        parts = features.cut(model, tried)
        assert parts is not None
        assert parts.prefix.output_shape == (None, 4)


# Training the rest


def trainable():
    """With all that makes two trainings differ: dropout, moving statistics, a schedule, decay."""
    keras.utils.set_random_seed(3)
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 20)
    model = graph(
        conv(),
        layers.MaxPooling2D(4),  # 2x2
        conv(6, trainable=True, kernel_regularizer="l2", use_bias=False),
        layers.BatchNormalization(),
        layers.Dropout(0.3),
    )
    return compiled(model, optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.01))


def fit(model, x, epochs, validate=False):
    """The same batches of images or of activations; `fit` on arrays returns late."""
    positions = np.arange(40)
    order = np.tile(positions, epochs).astype(np.int32)
    batches = backend.training_batches(Rows(x, positions), labels(), order, 8)
    validation = backend.validation_batches(Rows(x, positions[:10]), labels(10))
    options = {"steps_per_epoch": 5, "shuffle": False, "verbose": 0}
    if validate:
        options["validation_data"] = validation
    return model.fit(batches, epochs=epochs, **options).history


def assert_same_weights(model, other):
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        assert_near(a, b)


@pytest.mark.slow
def test_training_the_rest_is_training_the_model(tmp_path):
    """Some epochs whole, some in parts, some whole again; saved on the way."""
    whole, other = trainable(), trainable()
    history = fit(whole, images(), epochs=6, validate=True)
    fit(other, images(), epochs=2)
    parts, before = cut(other), other.get_weights()
    got = fit(parts.rest, parts.prefix.predict_on_batch(images()), epochs=2, validate=True)
    assert got.keys() == history.keys()
    for name, values in got.items():
        assert_near(values, history[name][2:4], 1e-4)
    assert max(np.abs(a - b).max() for a, b in zip(before, other.get_weights(), strict=True)) > 1e-3
    other.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_near(loaded.predict_on_batch(images()), other.predict_on_batch(images()), 1e-6)
    assert int(loaded.optimizer.iterations) == 4 * 5
    fit(other, images(), epochs=2)
    assert_same_weights(whole, other)
    assert_near(whole.predict_on_batch(images()), other.predict_on_batch(images()))


@pytest.mark.slow
def test_training_the_rest_from_the_first_step_on():
    def fresh():
        keras.utils.set_random_seed(3)
        return graph(partly_frozen_base)

    whole, other = fresh(), fresh()
    fit(whole, images(), epochs=3)
    parts = cut(other)
    fit(parts.rest, parts.prefix.predict_on_batch(images()), epochs=3)
    assert_same_weights(whole, other)


def test_losses_and_metrics_by_name_and_as_objects():
    model = partly_frozen(name="classes")
    model.compile(
        "sgd",
        loss={"classes": keras.losses.SparseCategoricalCrossentropy()},
        metrics={"classes": [keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")]},
    )
    parts = cut(model)
    activations = parts.prefix.predict_on_batch(images())
    own = model.evaluate(images(), labels(), verbose=0, return_dict=True)
    assert {"loss", "top2"} <= own.keys()
    assert parts.rest.evaluate(activations, labels(), verbose=0, return_dict=True) == pytest.approx(
        own, rel=1e-5
    )


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = graph(conv(), conv(6, trainable=True))
    parts = cut(model)
    assert parts.rest.input.dtype == "bfloat16"
    activations = parts.prefix.predict_on_batch(images()).astype(np.float16)
    assert_near(parts.rest.predict_on_batch(activations), model.predict_on_batch(images()), 1e-2)
    before = model.get_weights()
    fit(parts.rest, activations, epochs=1)
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))


def test_only_convolutions_that_are_understood_become_quick():
    class Own(layers.Conv2D):
        pass

    model = graph(
        conv(),
        layers.MaxPooling2D(4),
        Own(4, 3, padding="same"),
        layers.Conv2D(4, 3, strides=2, padding="same"),
        layers.Conv2D(4, 1, padding="same", groups=2),
        layers.Conv2D(4, 1, dtype="bfloat16", padding="same"),
        layers.Conv2D(4, 1, padding="same", name="plain"),
    )
    quick = [x.name for x in cut(model).rest.layers if isinstance(x, quick_layers.QuickConv2D)]
    assert quick == ["plain"]


# float16


def head(scale=1.0, activation="softmax", units=3):
    """Sums 4 numbers; the larger the scale, the more their digits matter."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(units, activation=activation)])
    weights = np.random.default_rng(1).standard_normal((4, units)) * scale
    model.set_weights([weights, np.full(units, 5.0)])  # far from 0
    return model


def activations(scale=1.0):
    return np.random.default_rng(0).random((300, 4)).astype(np.float32) * scale


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (300.0, False)])
def test_float16_where_the_logits_stay(activation, units, scale, fits):
    if activation == "softmax" and units == 1:
        activation = None
    assert features.fits_float16(head(scale, activation, units), activations()) is fits


def test_float16_for_logits_that_will_lie_further_apart():
    """A head that is hardly trained answers nearly the same to all images, and to all errors."""
    x = 2 + activations()
    model = head(1e-3)
    kernel, bias = model.get_weights()
    model.set_weights([kernel - kernel.mean(axis=0), bias])  # blind to what all images share
    exact, rounded = (features.predicted(model, a) for a in (x, x.astype(np.float16)))
    assert features.difference(exact, rounded).is_small
    assert not features.fits_float16(model, x)


def test_float16_where_the_classes_stay():
    """Two classes that differ by less than the last digit: the logits hardly move."""
    model = head()
    kernel = np.ones((4, 3)) * [1, 1 + 1e-7, 0]
    kernel[0, 1] -= 2e-4
    model.set_weights([kernel * 0.1, np.array([0, 0.5e-4 * 0.2, 0])])
    x = activations()
    exact, rounded = (
        model.predict_on_batch(a) for a in (x, x.astype(np.float16).astype(np.float32))
    )
    assert np.abs(np.log(exact) - np.log(rounded)).max() < features.LOGITS_DIFFER
    agreeing = np.mean(exact.argmax(1) == rounded.argmax(1))
    assert features.fits_float16(model, x) == (agreeing >= features.CLASSES_AGREE)


def test_too_large_for_float16():
    assert features.as_float16(np.array([[65_504.0]])) is not None
    assert features.as_float16(np.array([[-65_505.0]])) is None
    assert not features.fits_float16(head(1e-6), activations(1e5))


def test_not_a_number_stays_in_float32():
    assert not features.fits_float16(head(), np.full((3, 4), np.nan, np.float32))


# The same prefix, made again


def described(*steps):
    return features.describe(cut(graph(*steps)).prefix)


def test_names_that_keras_numbers_are_not_part_of_a_description():
    for step in (residual, arithmetic, base(conv())):
        assert described(step) == described(step)
    assert described(base(conv())) == described(base(conv()))


def test_what_is_computed_is_part_of_it():
    def named(activation):
        return layers.Activation(activation, name=activation), conv()

    every = [
        described(*named("relu")),
        described(*named("tanh")),
        described(arithmetic),
        described(lambda x: conv()(x * 3.0 - keras.ops.ones((1, 1)))),
        described(residual),
        described(conv(), conv()),
        described(base(conv(), normalization(epsilon=1e-3))),
        described(base(conv(), normalization(epsilon=1e-2))),
    ]
    assert len({str(one) for one in every}) == len(every)


def test_the_largest_tensor_counts_that_of_a_base():
    inner = base(layers.Resizing(16, 16), conv(2), layers.GlobalAveragePooling2D())
    assert features.largest(keras.Sequential([keras.Input((8, 8, 1)), inner])) == 16 * 16 * 2
    assert features.largest(base(layers.MaxPooling2D())) == 64


# Feeding


def rows(tmp_path, shape=(2, 2, 3), dtype=np.float16):
    array = np.random.default_rng(0).standard_normal((1_200, *shape)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="c").view(np.ndarray)
    return array, Rows(mapped, np.arange(1_199, 99, -1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_training_batches_are_rows_in_order(tmp_path, dtype):
    array, some = rows(tmp_path, dtype=dtype)
    y = np.arange(1_100) % 7
    order = np.random.default_rng(1).permutation(1_100)[:1_024].astype(np.int32)
    got = list(backend.training_batches(some, y, order, 128))
    assert len(got) == 8
    for (x, labels), chosen in zip(got, order.reshape(-1, 128), strict=True):
        np.testing.assert_array_equal(x, array[some.positions[chosen]])
        assert x.dtype == dtype
        np.testing.assert_array_equal(labels, y[chosen])


def test_validation_batches_are_all_rows_each_time(tmp_path):
    array, some = rows(tmp_path)
    y = np.eye(3)[np.arange(1_100) % 3]
    batches = backend.validation_batches(some, y)
    for _ in range(2):
        got = [batches[i] for i in range(len(batches))] if hasattr(batches, "_y") else batches
        x, labels = (np.concatenate(part) for part in zip(*got, strict=True))
        np.testing.assert_array_equal(x, array[some.positions])
        np.testing.assert_array_equal(labels, y)


def test_an_array_is_copied_once_where_tensorflow_cannot_read_its_memory(tmp_path):
    array, _ = rows(tmp_path)
    askew = np.frombuffer(bytearray(2) + array.tobytes(), np.float16, offset=2)
    shared = backend.shareable(askew.reshape(array.shape))
    locked = shared.view()
    locked.flags.writeable = False
    columns = backend.shareable(np.ascontiguousarray(array.T)).T  # as a file may hold them
    for copy in (shared, backend.shareable(locked), backend.shareable(columns)):
        assert copy.flags.writeable
        assert copy.flags.c_contiguous
        assert copy.ctypes.data % backend._ALIGNMENT == 0
        assert not np.shares_memory(copy, askew)
        np.testing.assert_array_equal(copy, array)
        assert copy.dtype == array.dtype
        assert backend.shareable(copy) is copy


def test_an_array_that_tensorflow_cannot_share(tmp_path):
    array, _ = rows(tmp_path)
    askew = np.frombuffer(b"\0\0" + array.tobytes(), np.float16, offset=2).reshape(array.shape)
    order = np.arange(8, dtype=np.int32)
    ((x, _),) = backend.training_batches(Rows(askew, order), order, order, 8)
    np.testing.assert_array_equal(x, array[:8])
