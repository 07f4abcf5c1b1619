"""What models are trained and measured on: parts of a training set, or what a frozen part of the
model makes of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import keras
import numpy as np

from search.data import datasets
from search.errors import SearchError
from search.training import backend, features, training
from search.training.feature_store import FeatureStore

logger = logging.getLogger("search")

Arrays = tuple[np.ndarray, np.ndarray]  # images and labels


class TrainingData:
    """A data set's training images, read when they are first needed; opens no test pixels.

    Args:
        reference: a name or path that `datasets.find` knows.
        cache: folder for the activations of frozen parts.
        cache_size: bytes that they may take; 0 for none.
    """

    def __init__(self, reference: str, cache: Path, cache_size: int):
        self._reference = reference
        self._store = FeatureStore(cache, cache_size) if cache_size else None

    @cached_property
    def _images(self) -> Arrays:
        x, y = datasets.load_train(self._reference)
        return backend.shareable(x), y

    @cached_property
    def at(self) -> datasets.Positions:
        """Where the parts lie in the training set."""
        return datasets.split(self._images[1])

    @cached_property
    def everywhere(self) -> np.ndarray:
        """The positions of all images, (n,)."""
        return np.arange(len(self._images[1]))

    @cached_property
    def _content(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self._images[0]).data).hexdigest()

    def arrays(self, chosen: np.ndarray) -> Arrays:
        """Copies of the images and labels at these positions."""
        x, y = self._images
        return x[chosen], y[chosen]

    def rows(self, inputs: np.ndarray, chosen: np.ndarray) -> training.Data:
        """What a model reads (an input for each image, from `feeding`) at these positions, and the
        labels; nothing is copied."""
        return backend.Rows(inputs, chosen), self._images[1][chosen]

    @contextmanager
    def feeding(
        self, model: keras.Model, tell: Callable[[str], None]
    ) -> Iterator[tuple[keras.Model, np.ndarray]]:
        """What is trained, and what it reads, for each image of the training set.

        The model and the images; or, where nothing before some layer is trained or random, what
        follows there, and the activations up to there, which are computed once in a run.

        Args:
            tell: how far that is, as text.
        """
        images = self._images[0]
        with ExitStack() as stack:
            if self._store and (parts := features.cut(model, images)):
                opened = self._store.open(
                    parts,
                    images,
                    data=self._content,
                    tell=lambda done, of: tell(f"features {done / of:.0%}"),
                )
                try:
                    model, images = parts.rest, stack.enter_context(opened)
                except SearchError as error:
                    logger.warning("trained on images: %s", error)
            yield model, images
