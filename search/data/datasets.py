"""Data sets: made ready once by the coordinator, read and split by the workers.

    content_hash = datasets.ensure("fashion_mnist")  # coordinator, once, before trial 0
    part = datasets.load_split("fashion_mnist")      # worker: training arrays only

A reference is a name in DATASETS, the path of a .npz file (formats.py) or that of a folder of
images (image_folder.py); a name wins. Published files lie where Keras puts them,
`<KERAS_HOME>/datasets/<folder>`, so that both share one copy. No Keras import: the coordinator
uses this file. scikit-learn and Pillow load late, so that `--help` stays fast.

A new data set is a row of DATASETS, with a `read` function where no existing one fits.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from search import artifacts
from search.data import fetching, formats
from search.data.fetching import DataFile
from search.data.formats import Arrays, Shape
from search.errors import EXIT_USAGE, SearchError

SPLIT_SEED = 20_170_825  # any fixed number; this one is the day Fashion-MNIST appeared on arXiv
KERAS_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"  # as in keras.datasets


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is known of a data set without reading its pixels."""

    name: str  # of a path: its last part, such as flowers.npz
    input_shape: Shape  # height, width, channels
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
    """The training set in its parts, as the workers see it; y is of a small unsigned type."""

    x_train: np.ndarray  # (n, height, width, channels) uint8; fashion_mnist: n = 50 000
    y_train: np.ndarray  # (n,)
    x_val: np.ndarray  # fashion_mnist: 10 000
    y_val: np.ndarray
    x_monitor: np.ndarray  # the part of x_val that is measured at every report: 2 500
    y_monitor: np.ndarray


class _Source(NamedTuple):
    """How one kind of path is used; each raises SearchError where it is unusable."""

    describe: Callable[[Path], tuple[Shape, tuple[str, ...]]]  # input shape, class names
    ensure: Callable[[Path], str]  # SHA-256 of the content, after a check of all of it
    read: Callable[[Path, str], Arrays]  # (path, "train" or "test")


def resolve(reference: str | os.PathLike[str], relative_to: Path) -> str:
    """The reference as it means the same in every process: a name as it is, a path made absolute.

    Args:
        relative_to: the folder from which a relative path goes; `~` is the home folder.
    """
    reference = os.fspath(reference)
    path = os.path.abspath(relative_to / os.path.expanduser(reference))
    is_path = _is_path(reference) or (reference != "" and os.path.isdir(path))
    return path if is_path and reference not in DATASETS else reference


def find(reference: str) -> Dataset:
    """What is known of a data set without reading its pixels.

    Raises:
        SearchError: if there is none; the message lists those known and the nearest. If a path's
            data are unusable, as far as that shows without pixels.
    """
    if reference in DATASETS:
        return DATASETS[reference]
    path = _path(reference)
    source = _source(path)
    input_shape, class_names = source.describe(path)
    return Dataset(
        name=path.name,
        input_shape=input_shape,
        class_names=class_names,
        read=lambda _, part: source.read(path, part),
    )


def ensure(reference: str) -> str:
    """Makes sure that the data set is on disk, complete and sound; of a name, the published one.

    A published file that is missing or wrong is fetched, and once more if the download is wrong
    too. A file of the user's is read whole; a folder's images are decoded once.

    Returns:
        A SHA-256 of the content (of the files in order, or of the arrays of a bundled data set or
        a folder of images), 64 hexadecimal digits, for provenance.

    Raises:
        SearchError: if files are missing or wrong and cannot be fetched; the message lists them,
            their hashes, their folder and the study that needs no network. If data of the user's
            break a rule; the message names the file, the place and the fix.
    """
    if reference not in DATASETS:
        path = _path(reference)
        return _source(path).ensure(path)
    dataset = DATASETS[reference]
    files = _files(dataset)
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


def load_train(reference: str) -> Arrays:
    """All training data; opens no test pixels.

    Returns:
        x (n, height, width, channels) uint8 with raw pixels 0-255, and y (n,) of the smallest
        unsigned type that holds the classes. Both may be read-only.

    Raises:
        SearchError: if a file is missing or is not what its format says; the message names it.
    """
    return _read(reference, "train")


def load_test(reference: str) -> Arrays:
    """The test data, in the shapes of `load_train`.

    Its one caller is search/winners/evaluation.py, after the search has chosen: nothing may be
    selected on these figures.
    """
    return _read(reference, "test")


def load_split(reference: str) -> Split:
    """The training data in its fixed parts; raises what `load_train` and `split` raise."""
    x, y = load_train(reference)
    at = split(y)
    return Split(x[at.train], y[at.train], x[at.val], y[at.val], x[at.monitor], y[at.monitor])


