"""Data sets: fetched and verified once by the coordinator, read and split by the workers.

    content_hash = datasets.ensure("fashion_mnist")  # coordinator, once, before trial 0
    part = datasets.load_split("fashion_mnist")      # worker: training arrays only

Files lie where Keras puts them, `<KERAS_HOME>/datasets/<folder>`, so that both share one copy.
No Keras import: the coordinator uses this file. scikit-learn loads late,
so that `--help` stays fast.

A new data set is a row of DATASETS, with a `read` function where no existing one fits.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from search import fetching
from search.errors import EXIT_USAGE, SearchError
from search.fetching import DataFile

SPLIT_SEED = 20_170_825  # any fixed number; this one is the day Fashion-MNIST appeared on arXiv
KERAS_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"  # as in keras.datasets

Arrays = tuple[np.ndarray, np.ndarray]  # (n, height, width, channels) uint8, (n,) uint8


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is known of a data set without reading it."""

    name: str
    input_shape: tuple[int, int, int]  # height, width, channels
    class_names: tuple[str, ...]  # the label is the position
    read: Callable[[Dataset, str], Arrays]  # (data set, "train" or "test") -> arrays
    folder: str = ""  # below <KERAS_HOME>/datasets
    url: str = KERAS_URL
    train_files: tuple[DataFile, ...] = ()  # images, labels; none: it comes with a package
    test_files: tuple[DataFile, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class Positions(NamedTuple):
    """Where the parts lie in the training set: sorted (n,) int64 arrays."""

    train: np.ndarray
    val: np.ndarray
    monitor: np.ndarray  # a part of val


class Split(NamedTuple):
    """The training set in its parts, as the workers see it; y is uint8."""

    x_train: np.ndarray  # (n, height, width, channels) uint8; fashion_mnist: n = 50 000
    y_train: np.ndarray  # (n,)
    x_val: np.ndarray  # fashion_mnist: 10 000
    y_val: np.ndarray
    x_monitor: np.ndarray  # the part of x_val that is measured at every report: 2 500
    y_monitor: np.ndarray


def find(name: str) -> Dataset:
    """The data set of that name, without reading it.

    Raises:
        SearchError: if there is none; the message lists those known and the nearest.
    """
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(str(name), DATASETS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise SearchError(
        f"A data set is one of {', '.join(sorted(DATASETS))}. Received: {name!r}.{hint}",
        exit_code=EXIT_USAGE,
    )


def ensure(name: str) -> str:
    """Makes sure that the data set is on disk and is the published one.

    A missing or wrong file is fetched, and once more if the download is wrong too.

    Returns:
        A SHA-256 of the content (of the files in order, or of the arrays of a bundled data set),
        64 hexadecimal digits, for provenance.

    Raises:
        SearchError: if files are missing or wrong and cannot be fetched; the message lists them,
            their MD5, their folder and the study that needs no network.
    """
    dataset = find(name)
    files = dataset.train_files + dataset.test_files
    if not files:
        arrays = (*dataset.read(dataset, "train"), *dataset.read(dataset, "test"))
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    folder = _folder(dataset)
    if fetching.wrong_files(folder, files):
        try:
            fetching.fetch(dataset.url, folder, files)
        except fetching.NotFetched as error:
            raise _not_fetched(dataset, folder, str(error)) from error
    content = b"".join((folder / file.name).read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()


def load_train(name: str) -> Arrays:
    """All training data; opens no test file.

    Returns:
        x (n, height, width, channels) uint8 with raw pixels 0-255, and y (n,) uint8.

    Raises:
        SearchError: if a file is missing or is not what its format says; the message names it.
    """
    dataset = find(name)
    return dataset.read(dataset, "train")


def load_test(name: str) -> Arrays:
    """The test data, in the shapes of `load_train`.

    Its one caller is search/evaluation.py, after the search has chosen: nothing may be selected
    on these figures.
    """
    dataset = find(name)
    return dataset.read(dataset, "test")


def load_split(name: str) -> Split:
    """The training data in its fixed parts; raises what `load_train` and `split` raise."""
    x, y = load_train(name)
    at = split(y)
    return Split(x[at.train], y[at.train], x[at.val], y[at.val], x[at.monitor], y[at.monitor])


def split(y: np.ndarray) -> Positions:
    """Stratified parts of a training set, the same at every call.

    A sixth is validation (fashion_mnist: 10 000 of 60 000, as many as its test set). A quarter of
    that, at most 2 500, is `monitor`, measured at every report; of fewer than 1 000 validation
    images all are, because a quarter would be noise.

    Args:
        y: (n,) labels of the whole training set.

    Raises:
        SearchError: if a class has too few images to be in every part.
    """
    val_size = max(round(len(y) / 6), len(np.unique(y)))
    train, val = _stratified(np.arange(len(y)), y, val_size)
    if len(val) < 1_000:
        return Positions(train, val, val)
    _, monitor = _stratified(val, y, min(2_500, len(val) // 4))
    return Positions(train, val, monitor)


def _stratified(positions: np.ndarray, y: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    try:
        rest, part = train_test_split(
            positions, test_size=size, stratify=y[positions], random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise SearchError(
            "A training set needs at least 2 images of every class and some more to be split. "
            f"Received: {len(positions)} images of {len(np.unique(y))} classes ({error})"
        ) from error
    return np.sort(rest), np.sort(part)


def _read_idx(dataset: Dataset, part: str) -> Arrays:
    images, labels = dataset.train_files if part == "train" else dataset.test_files
    folder = _folder(dataset)
    x = _parse_idx(folder / images.name, num_dims=3)[..., np.newaxis]
    y = _parse_idx(folder / labels.name, num_dims=1)
    if x.shape[1:] != dataset.input_shape:
        raise _unusable(folder / images.name, f"images are {dataset.input_shape}", x.shape[1:])
    if len(x) != len(y):
        raise _unusable(folder / labels.name, f"there is a label for each of {len(x)}", len(y))
    if len(y) and y.max() >= dataset.num_classes:
        raise _unusable(folder / labels.name, f"labels are 0-{dataset.num_classes - 1}", y.max())
    return x, y


def _parse_idx(path: Path, *, num_dims: int) -> np.ndarray:
    # The format: http://yann.lecun.com/exdb/mnist/ (2 zero bytes, type, dimensions, sizes, data)
    try:
        with gzip.open(path) as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unusable(path, "it is a complete gzip file", error) from error
    header = 4 + 4 * num_dims
    magic = bytes([0, 0, 8, num_dims])  # 8: unsigned bytes
    if content[:4] != magic or len(content) < header:
        raise _unusable(path, f"it starts with the bytes {magic.hex()}", content[:4].hex())
    shape = struct.unpack(f">{num_dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise _unusable(path, f"it holds {math.prod(shape)} bytes", len(content) - header)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_digits(dataset: Dataset, part: str) -> Arrays:
    from sklearn.datasets import load_digits

    bundle = load_digits()  # images (1797, 8, 8) float64, whole numbers 0-16
    x = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    y = bundle.target.astype(np.uint8)
    train, test = _stratified(np.arange(len(y)), y, 360)  # a fifth
    chosen = train if part == "train" else test
    return x[chosen], y[chosen]


def _folder(dataset: Dataset) -> Path:
    # Keras's rule, less its silent move to /tmp when the folder is not writable.
    home = Path(os.environ.get("KERAS_HOME") or "~/.keras")
    try:
        return home.expanduser() / "datasets" / dataset.folder
    except RuntimeError as error:
        raise SearchError(
            f"Data sets need a folder. Received: no home folder ({error}). Fix: set KERAS_HOME"
        ) from error


def _not_fetched(dataset: Dataset, folder: Path, why: str) -> SearchError:
    files = fetching.wrong_files(folder, dataset.train_files + dataset.test_files)
    wrong = ", ".join(f"{file.name} (MD5 {file.md5})" for file in files)
    return SearchError(
        f"Data set {dataset.name}: files are missing or damaged and could not be fetched from "
        f"{dataset.url} ({why}). Fix: put {wrong} into {folder}, or set KERAS_HOME to a writable "
        "folder, or run `fmnist-search --study quickstart`, which needs no network"
    )


def _unusable(path: Path, rule: str, received: object) -> SearchError:
    return SearchError(
        f"{path} is no usable data file: {rule}. Received: {received}. Fix: delete it; the next "
        "run fetches it again"
    )


DATASETS = {
    "fashion_mnist": Dataset(
        name="fashion_mnist",
        input_shape=(28, 28, 1),
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        read=_read_idx,
        folder="fashion-mnist",
        # MD5 as published: https://github.com/zalandoresearch/fashion-mnist#get-the-data
        train_files=(
            DataFile("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            DataFile("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
        ),
        test_files=(
            DataFile("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            DataFile("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
    ),
    "digits": Dataset(
        name="digits",
        input_shape=(8, 8, 1),
        class_names=tuple("0123456789"),
        read=_read_digits,
    ),
}
