import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from search.training import complexity
from spaces.resnet import MAX_FILTERS, ResNet
from studies.resnet import FashionResNet
from tests.spaces.points import point, random_values, registered

SHAPE = (28, 28, 1)
# The network of 20 layers of arXiv:1512.03385, section 4.2; its shortcuts have no weights there.
RESNET20 = {"blocks_per_stage": 3, "filters": 32, "order": "post"}
SMALL = {"num_stages": 2, "filters": 16, "flip": False, "shift": 0, "head_dropout": 0.0}
DEAREST = {"num_stages": 4, "filters": 64, "stem_kernel_size": 7, "shortcut": "average_projection"}


def built(values, input_shape=SHAPE, space=ResNet):
    return space(input_shape, 10, 12_800).build(point(values))


def convolutions(model, kernel_size):
    return [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (kernel_size,) * 2
    ]


def additions(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.Add)]


def producers(layer):
    """Names of the layers whose outputs a layer adds."""
    return [type(tensor._keras_history.operation).__name__ for tensor in layer.input]


@pytest.fixture(scope="module")
def parameters():
    return registered(ResNet(SHAPE, 10, 12_800))


@pytest.fixture(scope="module")
def default_cost():
    return complexity.flops(built({}))


BLOCK = "Conv2D BatchNormalization Activation Conv2D"


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        (
            SMALL | {"order": "post"},
            f"Conv2D BatchNormalization Activation {BLOCK} BatchNormalization Add Activation "
            f"{BLOCK} Conv2D BatchNormalization BatchNormalization Add Activation",
        ),
        (
            SMALL | {"order": "pre"},
            f"Conv2D BatchNormalization Activation {BLOCK} Add BatchNormalization Activation "
            f"{BLOCK} Conv2D Add BatchNormalization Activation",
        ),
        (
            SMALL | {"order": "pre", "num_stages": 1, "block_dropout": 0.1},
            "Conv2D BatchNormalization Activation Conv2D BatchNormalization Activation Dropout "
            "Conv2D Add BatchNormalization Activation",
        ),
    ],
    ids=["post", "pre", "dropout"],
)
def test_layers_in_order(values, layers):
    names = [type(layer).__name__ for layer in built(values).layers]
    # Keras lists layers by their distance from the output: the two ways of a block interleave.
    assert sorted(names) == sorted(
        ["InputLayer", "Rescaling", *layers.split(), "GlobalAveragePooling2D", "Dense"]
    )


# By hand: 9 for each pair of maps of a 3x3 convolution, 1 of a projection, 4 numbers a map for
# batch normalisation.
def test_the_size_of_resnet20():
    def stage(before, filters):
        shortcut = before * filters + 4 * filters if before != filters else 0
        return 9 * (before * filters + 5 * filters**2) + 6 * 4 * filters + shortcut

    model = built(RESNET20)
    stem = 9 * 16 + 4 * 16
    stages = stage(16, 16) + stage(16, 32) + stage(32, 64)
    assert model.count_params() == stem + stages + 64 * 10 + 10
    assert len(convolutions(model, 3)) + 1 == 20


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 6))]
)
def test_every_point_is_a_model_of_bounded_cost(seed, parameters, default_cost):
    hp = point(random_values(parameters, seed))
    asked = set(hp.values)
    for shape in (SHAPE, (8, 8, 1), (32, 32, 3)):
        model = ResNet(shape, 10, 12_800).build(hp)
        assert model.output_shape == (None, 10)
        assert min(min(layer.output.shape[1:]) for layer in model.layers) >= 1
        assert len(additions(model)) == hp.get("num_stages") * hp.get("blocks_per_stage")
        if shape == SHAPE:
            assert complexity.flops(model) <= 5 * default_cost
    assert set(hp.values) == asked  # nothing is read that one build at the defaults does not show
    assert [p.name for p in hp.space] == [p.name for p in parameters]


@pytest.mark.parametrize("blocks_per_stage", [1, 3])
@pytest.mark.parametrize(("space", "filters", "times"), [(ResNet, 64, 5), (FashionResNet, 32, 1.5)])
def test_the_dearest_points(space, filters, times, blocks_per_stage, default_cost):
    values = DEAREST | {"filters": filters, "blocks_per_stage": blocks_per_stage}
    assert complexity.flops(built(values, space=space)) <= times * default_cost


