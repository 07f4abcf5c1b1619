import keras
import numpy as np
import pytest

from spaces.cnn import CNN, MAX_FILTERS
from studies import cnn as study_file
from tests.spaces.points import point, random_values, registered

SHAPE = (28, 28, 1)
SHAPES = (SHAPE, (8, 8, 1))
SMALL = {"num_blocks": 1, "convs_per_block": 1, "filters": 16, "dense_units": 0}
DEAREST = {
    "num_blocks": 5,
    "filters": 64,
    "first_kernel_size": 5,
    "dense_units": 512,
    "last_block_pools": False,
}


def built(values, input_shape=SHAPE):
    return CNN(input_shape, 10, 12_800).build(point(values))


def multiplications(model):
    """Of one image: what a model costs, activations and normalisation aside."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            total += np.prod(layer.output.shape[1:3]) * np.prod(layer.kernel.shape)
        if isinstance(layer, keras.layers.Dense):
            total += np.prod(layer.kernel.shape)
    return total


def test_a_space_of_few_filters_has_some():
    class Narrow(CNN):
        filters = (4, 16, 4)

    model = Narrow(SHAPE, 10, 12_800).build(point({"filters": 4, "growth": 1.0}))
    convs = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert {layer.filters for layer in convs} == {8}


@pytest.fixture(scope="module")
def parameters():
    return {shape: registered(CNN(shape, 10, 12_800)) for shape in SHAPES}


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
            SMALL | {"flip": True, "erasing": 0.5, "pooling": "average"},
            "RandomFlip RandomTranslation RandomErasing Conv2D BatchNormalization Activation "
            "AveragePooling2D Dropout Flatten Dropout Dense",
        ),
    ],
    ids=["overfit-cnn", "regularised-cnn", "dropout-cnn", "augmented"],
)
def test_layers_in_order(values, layers):
    names = [type(layer).__name__ for layer in built(values).layers]
    assert names == ["InputLayer", "Rescaling", *layers.split()]


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 25))]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_point_is_a_model_of_bounded_cost(seed, shape, parameters, default_cost):
    hp = point(random_values(parameters[shape], seed))
    asked = set(hp.values)
    model = CNN(shape, 10, 12_800).build(hp)
    assert model.output_shape == (None, 10)
    assert min(min(layer.output.shape[1:]) for layer in model.layers) >= 1
    assert multiplications(model) <= 5 * default_cost
    assert set(hp.values) == asked  # nothing is read that one build at the defaults does not show
    assert [p.name for p in hp.space] == [p.name for p in parameters[shape]]


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


@pytest.mark.parametrize(
    ("num_blocks", "size", "head"),
    [
        (1, 28, "Flatten"),
        (2, 28, "Flatten"),
        (3, 28, "GlobalMaxPooling2D"),
        (2, 32, "Flatten"),
        (1, 33, "GlobalMaxPooling2D"),  # flattened, 16 x 16 positions
        (1, 8, "GlobalMaxPooling2D"),
    ],
)
def test_a_wide_map_of_small_images_is_flattened(num_blocks, size, head):
    model = built(SMALL | {"num_blocks": num_blocks, "features": "max"}, (size, size, 1))
    kinds = [type(layer).__name__ for layer in model.layers]
    assert [kind for kind in kinds if kind in ("Flatten", "GlobalMaxPooling2D")] == [head]
    parameters = registered(CNN((size, size, 1), 10, 12_800))
    (features,) = (parameter for parameter in parameters if parameter.name == "features")
    (condition,) = features.conditions
    assert condition.name == "num_blocks"
    assert condition.values == [1, 2, 3, 4, 5][2 if size in (28, 32) else 0 :]


def test_a_space_of_few_blocks_asks_for_no_features():
    class Shallow(CNN):
        max_blocks = 2
        defaults = CNN.defaults | {"num_blocks": 2}

    assert "features" not in {parameter.name for parameter in registered(Shallow(SHAPE, 10, 1_000))}


def test_a_subclass_narrows_the_space():
    class Narrow(CNN):
        max_blocks = 2
        defaults = CNN.defaults | {"num_blocks": 1}

    ranges = {parameter.name: parameter for parameter in registered(Narrow((8, 8, 1), 10, 1_000))}
    assert (ranges["num_blocks"].max_value, ranges["num_blocks"].default) == (2, 1)
