import json
import re
import zipfile

import h5py
import keras
import numpy as np
import pytest

from spaces import blocks
from spaces.optimizers import make_plain
from spaces.vgg16 import CONVOLUTIONS, VGG16, convolutions, prepared
from studies.vgg16 import VGG16_TRANSFER, FashionVGG16
from tests.spaces.points import point, random_values, registered

GREY = (28, 28, 1)
SEED = np.random.default_rng(0)
# (input channels, filters) of the convolutions, in their order.
WIDTHS = {
    f"block{block}_conv{conv}": (before if conv == 1 else filters, filters)
    for block, before, filters in [
        (1, 3, 64), (2, 64, 128), (3, 128, 256), (4, 256, 512), (5, 512, 512)
    ]
    for conv in range(1, CONVOLUTIONS[block - 1] + 1)
}  # fmt: skip
HEAD_ALONE = {"num_unfrozen_blocks": 0, "dense_layers": 0, "head_batch_norm": False}


def write_weights(path, widths, seed=1):
    """Made-up weights in the layout of Keras's own file."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        pools = [f"block{block}_pool" for block in range(1, 6)]
        file.attrs["layer_names"] = [name.encode() for name in [*widths, *pools]]
        for name in pools:
            file.create_group(name).attrs["weight_names"] = []
        for name, (before, filters) in widths.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}_W_1:0".encode(), f"{name}_b_1:0".encode()]
            kernel = rng.standard_normal((3, 3, before, filters), "float32")
            group[f"{name}_W_1:0"] = kernel * np.float32((2 / (9 * before)) ** 0.5)
            group[f"{name}_b_1:0"] = rng.standard_normal(filters, "float32")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vgg16_notop.h5"
    write_weights(path, WIDTHS)
    return str(path)


@pytest.fixture(scope="module")
def parameters():
    return registered(space())


def space(shape=GREY, weights="none"):
    return VGG16(shape, 10, 12_800, weights=weights)


def pixels(shape, n=4):
    return SEED.integers(0, 256, (n, *shape), dtype="uint8")


def as_a_user_would(images, size):
    """Images (n, height, width, channels) uint8 -> what Keras's VGG16 takes."""
    x = keras.ops.image.resize(images.astype("float32"), (size, size))
    x = np.repeat(x, 3, axis=-1) if images.shape[-1] == 1 else np.array(x)
    return keras.applications.vgg16.preprocess_input(np.array(x))


@pytest.mark.parametrize(
    ("shape", "size"),
    [(GREY, 32), ((8, 8, 1), 32), ((32, 32, 3), 32), ((28, 20, 3), 48), ((96, 96, 3), 64)],
)
def test_images_are_prepared_as_keras_prepares_them(shape, size):
    inputs = keras.Input(shape, dtype="uint8")
    model = keras.Model(inputs, prepared(blocks.scaled(inputs), size))
    images = pixels(shape)
    np.testing.assert_allclose(model(images), as_a_user_would(images, size), atol=1e-3)


@pytest.mark.parametrize("shape", [GREY, (32, 32, 3)])
def test_the_network_and_its_weights_are_those_of_keras(weights_file, shape):
    theirs = keras.applications.VGG16(
        include_top=False, weights=weights_file, input_shape=(32, 32, 3)
    )
    ours = space(shape, weights_file).build(point({}))
    for name in WIDTHS:
        for weight, other in zip(
            ours.get_layer(name).weights, theirs.get_layer(name).weights, strict=True
        ):
            np.testing.assert_array_equal(weight, other)
    images = pixels(shape)
    maps = keras.Model(ours.input, ours.get_layer("block5_pool").output)(images)
    expected = np.array(theirs(as_a_user_would(images, 32)))
    assert expected.std() > 0.1
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("num_blocks", "weights"),
    # What Keras counts for VGG16 without its top is 14 714 688.
    [(0, 0), (1, 7_079_424), (2, 12_979_200), (5, 14_714_688)],
)
def test_the_last_blocks_are_trained(num_blocks, weights):
    model = space().build(point(HEAD_ALONE | {"num_unfrozen_blocks": num_blocks}))
    head = 512 * 10 + 10
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == weights + head
    assert sum(np.prod(weight.shape) for weight in model.weights) == 14_714_688 + head
    rates = getattr(model.optimizer, "layer_rates", {})
    assert rates == dict.fromkeys(convolutions(num_blocks), 0.05)
    assert len(rates) == sum(CONVOLUTIONS[5 - num_blocks :])


def test_the_whole_is_one_graph_that_begins_with_its_frozen_layers():
    layers = space().build(point({"num_unfrozen_blocks": 1})).layers
    assert not any(isinstance(layer, keras.Model) for layer in layers)
    names = [layer.name for layer in layers]
    trained = [layer.name for layer in layers if layer.trainable_weights]
    head = [name for name in names[names.index("block5_pool") :] if name in trained]
    assert trained == [*convolutions(1), *head]
    assert len(head) == 4  # two of normalisation, two dense


def test_what_depends_on_another_parameter(parameters):
    conditions = {
        parameter.name: [(c.name, c.values) for c in parameter.conditions]
        for parameter in parameters
        if parameter.conditions and not re.match("adam|sgd", parameter.name)
    }
    unfrozen = ("num_unfrozen_blocks", [1, 2, 3, 4, 5])
    everything = ("num_unfrozen_blocks", [5])
    assert conditions == {
        "unfrozen_rate_ratio": [unfrozen],
        "features": [("input_size", [64])],
        "dense_units": [("dense_layers", [1, 2])],
        "flip": [everything],
        "shift": [everything],
        "erasing": [everything],
    }