@pytest.mark.parametrize("shape", [(8, 8, 3), (33, 9, 1)], ids=str)
@pytest.mark.parametrize("shortcut", ResNet.shortcuts)
def test_the_deepest_point_keeps_at_least_one_pixel(shape, shortcut):
    model = built(DEAREST | {"shortcut": shortcut}, shape)
    assert min(min(layer.output.shape[1:]) for layer in model.layers) >= 1
    assert max(layer.filters for layer in convolutions(model, 3)) == MAX_FILTERS


@pytest.mark.parametrize(
    ("blocks_per_stage", "growth", "filters"),
    [
        (1, 1.0, [48, 48, 48]),
        (1, 1.5, [48, 72, 104]),
        (1, 2.0, [48, 96, 192]),
        (2, 2.0, [32, 64, 128]),
        (3, 2.0, [24, 48, 96]),
    ],
)
def test_filters_grow_in_multiples_of_eight_and_shrink_with_depth(
    blocks_per_stage, growth, filters
):
    model = built({"filters": 48, "growth": growth, "blocks_per_stage": blocks_per_stage})
    _, *in_blocks = convolutions(model, 3)
    assert [layer.filters for layer in in_blocks] == [
        each for each in filters for _ in range(2 * blocks_per_stage)
    ]


@pytest.mark.parametrize(
    ("order", "added"),
    [
        # The first block has the stem's output, the second a projection, the third the second's.
        (
            "post",
            [
                ["Activation", "BatchNormalization"],
                ["Activation", "BatchNormalization"],
                ["BatchNormalization", "BatchNormalization"],
                ["Activation", "BatchNormalization"],
            ],
        ),
        (
            "pre",
            [["Conv2D", "Conv2D"], ["Add", "Conv2D"], ["Conv2D", "Conv2D"], ["Add", "Conv2D"]],
        ),
    ],
)
def test_what_the_blocks_add(order, added):
    values = {"num_stages": 2, "blocks_per_stage": 2, "order": order}
    model = built(values)
    assert [producers(layer) for layer in additions(model)] == added
    assert len(convolutions(model, 1)) == 1


@pytest.mark.parametrize(("shortcut", "strides"), [("projection", 2), ("average_projection", 1)])
def test_shortcuts_where_the_map_halves(shortcut, strides):
    model = built({"num_stages": 2, "growth": 1.0, "shortcut": shortcut})
    (projection,) = convolutions(model, 1)
    assert projection.strides == (strides, strides)
    pooled = [x for x in model.layers if isinstance(x, keras.layers.AveragePooling2D)]
    assert len(pooled) == (strides == 1)


@pytest.mark.parametrize("order", ResNet.orders)
def test_a_block_whose_convolutions_are_nought_lets_everything_past(order):
    model = built({"num_stages": 1, "blocks_per_stage": 2, "order": order})
    _, *in_blocks = convolutions(model, 3)
    for layer in in_blocks:
        layer.kernel.assign(np.zeros(layer.kernel.shape))
    first, last = additions(model)[0], additions(model)[-1]
    before, after = keras.Model(model.input, [first.input[0], last.output])(
        np.random.default_rng(0).integers(0, 256, (2, *SHAPE), dtype="uint8")
    )
    assert float(np.abs(before).max()) > 0
    np.testing.assert_array_equal(before, after)


def test_a_subclass_narrows_the_space():
    class Narrow(ResNet):
        max_stages = 2
        orders = ("pre",)
        defaults = ResNet.defaults | {"num_stages": 1, "order": "pre"}

    ranges = {parameter.name: parameter for parameter in registered(Narrow((8, 8, 1), 10, 1_000))}
    assert (ranges["num_stages"].max_value, ranges["num_stages"].default) == (2, 1)
    assert ranges["order"].values == ["pre"]


@pytest.mark.parametrize("order", ResNet.orders)
def test_a_saved_model_is_plain_keras(order, tmp_path):
    model = built(SMALL | {"order": order, "block_dropout": 0.1}, (8, 8, 1))
    assert all(type(layer).__module__.startswith("keras.") for layer in model.layers)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), dtype="uint8")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images), model(images))


@pytest.mark.slow
def test_it_learns_digits():
    images, labels = load_digits(return_X_y=True)
    images, labels = (images.reshape(-1, 8, 8, 1) / 16 * 255).astype("uint8"), np.eye(10)[labels]
    keras.utils.set_random_seed(1)
    model = ResNet((8, 8, 1), 10, 4 * 1_400).build(point(SMALL | {"batch_size": 64}))
    model.fit(images[:1_400], labels[:1_400], batch_size=64, epochs=4, verbose=0)
    _, accuracy = model.evaluate(images[1_400:], labels[1_400:], verbose=0)
    assert accuracy > 5 * 0.1
