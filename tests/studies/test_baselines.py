"""The published models: each is there, is what its row says, and is trained as published."""

import re
from pathlib import Path

import keras
import keras_tuner
import pytest

from search.report import references
from studies.baselines import BASELINES, MOST_EPOCHS, Baselines, study

DIGIT = re.compile(r"(train|val|test)_(accuracy|loss|recall|precision|f1|roc_auc)")
# Parameters, counted by hand from the architectures.
PARAMETERS = {
    "mlp": 784 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10,
    "overfit-cnn": 320 + 18_496 + 73_856 + 1_152 * 128 + 128 + 1_290,
    "dropout-cnn": 320 + 18_496 + 1_600 * 128 + 128 + 1_290,
}


def hyperparameters(name):
    hp = keras_tuner.HyperParameters()
    hp.values = {"model": name}
    return hp


@pytest.fixture(scope="module")
def space():
    return Baselines((28, 28, 1), 10, 100_000, weights="none")


def layers(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_a_model_for_fashion_mnist(space, name):
    model = space.build(hyperparameters(name))
    assert model.input_shape == (None, 28, 28, 1)
    assert model.output_shape == (None, 10)
    if name in PARAMETERS:
        assert model.count_params() == PARAMETERS[name]
    baseline = BASELINES[name]
    assert 0 < space.epochs(hyperparameters(name)) <= MOST_EPOCHS
    stops = [
        callback
        for callback in space.callbacks(hyperparameters(name))
        if isinstance(callback, keras.callbacks.EarlyStopping)
    ]
    assert [callback.monitor for callback in stops] == ["val_loss"] * baseline.stops_early
    assert all(DIGIT.fullmatch(figure) for figure in baseline.published)
    assert all(0 < value < 1 for value in baseline.published.values())


def test_points_say_all_that_a_space_reads_of_them(space):
    for name, baseline in BASELINES.items():
        hp = keras_tuner.HyperParameters()
        hp.values = dict(baseline.point)
        space._space(baseline).build(hp)
        read = {parameter.name for parameter in hp.space if hp.is_active(parameter)}
        assert set(baseline.point) <= read, name


def test_what_the_published_rows_have(space):
    overfit = space.build(hyperparameters("overfit-cnn"))
    assert not layers(overfit, keras.layers.Dropout)
    dropout = space.build(hyperparameters("dropout-cnn"))
    assert [layer.rate for layer in layers(dropout, keras.layers.Dropout)] == [0.25, 0.25, 0.5]
    batchnorm = space.build(hyperparameters("batchnorm-cnn"))
    assert len(layers(batchnorm, keras.layers.BatchNormalization)) >= 3
    plateau = space.callbacks(hyperparameters("plateau-cnn"))
    assert any(isinstance(callback, keras.callbacks.ReduceLROnPlateau) for callback in plateau)
    rate = space.build(hyperparameters("optimum-cnn")).optimizer._learning_rate
    assert isinstance(rate, keras.optimizers.schedules.CosineDecay)
    vgg16 = space.build(hyperparameters("vgg16-transfer"))
    assert not any(layer.trainable_weights for layer in vgg16.layers if "block" in layer.name)


def test_the_vgg16_alone_is_pretrained(space):
    pretrained = [name for name in BASELINES if space.is_pretrained(hyperparameters(name))]
    assert pretrained == ["vgg16-transfer"]


def test_the_study_compares_them_all_and_explains_each():
    assert [point["model"] for point in study.known_points] == list(BASELINES)
    assert study.compare
    text = Path(__file__).parents[2].joinpath("studies", "baselines.py").read_text()
    explained = text.split('"""')[1]
    assert all(name in explained for name in BASELINES)


def test_the_report_shows_the_same_published_figures():
    published = {
        name: baseline.published["test_accuracy"]
        for name, baseline in BASELINES.items()
        if "test_accuracy" in baseline.published
    }
    assert published == references.BASELINES
