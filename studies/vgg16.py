"""How deep is ImageNet's VGG16 to be trained for Fashion-MNIST?

At 32x32 pixels, on every machine: 48 cost twice as much, 64 four times. The same question at all
three sizes, for a machine with a GPU, is study vgg16_sizes. Would the sizes depend on the machine,
a study could not go on, nor a winner be trained again, on another one.

Goal:
    The VGG16 with the highest validation accuracy after 6 epochs, found by trials of at most 3.
Scientific:
    How many of its blocks are trained, the head's dense layers, their units and batch
    normalisation.
Nuisance:
    Optimizer, the head's learning rate and its ratio to that of the unfrozen blocks, schedule,
    weight decay, batch size, dropout, label smoothing and, where nothing is frozen, augmentation:
    the best of these differ from one depth to the next.
Fixed:
    Data and its split, images in a training and their size, VGG16's layers, their first weights
    and its own preparation of images.
"""

from typing import ClassVar

from spaces.vgg16 import VGG16
from studies.study import Study

# "Images to 32x32x3, VGG16 without top, custom dense layers, early stopping." Left open: how many
# dense layers of which width, whether VGG16 itself was trained (here, as in the usual recipe, not),
# which of its preparations the images got, optimizer and learning rate (here Adam at Keras's
# default), dropout, batch size, and how long it was trained.
VGG16_TRANSFER = {
    "num_unfrozen_blocks": 0,
    "head_batch_norm": False,
    "dropout": 0.0,
    "optimizer": "adam",
    "schedule": "constant",
}


class FashionVGG16(VGG16):
    """At one size, and without SGD: two choices less for thirty trials."""

    input_sizes: ClassVar[tuple[int, ...]] = (32,)
    learning_rates = {name: VGG16.learning_rates[name] for name in ("adam", "adamw")}  # noqa: RUF012


study = Study(
    name="vgg16",
    space=FashionVGG16,
    trials=30,
    epochs=3,
    final_epochs=6,
    images_per_report=6_400,
    reduction_factor=4,
    weights="imagenet",
    known_points=({}, VGG16_TRANSFER),
)
