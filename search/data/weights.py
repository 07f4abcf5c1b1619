"""Pretrained weights: made ready once by the coordinator, loaded by the workers.

    weights = ensure("imagenet")  # or "none", or a file
    space(..., weights=weights.path)

The published file lies where Keras puts it, `<KERAS_HOME>/models`, so that both share one copy. No
Keras import: whether a file of the user's has the layout of the network shows when a worker builds
the first model.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

from search import artifacts
from search.data import fetching
from search.data.fetching import DataFile
from search.errors import EXIT_USAGE, SearchError

IMAGENET = "imagenet"
NONE = "none"
RANDOM = "random weights"  # their label
# Address and MD5 as in keras/src/applications/vgg16.py.
URL = "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/"
PUBLISHED = DataFile(
    "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5", "md5:6d6bbae143d832006294945121d1f1fc"
)
ENDINGS = (".h5", ".hdf5", ".keras")  # those that Keras's loader tells apart
_HDF5 = b"\x89HDF\r\n\x1a\n"


class Weights(NamedTuple):
    """Weights that are ready."""

    path: str  # what a space takes: the file, or "none"
    sha256: str  # of the file, 64 hexadecimal digits; "" for none
    label: str  # stands beside every figure that came from them


def resolve(reference: str | os.PathLike[str], relative_to: Path) -> str:
    """The reference as it means the same in every process: a path becomes absolute."""
    reference = os.fspath(reference)
    if reference in (IMAGENET, NONE):
        return reference
    return os.path.abspath(relative_to / os.path.expanduser(reference))


def ensure(reference: str) -> Weights:
    """Makes sure that the weights are on disk.

    Args:
        reference: "imagenet" for VGG16's as Keras publishes them, which are fetched where they are
            missing or wrong; "none" for random ones; or a file, of whatever content.

    Raises:
        SearchError: if they can't be fetched; the message names the file, its hash and its folder.
            If the file is not there, or is neither HDF5 nor a Keras model.
    """
    if reference == NONE:
        return Weights(NONE, "", RANDOM)
    path = _published() if reference == IMAGENET else _own(reference)
    is_published = not fetching.wrong_files(path.parent, [DataFile(path.name, PUBLISHED.hash)])
    label = "ImageNet weights" if is_published else f"weights of {path.name}"
    return Weights(str(path), artifacts.sha256(path), label)


def _published() -> Path:
    folder = fetching.keras_datasets().with_name("models")
    if fetching.wrong_files(folder, [PUBLISHED]):
        try:
            fetching.fetch(URL, folder, (PUBLISHED,))
        except fetching.NotFetched as error:
            raise SearchError(
                "VGG16's ImageNet weights are missing or damaged and could not be fetched from "
                f"{URL} ({error}). Fix: put {PUBLISHED.name} ({PUBLISHED.hash}) into {folder}, or "
                "give it with `--weights FILE`, or begin with random weights: `--weights none`"
            ) from error
    return folder / PUBLISHED.name


def _own(reference: str) -> Path:
    path = Path(reference).expanduser()
    if what := _unusable(path):
        raise SearchError(
            f"--weights is imagenet, none, or a file of weights ({', '.join(ENDINGS)}). "
            f"Received: {path}, which {what}. Fix: check the path",
            exit_code=EXIT_USAGE,
        )
    return path


def _unusable(path: Path) -> str | None:
    if not os.path.isfile(path):
        return "is no file" if os.path.exists(path) else "is not there"
    if path.suffix not in ENDINGS:
        return "ends otherwise"
    try:
        with open(path, "rb") as stream:
            if path.suffix == ".keras":
                return None if zipfile.is_zipfile(stream) else "is no Keras model"
            return None if stream.read(len(_HDF5)) == _HDF5 else "is no HDF5 file"
    except OSError as error:
        return f"can't be read ({error.strerror})"
