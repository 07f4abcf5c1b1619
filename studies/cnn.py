"""Which convolutional network is best on Fashion-MNIST, at a few minutes of training each?

Goal:
    The convolutional network with the highest validation accuracy after 10 epochs, found by
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

from spaces.cnn import CNN
from studies.study import Study

# Published networks, as points of the space: what they do not say is off, or Keras's default (Adam
# at 1e-3, which is the space's default as well). studies/baselines.py says what was chosen where a
# publication is silent, and trains each as it was published.
PUBLISHED = {
    "convs_per_block": 1,
    "dense_units": 128,
    "flip": False,
    "shift": 0,
    "optimizer": "adam",
    "schedule": "constant",
}
OVERFIT_CNN = PUBLISHED | {
    "padding": "valid",
    "last_block_pools": False,
    "batch_norm": False,
    "conv_dropout": 0.0,
    "dense_dropout": 0.0,
}
REGULARISED_CNN = OVERFIT_CNN | {"conv_dropout": 0.25, "dense_dropout": 0.5}
DROPOUT_CNN = PUBLISHED | {
    "padding": "valid",
    "num_blocks": 2,
    "batch_norm": False,
    "conv_dropout": 0.25,
    "dense_dropout": 0.5,
}
BATCHNORM_CNN = PUBLISHED | {"conv_dropout": 0.25, "dense_dropout": 0.5}
BASIC_CNN = PUBLISHED | {
    "num_blocks": 2,
    "batch_norm": False,
    "conv_dropout": 0.0,
    "dense_dropout": 0.0,
}
SHALLOW_CNN = BASIC_CNN | {"dense_dropout": 0.5}
ADVANCED_CNN = BATCHNORM_CNN | {"convs_per_block": 2, "dense_units": 256}
OPTIMUM_CNN = ADVANCED_CNN | {"conv_dropout": 0.1, "dense_dropout": 0.3, "schedule": "cosine"}
PLATEAU_CNN = ADVANCED_CNN | {"dense_units": 128, "schedule": "plateau"}
DEEP_CNN = PLATEAU_CNN | {"batch_norm": False, "schedule": "constant"}
BASELINES = (
    *(OVERFIT_CNN, REGULARISED_CNN, DROPOUT_CNN, BASIC_CNN, ADVANCED_CNN, OPTIMUM_CNN),
    *(SHALLOW_CNN, DEEP_CNN, PLATEAU_CNN, BATCHNORM_CNN),
)


class FashionCNN(CNN):
    """Up to 32 filters in the first block: no point costs much more than the defaults, so that 100
    trials and three retrainings end within two hours on two cores."""

    filters = (16, 32, 8)


study = Study(
    name="cnn",
    space=FashionCNN,
    trials=100,
    epochs=5,
    final_epochs=10,
    reduction_factor=4,
    known_points=({}, *BASELINES),
)
