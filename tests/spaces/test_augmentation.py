import keras
import numpy as np
import pytest

from spaces.augmentation import augmented


@pytest.fixture(params=["float32", "mixed_bfloat16"])
def augment(request):
    """augment(images, **strengths) -> what training sees, under either policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    keras.utils.set_random_seed(7)

    def call(images, *, training=True, **strengths):
        inputs = keras.Input(images.shape[1:])
        outputs = keras.Model(inputs, augmented(inputs, **strengths))(images, training=training)
        return keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))

    yield call
    keras.config.set_dtype_policy(before)


# Whole halves, quarters ...: exact in bfloat16 too.
IMAGES = np.random.default_rng(0).integers(1, 9, (64, 12, 8, 1)).astype("float32") / 8


def test_without_strengths_there_are_no_layers():
    inputs = keras.Input((8, 8, 1))
    assert augmented(inputs) is inputs


@pytest.mark.parametrize("training", [False, None])
def test_outside_training_images_stay_as_they_are(augment, training):
    strengths = {"flip": True, "shift": 2, "erasing": 0.5}
    np.testing.assert_array_equal(augment(IMAGES, training=training, **strengths), IMAGES)


def test_fit_augments():
    inputs = keras.Input((1, 2, 1))
    x = keras.layers.Flatten()(augmented(inputs, flip=True))
    outputs = keras.layers.Dense(2, kernel_initializer="identity")(x)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), loss="mae")
    images = np.tile(np.float32([0, 1]).reshape(1, 1, 2, 1), (64, 1, 1, 1))
    labels = images.reshape(64, 2)
    keras.utils.set_random_seed(7)
    assert model.evaluate(images, labels, verbose=0) == 0
    assert 0.2 < model.fit(images, labels, batch_size=64, verbose=0).history["loss"][0] < 0.8


def test_flip_mirrors_about_half_of_the_images(augment):
    seen = augment(IMAGES, flip=True)
    same = (seen == IMAGES).all(axis=(1, 2, 3))
    mirrored = (seen == IMAGES[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


@pytest.mark.parametrize("shift", [1, 3])
def test_shift_moves_by_whole_pixels_up_to_its_strength_both_ways(augment, shift):
    dots = np.zeros((256, 12, 8, 1), "float32")
    dots[:, 6, 4] = 1
    _, rows, columns, _ = np.nonzero(augment(dots, shift=shift))
    assert len(rows) == 256
    assert set(rows - 6) == set(columns - 4) == set(range(-shift, shift + 1))


def test_what_shift_brings_into_view_is_black(augment):
    seen = augment(np.ones((64, 12, 8, 1), "float32"), shift=2)
    assert set(np.unique(seen)) == {0.0, 1.0}


@pytest.mark.parametrize("erasing", [0.25, 1.0])
def test_erasing_blackens_a_rectangle_with_its_probability(augment, erasing):
    black = augment(np.ones((512, 12, 8, 1), "float32"), erasing=erasing)[..., 0] == 0
    erased = black.any(axis=(1, 2))
    assert erased.mean() == pytest.approx(erasing, abs=0.12)
    for patch in black[erased]:
        assert patch.sum() == patch.any(axis=0).sum() * patch.any(axis=1).sum()
