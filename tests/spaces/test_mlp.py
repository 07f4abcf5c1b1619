import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from spaces.mlp import MLP
from studies.mlp import PUBLISHED_MLP
from tests.spaces.points import point, random_values, registered

SHAPE = (28, 28, 1)
WIDEST = {"num_layers": 4, "units": 512, "shrink": 1.0}


def built(values, input_shape=SHAPE):
    return MLP(input_shape, 10, 12_800).build(point(values))


def hidden_units(model):
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    return [layer.units for layer in layers[:-1]]


@pytest.fixture(scope="module")
def parameters():
    return registered(MLP(SHAPE, 10, 12_800))


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        (PUBLISHED_MLP, "Dense Activation Dense Activation Dense"),
        (
            {"num_layers": 1, "input_dropout": 0.1, "flip": False},
            "Dropout Dense BatchNormalization Activation Dropout Dense",
        ),
    ],
    ids=["published", "with dropout"],
)
def test_layers_in_order(values, layers):
    names = [type(layer).__name__ for layer in built(values).layers]
    assert names == ["InputLayer", "Rescaling", "Flatten", *layers.split()]


def test_the_published_mlp_has_two_hidden_layers_and_adam():
    model = built(PUBLISHED_MLP)
    assert model.count_params() == (784 * 128 + 128) + (128 * 128 + 128) + (128 * 10 + 10)
    assert type(model.optimizer).__name__ == "Adam"
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 20))]
)
def test_every_point_is_a_model_of_bounded_cost(seed, parameters):
    hp = point(random_values(parameters, seed))
    asked = set(hp.values)
    for shape in (SHAPE, (8, 8, 3)):
        model = MLP(shape, 10, 12_800).build(hp)
        assert model.output_shape == (None, 10)
        assert min(hidden_units(model)) >= 8
        assert model.count_params() <= built(WIDEST, shape).count_params()
    assert set(hp.values) == asked  # nothing is read that one build at the defaults does not show
    assert [p.name for p in hp.space] == [p.name for p in parameters]


def test_the_dearest_point_costs_at_most_twice_the_defaults():
    assert built(WIDEST).count_params() <= 2 * built({}).count_params()


@pytest.mark.parametrize(("shrink", "units"), [(1.0, [192] * 3), (0.5, [192, 96, 48])])
def test_layers_shrink(shrink, units):
    assert hidden_units(built({"num_layers": 3, "units": 192, "shrink": shrink})) == units


def test_a_subclass_narrows_the_space():
    class Narrow(MLP):
        max_layers = 1
        units = (16, 32, 16)
        max_input_dropout = 0.0
        defaults = MLP.defaults | {"num_layers": 1, "units": 32, "input_dropout": 0.0}

    ranges = {parameter.name: parameter for parameter in registered(Narrow((8, 8, 1), 10, 1_000))}
    assert ranges["num_layers"].max_value == 1
    assert (ranges["units"].min_value, ranges["units"].default) == (16, 32)
    assert ranges["input_dropout"].max_value == 0


@pytest.mark.slow
def test_the_defaults_learn_digits():
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16 * 255).astype("uint8")
    keras.utils.set_random_seed(1)
    model = MLP((8, 8, 1), 10, 4 * 1_400).build(point({}))
    model.fit(images[:1_400], np.eye(10)[labels[:1_400]], batch_size=128, epochs=4, verbose=0)
    _, accuracy = model.evaluate(images[1_400:], np.eye(10)[labels[1_400:]], verbose=0)
    assert accuracy > 5 * 0.1
