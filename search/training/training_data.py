"""What models are trained and measured on: parts of a training set, or what a frozen part of the
model makes of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import keras
import numpy as np

from search.data import datasets
from search.errors import SearchError
from search.training import backend, features, training
from search.training.feature_store import FeatureStore

logger = logging.getLogger("search")

Arrays = tuple[np.ndarray, np.ndarray]  # images and labels


@dataclass(frozen=True)
class Feed:
    """What is trained, and what it reads, for each image of the training set."""

    model: keras.Model  # the whole, or what follows its frozen part
    inputs: np.ndarray  # images; or (n, ...) float16 or float32 activations up to there, mapped
    about: str = ""  # which of the two, and why, where a part is frozen
    cached: int = 0  # bytes of stored activations
    # Asked after the training, with `whole=model` or without: whether what was trained answers to
    # the stored activations as to exact ones. Where not, the next feed is in float32.
    holds: Callable[..., bool] = lambda **_: True


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
        self._warned: set[tuple[int | None, ...]] = set()

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
    def feeding(self, model: keras.Model, tell: Callable[[str], None]) -> Iterator[Feed]:
        """The model and the images; or, where nothing before some layer is trained or random, what
        follows there, and the activations up to there, which are computed once in a run.

        Args:
            tell: how far that is, as text, or that there is no room for them.
        """
        images = self._images[0]
        parts = features.cut(model, images) if self._store else None
        if not (self._store and parts):
            yield Feed(model, images)
            return
        opened = self._store.open(
            parts,
            images,
            data=self._content,
            tell=lambda done, of: tell(f"features {done / of:.0%}"),
        )
        with ExitStack() as stack:
            try:
                kept = stack.enter_context(opened)
            except SearchError as error:
                self._warn(parts.prefix.output_shape, error)
                tell("on images: no room for activations")
                feed = Feed(model, images, f"images, for want of room: {error}")
            else:
                holds = partial(self._store.holds, parts, images, kept, data=self._content)
                feed = Feed(parts.rest, kept, f"activations in {kept.dtype}", kept.nbytes, holds)
            yield feed

    def _warn(self, shape: tuple[int | None, ...], error: SearchError) -> None:
        """Once for such activations, not in each trial."""
        if shape not in self._warned:
            logger.warning("trained on images, which takes longer: %s", error)
        self._warned.add(shape)
