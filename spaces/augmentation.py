"""Random changes of training images as layers of the model: a saved model needs nothing else.

    x = augmented(blocks.scaled(inputs), flip=True, shift=2, erasing=0.25)

The layers act in training only, on images in [0, 1] whose background is 0 (black). Keras's own act
whenever they are not told otherwise, so that `model(images)` would answer for changed images; the
training=False given here yields to the training=True of `fit` and stands for every other call.
"""

from __future__ import annotations

from typing import Any

import keras

# Area of an erased patch as a fraction of the image: the paper's range (arXiv:1708.04896).
ERASED_AREA = (0.02, 0.33)


def augmented(x: Any, *, flip: bool = False, shift: int = 0, erasing: float = 0.0) -> Any:
    """Images (n, height, width, channels) in [0, 1] -> the same, changed at random in training.

    Args:
        flip: mirror left and right, every second image.
        shift: pixels, at most, up or down and left or right; what comes into view is black.
        erasing: probability that a random rectangle of an image is blackened.
    """
    _, height, width, _ = x.shape
    if flip:
        x = keras.layers.RandomFlip("horizontal")(x, training=False)
    if shift:
        x = keras.layers.RandomTranslation(
            shift / height, shift / width, fill_mode="constant", interpolation="nearest"
        )(x, training=False)
    if erasing:
        # One number would mean a probability drawn between 0 and it, half of what is asked.
        x = keras.layers.RandomErasing(
            (erasing, erasing), scale=ERASED_AREA, fill_value=0.0, value_range=(0, 1)
        )(x, training=False)
    return x