def split(y: np.ndarray) -> Positions:
    """Stratified parts of a training set, the same at every call.

    A sixth is validation (fashion_mnist: 10 000 of 60 000, as many as its test set), and at least
    as many images as there are classes. A quarter of that, at most 2 500, is `monitor`, measured
    at every report; of fewer than 1 000 validation images, or 4 a class, all are, because a
    quarter would be noise. A class of a few images among thousands may be in training alone.

    Args:
        y: (n,) labels of the whole training set.

    Raises:
        SearchError: if a class has fewer than 2 images.
    """
    num_classes = len(np.unique(y))
    train, val = _stratified(np.arange(len(y)), y, max(round(len(y) / 6), num_classes))
    if len(val) < max(1_000, 4 * num_classes):
        return Positions(train, val, val)
    counts = np.bincount(y[val], minlength=int(y.max()) + 1)
    # A class with a single validation image can't be stratified: it counts with the largest.
    groups = np.where(counts[y] < 2, counts.argmax(), y)
    _, monitor = _stratified(val, groups, max(min(2_500, len(val) // 4), num_classes))
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


def _is_path(reference: str) -> bool:
    return (
        reference.lower().endswith(".npz")
        or os.sep in reference
        or reference.startswith("~")
        or os.path.isdir(reference)
    )


def _path(reference: str) -> Path:
    if _is_path(str(reference)):
        return Path(reference).expanduser()
    near = difflib.get_close_matches(str(reference), DATASETS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise SearchError(
        f"A data set is one of {', '.join(sorted(DATASETS))}, or FILE.npz, or a folder of images. "
        f"Received: {reference!r}.{hint}",
        exit_code=EXIT_USAGE,
    )


def _source(path: Path) -> _Source:
    if os.path.isdir(path):
        from search.data import image_folder

        return _Source(image_folder.describe, image_folder.prepare, image_folder.load)
    if path.suffix.lower() == ".npz" and os.path.isfile(path):
        return _Source(formats.describe_npz, _ensure_npz, formats.read_npz)
    what = "is neither" if os.path.exists(path) else "is not there"
    raise SearchError(
        "A data set's path is that of a .npz file or of a folder of images. "
        f"Received: {path}, which {what}. Fix: check the path",
        exit_code=EXIT_USAGE,
    )


def _read(reference: str, part: str) -> Arrays:
    if reference in DATASETS:
        dataset = DATASETS[reference]
        return dataset.read(dataset, part)
    path = _path(reference)
    return _source(path).read(path, part)


def _ensure_npz(path: Path) -> str:
    for part in ("train", "test"):
        formats.read_npz(path, part)
    return artifacts.sha256(path)


def _read_idx(dataset: Dataset, part: str) -> Arrays:
    files = dataset.train_files if part == "train" else dataset.test_files
    images, labels = (_folder(dataset) / file.name for file in files)
    return formats.read_idx(images, labels, dataset.input_shape, dataset.num_classes)


def _read_npz(dataset: Dataset, part: str) -> Arrays:
    return formats.read_npz(_folder(dataset) / dataset.train_files[0].name, part)


def _read_cifar10(dataset: Dataset, part: str) -> Arrays:
    return formats.read_cifar10(_folder(dataset) / dataset.train_files[0].name, part)


def _read_digits(dataset: Dataset, part: str) -> Arrays:
    from sklearn.datasets import load_digits

    bundle = load_digits()  # images (1797, 8, 8) float64, whole numbers 0-16
    x = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    y = bundle.target.astype(np.uint8)
    train, test = _stratified(np.arange(len(y)), y, 360)  # a fifth
    chosen = train if part == "train" else test
    return x[chosen], y[chosen]


def _files(dataset: Dataset) -> tuple[DataFile, ...]:
    return tuple(dict.fromkeys(dataset.train_files + dataset.test_files))


def files_of(dataset: Dataset) -> list[Path]:
    """Where a published data set's files lie; none where it comes with a package."""
    return [_folder(dataset) / file.name for file in _files(dataset)]


def _folder(dataset: Dataset) -> Path:
    return fetching.keras_datasets() / dataset.folder


def _not_fetched(dataset: Dataset, folder: Path, why: str) -> SearchError:
    files = fetching.wrong_files(folder, _files(dataset))
    wrong = ", ".join(f"{file.name} ({file.hash})" for file in files)
    return SearchError(
        f"Data set {dataset.name}: files are missing or damaged and could not be fetched from "
        f"{dataset.url} ({why}). Fix: put {wrong} into {folder}, or set KERAS_HOME to a writable "
        "folder, or run `fmnist-search --study quickstart`, which needs no network"
    )


_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_THINGS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
# SHA-256 as in keras/src/datasets/mnist.py.
_MNIST = DataFile(
    "mnist.npz", "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
)
# MD5 as published: https://www.cs.toronto.edu/~kriz/cifar.html
_CIFAR10 = DataFile("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530")
DATASETS = {
    "fashion_mnist": Dataset(
        name="fashion_mnist",
        input_shape=(28, 28, 1),
        class_names=_CLOTHES,
        read=_read_idx,
        folder="fashion-mnist",
        # MD5 as published: https://github.com/zalandoresearch/fashion-mnist#get-the-data
        train_files=(
            DataFile("train-images-idx3-ubyte.gz", "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            DataFile("train-labels-idx1-ubyte.gz", "md5:25c81989df183df01b3e8a0aad5dffbe"),
        ),
        test_files=(
            DataFile("t10k-images-idx3-ubyte.gz", "md5:bef4ecab320f06d8554ea6380940ec79"),
            DataFile("t10k-labels-idx1-ubyte.gz", "md5:bb300cfdad3c16e7a12a480ee83cd310"),
        ),
    ),
    "digits": Dataset(
        name="digits",
        input_shape=(8, 8, 1),
        class_names=tuple("0123456789"),
        read=_read_digits,
    ),
    "mnist": Dataset(
        name="mnist",
        input_shape=(28, 28, 1),
        class_names=tuple("0123456789"),
        read=_read_npz,
        train_files=(_MNIST,),
        test_files=(_MNIST,),
    ),
    "cifar10": Dataset(
        name="cifar10",
        input_shape=(32, 32, 3),
        class_names=_THINGS,  # the order of batches.meta.txt in the archive
        read=_read_cifar10,
        url="https://www.cs.toronto.edu/~kriz/",
        train_files=(_CIFAR10,),
        test_files=(_CIFAR10,),
    ),
}
