"""How far do dense layers alone get on Fashion-MNIST?

Goal:
    The multi-layer perceptron with the highest validation accuracy after 20 epochs, found by
    trials of at most 10: what a convolutional network has to beat.
Scientific:
    The architecture: hidden layers, units and how they shrink, activation, batch normalisation.
Nuisance:
    Optimizer, its learning rate, weight decay and momentum, schedule, batch size, dropout of
    pixels and of hidden layers, label smoothing and augmentation: the best of these differ from
    one architecture to the next.
Fixed:
    Data and its split, images in a training, the order dense layer, batch normalisation,
    activation, dropout.
"""

from spaces.mlp import MLP
from studies.study import Study

# "Two hidden dense layers, Adam". What is not published: 128 units are a guess (TensorFlow's
# tutorial on these images has one layer of as many), the rest is off, or Keras's default.
PUBLISHED_MLP = {
    "units": 128,
    "batch_norm": False,
    "dropout": 0.0,
    "flip": False,
    "optimizer": "adam",
    "schedule": "constant",
}

# Reports of 25 600 images: 20 in a trial.
study = Study(
    name="mlp",
    space=MLP,
    trials=60,
    epochs=10,
    final_epochs=20,
    images_per_report=25_600,
    reduction_factor=4,
    known_points=({}, PUBLISHED_MLP),
)
