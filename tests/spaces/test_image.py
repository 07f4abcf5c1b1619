from dataclasses import dataclass

import keras
import keras_tuner
import numpy as np
import pytest

from spaces import blocks
from spaces.cnn import CNN
from spaces.image import ImageSpace
from spaces.mlp import MLP
from studies.quickstart import SmallCNN
from tests.spaces.points import point, registered

SHAPE = (8, 8, 1)


@dataclass(frozen=True)
class LinearArchitecture:
    dropout: float

    def outputs(self, x, num_classes):
        return blocks.head(x, num_classes, dropout_rate=self.dropout)


class Linear(ImageSpace):
    defaults = ImageSpace.defaults | {"dropout": 0.0}

    def architecture(self, reader):
        return LinearArchitecture(dropout=reader.fraction("dropout", 0.5))


def built(values, total_images=1_000):
    return Linear(SHAPE, 10, total_images).build(point(values))


def test_the_smallest_space_has_the_whole_training():
    names = [parameter.name for parameter in registered(Linear(SHAPE, 10, 1_000))]
    assert names == ["dropout", *ImageSpace.defaults]


def test_a_space_says_its_architecture():
    with pytest.raises(TypeError, match=r"ImageSpace.* abstract .*architecture"):
        ImageSpace(SHAPE, 10, 1_000)


@pytest.mark.parametrize("space", [CNN, SmallCNN, MLP])
def test_defaults_lie_in_their_ranges(space):
    parameters = registered(space(SHAPE, 10, 1_000))
    assert {parameter.name for parameter in parameters} == set(space.defaults)
    for parameter in parameters:
        assert parameter.default == space.defaults[parameter.name]
        if isinstance(parameter, keras_tuner.engine.hyperparameters.Int):
            assert parameter.min_value <= parameter.default <= parameter.max_value
            assert (parameter.default - parameter.min_value) % parameter.step == 0
        if isinstance(parameter, keras_tuner.engine.hyperparameters.Float):
            assert parameter.min_value <= parameter.default <= parameter.max_value


def test_a_subclass_narrows_the_training():
    class Narrow(Linear):
        max_shift = 1
        batch_sizes = (32,)
        learning_rates = {"sgd": (0.01, 0.1)}  # noqa: RUF012
        defaults = Linear.defaults | {"shift": 0, "batch_size": 32, "optimizer": "sgd"}

    ranges = {parameter.name: parameter for parameter in registered(Narrow(SHAPE, 10, 1_000))}
    assert ranges["shift"].max_value == 1
    assert ranges["batch_size"].values == [32]
    assert ranges["sgd_learning_rate"].max_value == 0.1
    assert "adam_learning_rate" not in ranges


def test_images_below_8x8_are_refused():
    with pytest.raises(ValueError, match=r"at least 8x8 pixels. Received: input_shape=\(7, 8, 1\)"):
        Linear((7, 8, 1), 10, 1_000)


@pytest.mark.parametrize("space", [CNN, MLP])
@pytest.mark.parametrize(
    ("shape", "num_classes"), [((8, 8, 1), 2), ((28, 28, 1), 10), ((32, 32, 3), 100)]
)
def test_models_take_raw_pixels_and_give_probabilities(space, shape, num_classes):
    model = space(shape, num_classes, 1_000).build(point({}))
    assert (model.input.dtype, model.output.dtype) == ("uint8", "float32")
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype="uint8")
    predicted = keras.ops.convert_to_numpy(model(images))
    assert predicted.shape == (3, num_classes)
    np.testing.assert_allclose(predicted.sum(axis=1), 1, atol=1e-5)


def test_pixels_are_scaled():
    model = built({})
    scaled = keras.Model(model.input, model.layers[1].output)
    assert float(scaled(np.full((1, *SHAPE), 255, "uint8"))[0, 0, 0, 0]) == 1.0


