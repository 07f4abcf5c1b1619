import keras
import keras_tuner
import numpy as np
import pytest

from spaces.cnn import CNN, MAX_FILTERS
from studies import cnn as study_file
from studies.quickstart import SmallCNN

SHAPE = (28, 28, 1)
SMALL = {"num_blocks": 1, "convs_per_block": 1, "filters": 16, "dense_units": 0}
DEAREST = {
    "num_blocks": 5,
    "filters": 64,
    "first_kernel_size": 5,
    "dense_units": 512,
    "last_block_pools": False,
}


def point(values):
    hp = keras_tuner.HyperParameters()
    hp.values = dict(values)
    return hp


def built(values, input_shape=SHAPE, total_images=12_800):
    return CNN(input_shape, 10, total_images).build(point(values))


def registered(space):
    hp = keras_tuner.HyperParameters()
    space.build(hp)
    return hp.space


def random_values(parameters, seed):
    hp = keras_tuner.HyperParameters()
    for number, parameter in enumerate(parameters):
        if all(condition.is_active(hp.values) for condition in parameter.conditions):
            hp.values[parameter.name] = parameter.random_sample(seed * 1_000 + number)
    return hp.values


def multiplications(model):
    """Of one image: what a model costs, activations and normalisation aside."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            total += np.prod(layer.output.shape[1:3]) * np.prod(layer.kernel.shape)
        if isinstance(layer, keras.layers.Dense):
            total += np.prod(layer.kernel.shape)
    return total


@pytest.fixture(scope="module")
def parameters():
    return registered(CNN(SHAPE, 10, 12_800))


@pytest.fixture(scope="module")
def default_cost():
    return multiplications(built({}))


# Counted by hand: kernels and biases, four numbers a channel for batch normalisation.
@pytest.mark.parametrize(
    ("values", "flat", "num_params"),
    [
        (
            study_file.OVERFIT_CNN,
            1_152,
            (9 * 32 + 32) + (9 * 32 * 64 + 64) + (9 * 64 * 128 + 128) + (1_152 * 128 + 128) + 1_290,
        ),
        (
            study_file.DROPOUT_CNN,
            1_600,
            (9 * 32 + 32) + (9 * 32 * 64 + 64) + (1_600 * 128 + 128) + 1_290,
        ),
        (
            study_file.BATCHNORM_CNN,
            1_152,
            9 * (32 + 32 * 64 + 64 * 128) + 4 * (32 + 64 + 128) + (1_152 * 128 + 128) + 1_290,
        ),
        (
            {},
            1_152,
            9 * (32 + 32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
            + 4 * 2 * (32 + 64 + 128)
            + (1_152 * 256 + 256)
            + 2_570,
        ),
    ],
    ids=["overfit-cnn", "dropout-cnn", "batchnorm-cnn", "defaults"],
)
def test_sizes_of_known_models(values, flat, num_params):
    model = built(values)
    (flatten,) = (layer for layer in model.layers if isinstance(layer, keras.layers.Flatten))
    assert flatten.output.shape == (None, flat)
    assert model.count_params() == num_params


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        (
            study_file.OVERFIT_CNN,
            "Conv2D Activation MaxPooling2D Conv2D Activation MaxPooling2D Conv2D Activation "
            "Flatten Dense Dense",
        ),
        (
            study_file.REGULARISED_CNN,
            "Conv2D Activation MaxPooling2D Dropout Conv2D Activation MaxPooling2D Dropout Conv2D "
            "Activation Dropout Flatten Dense Dropout Dense",
        ),
        (
            study_file.DROPOUT_CNN,
            "Conv2D Activation MaxPooling2D Dropout Conv2D Activation MaxPooling2D Dropout "
            "Flatten Dense Dropout Dense",
        ),
        (
            SMALL | {"flip": True, "erasing": 0.5, "pooling": "average", "features": "max"},
            "RandomFlip RandomTranslation RandomErasing Conv2D BatchNormalization Activation "
            "AveragePooling2D Dropout GlobalMaxPooling2D Dropout Dense",
        ),
    ],
    ids=["overfit-cnn", "regularised-cnn", "dropout-cnn", "augmented"],
)
def test_layers_in_order(values, layers):
    names = [type(layer).__name__ for layer in built(values).layers]
    assert names == ["InputLayer", "Rescaling", *layers.split()]


@pytest.mark.parametrize("seed", range(25))
def test_every_point_is_a_model_of_bounded_cost(seed, parameters, default_cost):
    hp = point(random_values(parameters, seed))
    asked = set(hp.values)
    for shape in (SHAPE, (8, 8, 1)):
        model = CNN(shape, 10, 12_800).build(hp)
        assert model.output_shape == (None, 10)
        assert min(min(layer.output.shape[1:]) for layer in model.layers) >= 1
        assert multiplications(model) <= 5 * default_cost
    assert set(hp.values) == asked  # nothing is read that one build at the defaults does not show
    assert [p.name for p in hp.space] == [p.name for p in parameters]


@pytest.mark.parametrize(
    "shape", [SHAPE, (8, 8, 3), (8, 30, 1), (33, 33, 3)], ids=lambda shape: str(shape)
)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_the_deepest_point_keeps_at_least_one_pixel(shape, padding):
    model = built(DEAREST | {"padding": padding}, shape)
    assert min(min(layer.output.shape[1:]) for layer in model.layers) >= 1
    widths = [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert max(widths) == MAX_FILTERS


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
def test_the_dearest_points_cost_at_most_five_times_the_defaults(num_blocks, default_cost):
    assert multiplications(built(DEAREST | {"num_blocks": num_blocks})) <= 5 * default_cost


@pytest.mark.parametrize(
    ("growth", "filters"), [(1.0, [48] * 3), (1.5, [48, 72, 104]), (2.0, [48, 96, 192])]
)
def test_filters_grow_in_multiples_of_eight(growth, filters):
    model = built({"filters": 48, "growth": growth, "convs_per_block": 1})
    assert [x.filters for x in model.layers if isinstance(x, keras.layers.Conv2D)] == filters


@pytest.mark.parametrize(("num_blocks", "kept"), [(2, False), (3, True)])
def test_the_last_block_keeps_its_map_only_where_that_is_small(num_blocks, kept):
    values = {"num_blocks": num_blocks, "last_block_pools": False}
    pooled = [x for x in built(values).layers if isinstance(x, keras.layers.MaxPooling2D)]
    assert len(pooled) == num_blocks - kept


@pytest.mark.parametrize("space", [CNN, SmallCNN])
def test_defaults_lie_in_their_ranges(space):
    for parameter in registered(space((8, 8, 1), 10, 1_000)):
        assert parameter.default == space.defaults[parameter.name]
        if isinstance(parameter, keras_tuner.engine.hyperparameters.Int):
            assert parameter.min_value <= parameter.default <= parameter.max_value
            assert (parameter.default - parameter.min_value) % parameter.step == 0
        if isinstance(parameter, keras_tuner.engine.hyperparameters.Float):
            assert parameter.min_value <= parameter.default <= parameter.max_value


def test_a_subclass_narrows_the_space():
    class Narrow(CNN):
        max_blocks = 3
        learning_rates = {"sgd": (0.01, 0.1)}  # noqa: RUF012
        defaults = CNN.defaults | SMALL | {"optimizer": "sgd"}

    ranges = {parameter.name: parameter for parameter in registered(Narrow((8, 8, 1), 10, 1_000))}
    assert ranges["num_blocks"].max_value == 3
    assert ranges["sgd_learning_rate"].max_value == 0.1
    assert "adam_learning_rate" not in ranges


def test_images_below_8x8_are_refused():
    with pytest.raises(ValueError, match=r"at least 8x8 pixels. Received: input_shape=\(7, 8, 1\)"):
        CNN((7, 8, 1), 10, 1_000)


@pytest.mark.parametrize(
    ("values", "optimizer", "learning_rate"),
    [
        ({"optimizer": "adam", "adam_learning_rate": 3e-3}, "Adam", 3e-3),
        ({"optimizer": "adamw", "adamw_learning_rate": 4e-3}, "AdamW", 4e-3),
        ({"optimizer": "sgd", "sgd_learning_rate": 0.2}, "SGD", 0.2),
    ],
)
def test_each_optimizer_has_its_own_learning_rate(values, optimizer, learning_rate):
    hp = point(SMALL | {"schedule": "constant"} | values)
    model = CNN((8, 8, 1), 10, 1_000).build(hp)
    assert type(model.optimizer).__name__ == optimizer
    assert float(model.optimizer.learning_rate) == pytest.approx(learning_rate)
    others = {"adam", "adamw", "sgd"} - {values["optimizer"]}
    assert not any(name.split("_")[0] in others for name in hp.values)


def test_sgd_takes_its_momentum_and_weight_decay():
    values = {"optimizer": "sgd", "sgd_momentum": 0.85, "sgd_weight_decay": 1e-3}
    optimizer = built(SMALL | values).optimizer
    assert (optimizer.momentum, optimizer.weight_decay) == (0.85, 1e-3)


@pytest.mark.parametrize(("batch_size", "steps"), [(64, 400), (256, 100)])
def test_the_schedule_ends_with_the_images_of_the_training(batch_size, steps):
    values = SMALL | {"schedule": "exponential", "batch_size": batch_size}
    optimizer = built(values, (8, 8, 1), total_images=25_600).optimizer
    rates = []
    for step in (0, steps):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert rates == pytest.approx([2e-3, 2e-5])


@pytest.mark.parametrize("schedule", CNN.schedules)
def test_only_plateau_has_a_callback(schedule):
    space = CNN((8, 8, 1), 10, 1_000)
    hp = point(SMALL | {"schedule": schedule})
    space.build(hp)
    asked = dict(hp.values)
    callbacks = space.callbacks(hp)
    assert [type(callback).__name__ for callback in callbacks] == (
        ["ReduceLROnPlateau"] if schedule == "plateau" else []
    )
    assert hp.values == asked


def test_plateau_halves_the_learning_rate_after_an_epoch_without_progress():
    space = CNN((8, 8, 1), 10, 1_000)
    hp = point(SMALL | {"schedule": "plateau"})
    model = space.build(hp)
    (callback,) = space.callbacks(hp)
    callback.set_model(model)
    callback.on_train_begin()
    rates = []
    for epoch, val_loss in enumerate([1.0, 0.5, 0.6]):
        callback.on_epoch_end(epoch, {"val_loss": val_loss})
        rates.append(float(model.optimizer.learning_rate))
    assert rates == pytest.approx([2e-3, 2e-3, 1e-3])


def test_pixels_are_scaled_and_models_take_them_raw():
    model = built(SMALL)
    assert model.input.dtype == "uint8"
    scaled = keras.Model(model.input, model.layers[1].output)
    assert float(scaled(np.full((1, *SHAPE), 255, "uint8"))[0, 0, 0, 0]) == 1.0


def test_label_smoothing_reaches_the_loss():
    loss = built(SMALL | {"label_smoothing": 0.1}).loss
    sure = np.eye(10, dtype="float32")[:1]
    assert float(loss(sure, np.full((1, 10), 0.1, "float32"))) == pytest.approx(np.log(10))
    assert float(loss(sure, sure)) > 1


@pytest.fixture
def mixed_bfloat16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


AUGMENTED = {"num_blocks": 2, "filters": 16, "dense_units": 64, "flip": True, "erasing": 0.5}
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype="uint8")
LABELS = np.eye(10, dtype="float32")[np.arange(64) % 10]


@pytest.mark.usefixtures("mixed_bfloat16")
def test_a_saved_model_is_plain_keras_and_float32_at_its_end(tmp_path):
    model = built(AUGMENTED, (8, 8, 1))
    assert not model.jit_compile
    history = model.fit(IMAGES, LABELS, batch_size=64, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    predicted = model(IMAGES)
    assert keras.backend.standardize_dtype(predicted.dtype) == "float32"
    np.testing.assert_allclose(np.sum(predicted, axis=1), 1, atol=1e-5)
    assert all(type(layer).__module__.startswith("keras.") for layer in model.layers)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(IMAGES), predicted)
    assert np.isfinite(loaded.fit(IMAGES, LABELS, verbose=0).history["loss"]).all()
