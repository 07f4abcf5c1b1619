"""Do residual networks beat plain convolutional ones on Fashion-MNIST, at the same cost?

Goal:
    The residual network with the highest validation accuracy after 10 epochs, found by trials of
    at most 5: what study cnn finds is the measure, its trials are as long and cost about as much.
Scientific:
    The architecture: stages, blocks in each, filters and their growth, kernel of the stem, order
    of normalisation, activation and convolution, shortcut where shapes differ.
Nuisance:
    Optimizer, its learning rate, weight decay and momentum, schedule, batch size, dropout in
    blocks and before the last layer, label smoothing and augmentation: the best of these differ
    from one architecture to the next.
Fixed:
    Data and its split, images in a training, blocks of two 3x3 convolutions, batch normalisation,
    ReLU, global average pooling.
"""

from spaces.resnet import ResNet
from studies.study import Study


class FashionResNet(ResNet):
    """Up to 32 filters in the first stage: no point costs more than one and a half times the
    defaults, as in study cnn."""

    filters = (16, 32, 8)


study = Study(
    name="resnet",
    space=FashionResNet,
    trials=100,
    epochs=5,
    final_epochs=10,
    reduction_factor=4,
    known_points=({},),
)