def test_augmentation_comes_before_the_architecture():
    names = [type(layer).__name__ for layer in built({"erasing": 0.5}).layers]
    augmented = ["RandomFlip", "RandomTranslation", "RandomErasing"]
    assert names == ["InputLayer", "Rescaling", *augmented, "Flatten", "Dense"]


@pytest.mark.parametrize(
    ("values", "optimizer", "learning_rate"),
    [
        ({"optimizer": "adam", "adam_learning_rate": 3e-3}, "Adam", 3e-3),
        ({"optimizer": "adamw", "adamw_learning_rate": 4e-3}, "AdamW", 4e-3),
        ({"optimizer": "sgd", "sgd_learning_rate": 0.2}, "SGD", 0.2),
    ],
)
def test_each_optimizer_has_its_own_learning_rate(values, optimizer, learning_rate):
    hp = point({"schedule": "constant"} | values)
    model = Linear(SHAPE, 10, 1_000).build(hp)
    assert type(model.optimizer).__name__ == optimizer
    assert float(model.optimizer.learning_rate) == pytest.approx(learning_rate)
    others = {"adam", "adamw", "sgd"} - {values["optimizer"]}
    assert not any(name.split("_")[0] in others for name in hp.values)


def test_sgd_takes_its_momentum_and_weight_decay():
    values = {"optimizer": "sgd", "sgd_momentum": 0.85, "sgd_weight_decay": 1e-3}
    optimizer = built(values).optimizer
    assert (optimizer.momentum, optimizer.weight_decay) == (0.85, 1e-3)


@pytest.mark.parametrize(("batch_size", "steps"), [(64, 400), (256, 100)])
def test_the_schedule_ends_with_the_images_of_the_training(batch_size, steps):
    values = {"schedule": "exponential", "batch_size": batch_size}
    optimizer = built(values, total_images=25_600).optimizer
    rates = []
    for step in (0, steps):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert rates == pytest.approx([2e-3, 2e-5])


@pytest.mark.parametrize("schedule", ImageSpace.schedules)
def test_only_plateau_has_a_callback(schedule):
    space = Linear(SHAPE, 10, 1_000)
    hp = point({"schedule": schedule})
    space.build(hp)
    asked = dict(hp.values)
    callbacks = space.callbacks(hp)
    assert [type(callback).__name__ for callback in callbacks] == (
        ["ReduceLROnPlateau"] if schedule == "plateau" else []
    )
    assert hp.values == asked


def test_plateau_halves_the_learning_rate_after_an_epoch_without_progress():
    space = Linear(SHAPE, 10, 1_000)
    hp = point({"schedule": "plateau"})
    model = space.build(hp)
    (callback,) = space.callbacks(hp)
    callback.set_model(model)
    callback.on_train_begin()
    rates = []
    for epoch, val_loss in enumerate([1.0, 0.5, 0.6]):
        callback.on_epoch_end(epoch, {"val_loss": val_loss})
        rates.append(float(model.optimizer.learning_rate))
    assert rates == pytest.approx([2e-3, 2e-3, 1e-3])


def test_label_smoothing_reaches_the_loss():
    loss = built({"label_smoothing": 0.1}).loss
    sure = np.eye(10, dtype="float32")[:1]
    assert float(loss(sure, np.full((1, 10), 0.1, "float32"))) == pytest.approx(np.log(10))
    assert float(loss(sure, sure)) > 1


@pytest.fixture
def mixed_bfloat16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


SMALL = {
    CNN: {"num_blocks": 2, "filters": 16, "dense_units": 64, "erasing": 0.5},
    MLP: {"num_layers": 2, "units": 64, "shift": 1, "erasing": 0.5},
}
IMAGES = np.random.default_rng(0).integers(0, 256, (64, *SHAPE), dtype="uint8")
LABELS = np.eye(10, dtype="float32")[np.arange(64) % 10]


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_bfloat16")
@pytest.mark.parametrize("space", [CNN, MLP])
def test_a_saved_model_is_plain_keras_and_float32_at_its_end(space, tmp_path):
    model = space(SHAPE, 10, 12_800).build(point(SMALL[space]))
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
