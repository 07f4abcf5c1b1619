"""What a worker writes for the report's pictures."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from search.winners import pictures

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 8, 8, 1), np.uint8)
Y = np.arange(60, dtype=np.uint8) % 3


def network(*, nested=False, convolution=True):
    inputs = keras.Input((8, 8, 1), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    if convolution:
        features = [keras.layers.Conv2D(4, 3, name="first"), keras.layers.Conv2D(2, 3)]
        if nested:
            x = keras.Sequential([keras.Input((8, 8, 1)), *features])(x)
        else:
            for layer in features:
                x = layer(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(3, "softmax")(x))


def written(tmp_path, model, probabilities):
    path = tmp_path / "pictures.npz"
    pictures.write(path, model, (X, Y), probabilities, (X[:30], Y[:30]))
    with np.load(path) as saved:
        return dict(saved)


@pytest.fixture
def probabilities():
    """Three images are wrong: 5 (surely), 7 and 11."""
    made = np.eye(3, dtype=np.float32)[Y] * 0.5 + 0.5 / 3
    for image, confidence in ((5, 0.9), (7, 0.6), (11, 0.7)):
        row = np.full(3, (1 - confidence) / 2, np.float32)
        row[(Y[image] + 1) % 3] = confidence
        made[image] = row
    return made


def test_the_surest_errors_come_first(tmp_path, probabilities):
    saved = written(tmp_path, network(), probabilities)
    np.testing.assert_array_equal(saved["misclassified_images"], X[[5, 11, 7]])
    np.testing.assert_array_equal(saved["misclassified_labels"], Y[[5, 11, 7]])
    np.testing.assert_array_equal(saved["misclassified_predicted"], (Y[[5, 11, 7]] + 1) % 3)
    np.testing.assert_allclose(saved["misclassified_confidence"], [0.9, 0.7, 0.6])
    assert saved["misclassified_images"].dtype == np.uint8


def test_samples_and_training_images_show_every_class(tmp_path, probabilities):
    saved = written(tmp_path, network(), probabilities)
    assert np.bincount(saved["samples_labels"]).tolist() == [7, 7, 6]
    np.testing.assert_array_equal(saved["train_counts"], [10, 10, 10])
    assert saved["train_labels"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    np.testing.assert_array_equal(saved["train_images"][5], X[1])


@pytest.mark.parametrize("nested", [False, True])
def test_filters_and_maps_are_those_of_the_first_convolution(tmp_path, probabilities, nested):
    model = network(nested=nested)
    saved = written(tmp_path, model, probabilities)
    layer = next(one for one in model._flatten_layers() if one.name == "first")
    kernel = np.asarray(layer.kernel)
    assert (str(saved["layer"]), int(saved["num_filters"])) == ("first", 4)
    np.testing.assert_allclose(saved["filters"], kernel, atol=1e-3)
    image = saved["samples_images"][0].astype(np.float32) / 255
    at_2_3 = np.einsum("hwc,hwcf->f", image[2:5, 3:6], kernel)
    np.testing.assert_allclose(saved["maps"][0, 2, 3], at_2_3, atol=5e-3)
    assert saved["maps"].shape == (4, 6, 6, 4)
    assert "call" not in vars(layer)  # the model is left as it was


def test_a_model_without_a_convolution_has_no_filters(tmp_path, probabilities):
    saved = written(tmp_path, network(convolution=False), probabilities)
    assert "filters" not in saved
    assert len(saved["samples_images"]) == pictures.SAMPLES


def test_a_model_that_cannot_be_looked_into_costs_only_its_maps(tmp_path, probabilities, caplog):
    model = network()
    model.call = lambda *_args, **_options: 1 / 0
    saved = written(tmp_path, model, probabilities)
    assert "filters" not in saved
    assert "misclassified_images" in saved
    assert "no filters and activation maps: ZeroDivisionError" in caplog.text


def test_large_images_are_thinned():
    assert pictures.thinned(np.zeros((2, 200, 130, 3), np.uint8)).shape == (2, 50, 33, 3)
    assert pictures.thinned(np.zeros((2, 64, 64, 1), np.uint8)).shape == (2, 64, 64, 1)


@pytest.mark.parametrize(
    ("labels", "size", "drawn"),
    [([1, 1, 0, 2, 0], 3, [2, 0, 3]), ([1, 1, 0, 2, 0], 9, [2, 0, 3, 4, 1]), ([0, 5], 2, [0, 1])],
)
def test_images_are_drawn_class_by_class(labels, size, drawn):
    assert pictures.drawn_by_class(np.array(labels), size).tolist() == drawn
