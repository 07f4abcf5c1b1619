"""What the report's pictures show and nothing else stores: images, filters, activations.

    pictures.write("runs/cnn/evaluation/trial-3-seed-0-pictures.npz", model, test, probabilities,
                   train)  # a worker

The report reads this file, and needs neither the data set nor Keras.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from search import artifacts
from search.data.datasets import Arrays

logger = logging.getLogger("search")

MISCLASSIFIED = 40  # the surest of the wrong answers
SAMPLES = 20  # of the test set
PER_CLASS = 5  # of the training set
MOST_CLASSES = 20  # that have sample images
MOST_PIXELS = 64  # on a side of an image; a larger one is thinned
MAPPED_IMAGES = 4  # whose activation maps are kept
MAPS = 32  # filters and activation maps


def write(
    path: str | Path, model: Any, test: Arrays, probabilities: np.ndarray, train: Arrays
) -> None:
    """Writes the pictures of one model.

    Args:
        path: the `.npz` to write, with
            misclassified_images (m, height, width, channels) uint8, the surest first;
            misclassified_labels, misclassified_predicted (m,) class numbers and
            misclassified_confidence (m,) float32, the probability of the predicted class;
            samples_*: the same of test images drawn class by class;
            train_counts (classes,) int64; train_images and train_labels: a few of each class;
            and of a model with a convolution: filters (height, width, channels, f) float16,
            maps (images, height, width, f) float16 of the first of the samples, and layer, its
            name. f is at most MAPS, num_filters says how many there are.
        model: a Keras model.
        test: images (n, height, width, channels) uint8 and labels (n,).
        probabilities: (n, classes) float32, of the test images.
        train: the training set, as `test`.

    Raises:
        SearchError: if the file can't be written.
    """
    x, y = test
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != y)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISCLASSIFIED]
    shown = drawn_by_class(y, SAMPLES)
    arrays: dict[str, Any] = {}
    for name, chosen in (("misclassified", wrong), ("samples", shown)):
        arrays |= {
            f"{name}_images": thinned(x[chosen]),
            f"{name}_labels": y[chosen],
            f"{name}_predicted": predicted[chosen].astype(y.dtype),
            f"{name}_confidence": confidence[chosen].astype(np.float32),
        }
    arrays |= _of_training(*train, num_classes=probabilities.shape[1])
    arrays |= _of_first_convolution(model, x[shown[:MAPPED_IMAGES]])
    with artifacts.write_atomically(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def drawn_by_class(y: np.ndarray, size: int) -> np.ndarray:
    """Positions of at most `size` labels: the first of each class, then the second of each."""
    # Positions sorted by how many of their class came before them.
    order = np.argsort(y, kind="stable")
    counts = np.bincount(y)
    rank = np.empty(len(y), int)
    rank[order] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.lexsort((y, rank))[:size]


def thinned(x: np.ndarray) -> np.ndarray:
    """Images (n, height, width, channels), every so many-th pixel: at most MOST_PIXELS a side."""
    step = -(-max(x.shape[1:3]) // MOST_PIXELS)
    return x[:, ::step, ::step]


def _of_training(x: np.ndarray, y: np.ndarray, *, num_classes: int) -> Mapping[str, np.ndarray]:
    shown = drawn_by_class(y, len(y))
    shown = shown[y[shown] < MOST_CLASSES][: PER_CLASS * min(num_classes, MOST_CLASSES)]
    shown = shown[np.argsort(y[shown], kind="stable")]
    return {
        "train_counts": np.bincount(y, minlength=num_classes),
        "train_images": thinned(x[shown]),
        "train_labels": y[shown],
    }


def _of_first_convolution(model: Any, x: np.ndarray) -> Mapping[str, Any]:
    """Its filters, and what it makes of some images; nothing for a model without one."""
    try:
        found = _first_convolution(model, x)
    except Exception as error:  # a model of the user's may do anything with its layers
        # Its name alone: Keras puts the images into the text.
        logger.warning("no filters and activation maps: %s", type(error).__name__)
        return {}
    if found is None:
        return {}
    layer, maps = found
    filters = np.asarray(layer.kernel, np.float32)
    if layer.data_format == "channels_first":
        maps = np.moveaxis(maps, 1, -1)
    return {
        "layer": np.array(layer.name),
        "num_filters": filters.shape[-1],
        "filters": filters[..., :MAPS].astype(np.float16),
        "maps": thinned(maps[..., :MAPS]).astype(np.float16),
    }


def _first_convolution(model: Any, x: np.ndarray) -> tuple[Any, np.ndarray] | None:
    """The convolution that a model calls first, and what it gives for images.

    Read off while the model runs: a layer inside another model, or one of a model that is no graph,
    has no tensor that a second model could end in.
    """
    import keras

    called: list[tuple[Any, np.ndarray]] = []

    def recording(layer: Any, call: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            if not called:
                called.append((layer, np.asarray(keras.ops.cast(outputs, "float32"))))
            return outputs

        return record

    layers = [one for one in model._flatten_layers() if isinstance(one, keras.layers.Conv2D)]
    if not layers:
        return None
    for layer in layers:
        layer.call = recording(layer, layer.call)
    try:
        model(x, training=False)
    finally:
        for layer in layers:
            del layer.call
    return called[0] if called else None
