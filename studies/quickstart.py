"""The whole journey in half a minute on two CPU cores: scikit-learn's digits, small networks.

Goal:
    See a search work from end to end; the best network reads about 98 % of the digits.
Scientific:
    One block or two, filters, pooling, batch normalisation, dense units.
Nuisance:
    Optimizer and its settings, schedule, batch size, dropout, label smoothing, augmentation.
Fixed:
    Data (1 797 images of 8x8 pixels) and its split, one convolution per block.
"""

from spaces.cnn import CNN
from studies.study import Study


class SmallCNN(CNN):
    """At most two blocks of one convolution: a second or two from point to first step."""

    max_blocks = 2
    max_convs_per_block = 1
    growths = (1.0, 2.0)
    first_kernel_sizes = (3,)
    dense_units = (0, 128, 32)
    max_shift = 1
    max_erasing = 0.2
    batch_sizes = (32, 64, 128)
    # A digit is not its mirror image, and a pixel is an eighth of its width; the steps of eight
    # short epochs are few, hence small batches and long strides.
    defaults = CNN.defaults | {
        "num_blocks": 2,
        "convs_per_block": 1,
        "dense_units": 64,
        "flip": False,
        "shift": 0,
        "batch_size": 32,
        "conv_dropout": 0.0,
        "adamw_learning_rate": 5e-3,
    }


study = Study(
    name="quickstart",
    space=SmallCNN,
    dataset="digits",
    trials=12,
    epochs=8,
    images_per_report=1_024,
    first_rung=3,  # a dozen trials are to leave something to compare
    reduction_factor=2,
    known_points=({},),
)
