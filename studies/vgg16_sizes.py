"""At which size of its input, and how deep, is ImageNet's VGG16 to be trained for Fashion-MNIST?

Study vgg16 at 32x32, 48x48 and 64x64 pixels: for a machine with a GPU, since 64 cost four times as
much as 32, and activations of up to four times the size want as much more --cache-size.

Goal:
    The VGG16 with the highest validation accuracy after 6 epochs, found by trials of at most 3.
Scientific:
    How many of its blocks are trained, the size of its input, what turns the last map into a
    vector, the head's dense layers, their units and batch normalisation.
Nuisance:
    As in study vgg16.
Fixed:
    Data and its split, images in a training, VGG16's layers, their first weights and its own
    preparation of images.
"""

from dataclasses import replace

from spaces.vgg16 import VGG16
from studies import vgg16


class SizedVGG16(vgg16.FashionVGG16):
    """At all sizes."""

    input_sizes = VGG16.input_sizes


study = replace(vgg16.study, name="vgg16_sizes", space=SizedVGG16)
