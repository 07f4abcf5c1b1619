"""Which convolutional network is best on Fashion-MNIST, at a few minutes of training each?

Goal:
    The convolutional network with the highest validation accuracy after 12 epochs, found by
    trials of at most 5.
Scientific:
    The architecture: blocks, convolutions, filters and their growth, first kernel, padding,
    pooling, activation, batch normalisation, what turns maps into a vector, dense units.
Nuisance:
    Optimizer, its learning rate, weight decay and momentum, schedule, batch size, dropout, label
    smoothing and augmentation: the best of these differ from one architecture to the next.
Fixed:
    Data and its split, images in a training, 3x3 kernels after the first convolution, the order
    convolution, batch normalisation, activation.
"""

from typing import Any, ClassVar

from spaces.cnn import CNN
from studies.study import Study

# Published networks, as points of the space: what they do not say is off, or Keras's default
# (padding "valid", Adam at 1e-3). studies/baselines.py says what was chosen where a publication is
# silent, and trains each as it was published.
BASIC_CNN = {
    "num_blocks": 2,
    "convs_per_block": 1,
    "padding": "valid",
    "batch_norm": False,
    "conv_dropout": 0.0,
    "dense_units": 128,
    "dense_dropout": 0.0,
    "flip": False,
    "shift": 0,
    "optimizer": "adam",
    "schedule": "constant",
}
OVERFIT_CNN = BASIC_CNN | {"num_blocks": 3, "last_block_pools": False}
REGULARISED_CNN = OVERFIT_CNN | {"conv_dropout": 0.25, "dense_dropout": 0.5}
DROPOUT_CNN = BASIC_CNN | {"conv_dropout": 0.25, "dense_dropout": 0.5}
SHALLOW_CNN = BASIC_CNN | {"dense_dropout": 0.5}
# With "valid" its third pooling would leave one position.
DEEP_CNN = BASIC_CNN | {"num_blocks": 3, "padding": "same"}
BATCHNORM_CNN = DEEP_CNN | {"batch_norm": True, "conv_dropout": 0.25, "dense_dropout": 0.5}
PLATEAU_CNN = BATCHNORM_CNN | {"schedule": "plateau"}
ADVANCED_CNN = DROPOUT_CNN | {"convs_per_block": 2, "batch_norm": True}
OPTIMUM_CNN = ADVANCED_CNN | {"conv_dropout": 0.1, "dense_dropout": 0.3, "schedule": "cosine"}
BASELINES = (
    *(OVERFIT_CNN, REGULARISED_CNN, DROPOUT_CNN, BASIC_CNN, ADVANCED_CNN, OPTIMUM_CNN),
    *(SHALLOW_CNN, DEEP_CNN, PLATEAU_CNN, BATCHNORM_CNN),
)


class FashionCNN(CNN):
    """What five epochs can train: up to 32 filters in the first block, so that no point costs much
    more than the defaults, at most four blocks (a fifth would see one position), and learning rates
    and batches at which a trial gets anywhere. Of eight points drawn with Adam's rate below 5e-4,
    and of five drawn with batches of 256, none was among the best quarter after one epoch; of four
    drawn with a rate of SGD's above 0.15, none learnt. Strong regularisation is for longer
    trainings: of a hundred trials of a wider space, the best ten had dropout of at most 0.15 after
    their blocks, and erased at most every tenth image."""

    filters = (16, 32, 8)
    max_blocks = 4
    max_conv_dropout = 0.3
    max_shift = 2
    max_erasing = 0.3
    max_label_smoothing = 0.1
    batch_sizes = (64, 128)
    learning_rates: ClassVar[dict[str, tuple[float, float]]] = {
        "adam": (5e-4, 1e-2),
        "adamw": (5e-4, 1e-2),
        "sgd": (1e-2, 0.1),
    }
    momenta: ClassVar[dict[str, tuple[float, float]]] = {"sgd": (0.8, 0.95)}
    # Clothes fill their images: shifted, the default point had 79 % after 12 800 images, 83 % if
    # not (batches of 128). Of 59 points drawn and trained on 6 x 20 000 images, the best twelve had
    # batches of 64 nine times, and no shift eight times.
    defaults: ClassVar[dict[str, Any]] = CNN.defaults | {"shift": 0, "batch_size": 64}


study = Study(
    name="cnn",
    space=FashionCNN,
    trials=100,
    epochs=5,
    final_epochs=12,
    # In replays of recorded curves (README, "When to stop a trial") a first decision after 5 000 of
    # 120 000 images found a good model in four fifths of the time of one after 10 000. Here 12 800
    # of 250 000 are about the same share; 6 400 are less than any that was recorded.
    images_per_report=6_400,
    first_rung=2,
    # One in 3, 4, 5 and 6 are alike there. Of 71 trials of this study, decided anew from their
    # reports, one in 5 takes four fifths of the time of one in 3, and the best is the same.
    reduction_factor=5,
    known_points=({}, *BASELINES),
)