def test_defaults_lie_in_their_ranges(parameters):
    assert {parameter.name for parameter in parameters} == set(VGG16.defaults)
    for parameter in parameters:
        assert parameter.default == VGG16.defaults[parameter.name]
        if hasattr(parameter, "min_value"):
            assert parameter.min_value <= parameter.default <= parameter.max_value


@pytest.mark.parametrize("seed", range(6))
def test_every_point_is_a_model(seed, parameters):
    hp = point(random_values(parameters, seed))
    asked = set(hp.values)
    model = space((8, 8, 3)).build(hp)
    assert model.output_shape == (None, 10)
    assert (model.input.dtype, model.output.dtype) == ("uint8", "float32")
    assert set(hp.values) == asked  # nothing is read that one build at the defaults does not show
    assert [p.name for p in hp.space] == [p.name for p in parameters]
    augmented = any(layer.name.startswith("random_") for layer in model.layers)
    assert augmented == any(hp.values.get(name) for name in ("flip", "shift", "erasing"))


@pytest.mark.parametrize(
    ("values", "head"),
    [
        (HEAD_ALONE | {"dropout": 0.0}, "Flatten Dense"),
        (VGG16_TRANSFER, "Flatten Dense Activation Dense"),
        (
            {"dense_layers": 2, "input_size": 64, "features": "max"},
            "GlobalMaxPooling2D BatchNormalization Dropout Dense BatchNormalization Activation "
            "Dropout Dense BatchNormalization Activation Dropout Dense",
        ),
    ],
    ids=["alone", "published", "two layers"],
)
def test_the_head_in_order(values, head):
    names = [type(layer).__name__ for layer in space().build(point(values)).layers]
    last_pool = len(names) - 1 - names[::-1].index("MaxPooling2D")
    assert names[last_pool + 1 :] == head.split()


def test_the_published_model_lies_in_the_study():
    hp = point(VGG16_TRANSFER)
    model = FashionVGG16(GREY, 10, 12_800, weights="none").build(hp)
    active = {parameter.name for parameter in hp.space if hp.is_active(parameter)}
    assert set(VGG16_TRANSFER) <= active
    assert model.get_layer("block1_conv1").output.shape == (None, 32, 32, 64)
    assert type(model.optimizer) is keras.optimizers.Adam


@pytest.fixture
def mixed_bfloat16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_bfloat16")
def test_what_is_unfrozen_is_trained_and_saved_as_plain_keras(weights_file, tmp_path):
    values = {"num_unfrozen_blocks": 1, "schedule": "constant"}
    model = space((8, 8, 1), weights_file).build(point(values))
    before = {name: model.get_layer(name).get_weights() for name in WIDTHS}
    images, labels = pixels((8, 8, 1), 16), np.eye(10, dtype="float32")[np.arange(16) % 10]
    for _ in range(2):
        model.train_on_batch(images, labels)
    for name, weights in before.items():
        moved = [
            not np.array_equal(now, was)
            for now, was in zip(model.get_layer(name).get_weights(), weights, strict=True)
        ]
        assert moved == [name.startswith("block5")] * 2
    predicted = model(images)
    assert keras.backend.standardize_dtype(predicted.dtype) == "float32"
    np.testing.assert_allclose(np.sum(predicted, axis=1), 1, atol=1e-5)

    make_plain(model)
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = json.loads(archive.read("config.json"))
    assert not list(foreign(config))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images), predicted)
    assert int(loaded.optimizer.iterations) == 2


def foreign(config):
    """What a saved model refers to that is not Keras's own."""
    if isinstance(config, list):
        for item in config:
            yield from foreign(item)
    elif isinstance(config, dict):
        module = config.get("module")
        if module is not None and not re.match(r"keras(\.|$)", module):
            yield module, config["class_name"]
        for item in config.values():
            yield from foreign(item)


# Keras warns of each layer, then raises an error for all of them.
@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        (".h5", {"block1_conv1": (3, 64)}, r"Layer count mismatch .*expected 13 layers, found 1 "),
        (
            ".h5",
            dict.fromkeys(WIDTHS, (1, 2)),
            r"named block1_conv1\).* shape \(3, 3, 3, 64\)\. Received .* shape \(3, 3, 1, 2\)",
        ),
        (".weights.h5", {"block1_conv1": (3, 64)}, r"could not be loaded"),
        (".h5", "text", r"file signature not found"),
        (".keras", "text", r"not a zip file"),
        (".npz", "text", r"not supported"),
    ],
)
def test_a_wrong_weights_file_is_named(tmp_path, ending, content, message):
    path = tmp_path / f"mine{ending}"
    if content == "text":
        path.write_text("text")
    else:
        write_weights(path, content)
    with pytest.raises(
        ValueError, match=rf"{path} is no file of VGG16's weights without its top .*{message}"
    ):
        space(weights=str(path)).build(point(HEAD_ALONE))


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/none.h5 is no file of .*weights="):
        space(weights=f"{tmp_path}/none.h5").build(point(HEAD_ALONE))


def test_images_are_grey_or_rgb():
    with pytest.raises(ValueError, match=r"1 channel.* RGB \(3\). Received: input_shape=\(8, 8, 4"):
        space((8, 8, 4))
