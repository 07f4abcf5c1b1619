"""How each file format of a data set is read and checked: IDX, NPZ, CIFAR-10's binary version.

    x, y = read_npz(Path("flowers.npz"), "train")  # (n, h, w, c) uint8, (n,) unsigned

Nothing is unpickled. Reading the training part opens no test pixels. A refusal names the file and
the first offending element, and says how to mend it.
"""

from __future__ import annotations

import gzip
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from search.errors import SearchError

Arrays = tuple[np.ndarray, np.ndarray]  # (n, height, width, channels) uint8, (n,) unsigned
Shape = tuple[int, int, int]  # height, width, channels

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_FIXES = {
    "keys": f"np.savez_compressed(path, {', '.join(f'{key}=...' for key in NPZ_KEYS)}) writes it",
    "x": "np.stack makes one array of images of one size",
    "y": "np.unique(names, return_inverse=True)[1] numbers them",
    "class": 'such as class_names=["cat", "dog"]',
}
_FETCH = "delete it; the next run fetches it again"
_BLOCK = 1_024  # images that are checked and converted at a time: float64 copies stay small


def read_idx(images: Path, labels: Path, input_shape: Shape, num_classes: int) -> Arrays:
    """Grey images and their labels in the two gzip files of MNIST and its kin.

    Raises:
        SearchError: if a file is missing or is not what its format says.
    """
    x = _parse_idx(images, num_dims=3)[..., np.newaxis]
    y = _parse_idx(labels, num_dims=1)
    if x.shape[1:] != input_shape:
        raise _unusable(images, f"images are {input_shape}", x.shape[1:])
    if len(x) != len(y):
        raise _unusable(labels, f"there is a label for each of {len(x)}", len(y))
    if len(y) and y.max() >= num_classes:
        raise _unusable(labels, f"labels are 0-{num_classes - 1}", y.max())
    return x, y


def read_cifar10(path: Path, part: str) -> Arrays:
    """CIFAR-10's binary version, straight from its tar.gz: https://www.cs.toronto.edu/~kriz/cifar.html

    Raises:
        SearchError: if the file is missing or is not what its format says.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if part == "train" else ["test_batch.bin"]
    batches = _members(path, [f"cifar-10-batches-bin/{name}" for name in names])
    size = 1 + 3 * 32 * 32  # a record: the label, then the image, channel first
    for name, batch in batches.items():
        if not batch or len(batch) % size:
            raise _unusable(path, f"{name} holds records of {size} bytes", f"{len(batch)} bytes")
    records = np.frombuffer(b"".join(batches.values()), np.uint8).reshape(-1, size)
    if records[:, 0].max() >= 10:
        raise _unusable(path, "labels are 0-9", records[:, 0].max())
    x = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(x), records[:, 0].copy()


def read_npz(path: Path, part: str) -> Arrays:
    """The "train" or "test" part of a .npz file with x_train, y_train, x_test, y_test.

    Images are (n, h, w) or (n, h, w, c) with c of 1 or 3, in whole numbers 0-255, bool, or floats
    that are all within 0-1 or all within 0-255; x_train decides which. Labels are (n,) or (n, 1)
    whole numbers from 0; `class_names` may name them. Every class occurs in both parts, at least
    twice in y_train.

    Raises:
        SearchError: if one of these does not hold.
    """
    with _opened(path) as npz:
        return npz.images(part), npz.labels(part)


def describe_npz(path: Path) -> tuple[Shape, tuple[str, ...]]:
    """Image shape and class names of a .npz file, without its pixels; raises as `read_npz`."""
    with _opened(path) as npz:
        _, height, width, channels = npz.shape("train")
        return (height, width, channels), npz.class_names


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


def _members(path: Path, names: list[str]) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name in names and (stream := archive.extractfile(member)):
                    found[member.name] = stream.read()
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise _unusable(path, "it is a complete .tar.gz file", error) from error
    if missing := [name for name in names if name not in found]:
        raise _unusable(path, f"it holds {missing[0]}", sorted(found))
    return {name: found[name] for name in names}


@contextmanager
def _opened(path: Path) -> Iterator[_Npz]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        fix = "check the path and its permissions"
        raise _unusable(path, "it can be read", error.strerror or error, fix) from error
    except Exception as error:  # whatever zipfile raises at other content
        raise _unusable(path, "it is a complete .npz file", error, _FIXES["keys"]) from error
    with archive:
        yield _Npz(path, archive)


class _Npz:
    """An open .npz file with the four keys and sound training labels.

    Read member by member, since `numpy.load` gives no shape without the content.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self._path = path
        self._archive = archive
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        if missing := [key for key in NPZ_KEYS if key not in keys]:
            received = f"{', '.join(keys) or 'none'}; missing: {', '.join(missing)}"
            raise self._refused(f"its keys are {', '.join(NPZ_KEYS)}", received, _FIXES["keys"])
        self._names = self._read_names() if "class_names" in keys else ()
        y = self._whole_numbers("y_train")
        num_classes = len(self._names) or int(y.max()) + 1
        self._check_classes("y_train", y, num_classes, at_least=2)
        self.class_names = self._names or tuple(str(label) for label in range(num_classes))

    def shape(self, part: str) -> tuple[int, ...]:
        """(n, height, width, channels) of the images of a part."""
        key = f"x_{part}"
        shape, _ = self._header(key)
        if len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
            is_channel_first = len(shape) == 4 and shape[1] in (1, 3)
            fix = f"np.moveaxis({key}, 1, -1)" if is_channel_first else "reshape or convert them"
            raise self._refused(f"{key} is (n, h, w), (n, h, w, 1) or (n, h, w, 3)", shape, fix)
        if 0 in shape:
            raise self._refused(f"{key} holds images", f"shape {shape}", "add some")
        num_labels = (*self._header(f"y_{part}")[0], 0)[0]
        if num_labels != shape[0]:
            rule = f"y_{part} has a label for each of the {shape[0]} images of {key}"
            raise self._refused(rule, num_labels, "save images and labels of the same rows")
        return (*shape, 1)[:4]

    def images(self, part: str) -> np.ndarray:
        """(n, height, width, channels) uint8."""
        shape, wanted = self.shape(part), self.shape("train")[1:]
        if shape[1:] != wanted:
            rule = f"images of x_test are {wanted} as those of x_train"
            raise self._refused(rule, shape[1:], "resize or convert them")
        x = self._read(f"x_{part}")
        self._check_pixels(f"x_{part}", x)
        scale = self._scale(x, part)
        if x.dtype == np.uint8 and scale == 1:
            return x.reshape(shape)
        pixels = np.empty(x.shape, np.uint8)
        for start in range(0, len(x), _BLOCK):
            block = slice(start, start + _BLOCK)
            pixels[block] = np.rint(x[block] * np.float32(scale))
        return pixels.reshape(shape)

    def labels(self, part: str) -> np.ndarray:
        """(n,) of the smallest unsigned type that holds every class."""
        y = self._whole_numbers(f"y_{part}")
        self._check_classes(f"y_{part}", y, len(self.class_names))
        return y.astype(np.min_scalar_type(len(self.class_names) - 1))

    def _read_names(self) -> tuple[str, ...]:
        array = self._read("class_names")
        if array.ndim != 1 or not array.size:
            raise self._refused("class_names is a row", f"shape {array.shape}", _FIXES["class"])
        if array.dtype.kind == "S":
            array = np.char.decode(array, errors="replace")
        names = tuple(array.astype(str).tolist())
        seen = {""}
        for at, name in enumerate(names):
            if not is_utf8(name):  # no page could show it
                received = f"class_names[{at}] is {name!a}"
                raise self._refused("class_names are UTF-8", received, _FIXES["class"])
            if name in seen:
                rule = "class_names differ and none is empty"
                received = f"class_names[{at}] is {name!r}"
                raise self._refused(rule, received, _FIXES["class"])
            seen.add(name)
        return names

    def _whole_numbers(self, key: str) -> np.ndarray:
        y = self._read(key)
        if y.ndim == 2 and y.shape[1] > 1:
            fix = f"np.argmax({key}, axis=1), if they are one-hot"
            raise self._refused(f"{key} is (n,) class numbers", f"shape {y.shape}", fix)
        if y.ndim not in (1, 2) or not y.size:
            raise self._refused(f"{key} is (n,) class numbers", f"shape {y.shape}", "one an image")
        y = y.reshape(-1)
        # NaN is neither; from 1e15 floats have no room for a class more.
        if at := _first(y, lambda some: ~((some >= 0) & (some < 1e15) & (some == np.rint(some)))):
            rule = f"{key} holds whole numbers from 0"
            raise self._refused(rule, _element(key, y, at), "number the classes 0, 1, 2, ...")
        return y

    def _check_classes(
        self, key: str, y: np.ndarray, num_classes: int, *, at_least: int = 1
    ) -> None:
        if num_classes < 2:
            raise self._refused("there are at least 2 classes", num_classes, "add another")
        if at := _first(y, lambda some: some >= num_classes):
            source = "class_names" if self._names else "y_train"
            rule = f"classes are 0-{num_classes - 1}, by {source}"
            fix = "number the classes 0, 1, 2, ... in both parts, and name all or none"
            raise self._refused(rule, _element(key, y, at), fix)
        labels, counts = (values.tolist() for values in np.unique(y, return_counts=True))
        images = dict(zip(labels, counts, strict=True))
        for label in range(num_classes):
            if images.get(label, 0) < at_least:
                name = f" ({self._names[label]!r})" if self._names else ""
                fix = "add images, or leave it out and number the others 0, 1, 2, ..."
                received = f"{images.get(label, 0)} of class {label}{name}"
                raise self._refused(f"{key} has at least {at_least} of every class", received, fix)

    def _check_pixels(self, key: str, x: np.ndarray) -> None:
        at = _first(x, lambda some: ~((some >= 0) & (some <= 255)))  # true for NaN too
        if not at:
            return
        if not np.isfinite(x[at]):
            fix = "leave such images out, or mend them with np.nan_to_num"
            raise self._refused(f"pixels of {key} are finite", _element(key, x, at), fix)
        rule = f"pixels of {key} are 0-255, or floats 0-1"
        fix = "scale x_train and x_test alike: (x - low) / (high - low)"
        raise self._refused(rule, _element(key, x, at), fix)

    def _scale(self, x: np.ndarray, part: str) -> int:
        """255 where 1 is white, else 1. x_train alone decides, so that it is read alone."""
        if part == "train":
            if x.dtype.kind in "iu" and x.max(initial=0) == 1:
                # As PNGs, to predict them, they would be 255 times as bright.
                fix = "multiply them by 255, or save them as bool or floats"
                raise self._refused("x_train of whole numbers is 0-255", "none above 1", fix)
            return 255 if _is_unit(x) else 1
        _, dtype = self._header("x_train")
        train = self._read("x_train") if dtype.kind == "f" else np.empty(0, dtype)
        fix = "scale both alike"
        if not _is_unit(train):
            if _is_unit(x):
                raise self._refused("x_test is 0-255, as x_train", "x_test within 0-1", fix)
            return 1
        if at := _first(x, lambda some: some > 1):
            raise self._refused("x_test is 0-1, as x_train", _element("x_test", x, at), fix)
        return 255

    def _header(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of an array, without its content."""
        with self._member(key) as stream:
            is_short = npy.read_magic(stream) == (1, 0)
            read = npy.read_array_header_1_0 if is_short else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
        kind = key.partition("_")[0]
        if dtype.kind not in ("USiu" if kind == "class" else "biuf"):
            rule = f"{key} is an array of {'names' if kind == 'class' else 'numbers'}"
            raise self._refused(rule, f"type {dtype}", _FIXES[kind])
        return shape, dtype

    def _read(self, key: str) -> np.ndarray:
        self._header(key)
        with self._member(key) as stream:
            return npy.read_array(stream, allow_pickle=False)

    @contextmanager
    def _member(self, key: str) -> Iterator[IO[bytes]]:
        try:
            with self._archive.open(f"{key}.npy") as stream:
                yield stream
        except Exception as error:  # whatever zipfile and numpy raise at damaged content
            received = str(error) or type(error).__name__
            raise self._refused(f"{key} is complete", received, "write the file again") from error

    def _refused(self, rule: str, received: object, fix: str) -> SearchError:
        return _unusable(self._path, rule, received, fix)


def _first(array: np.ndarray, is_wrong: Callable[[np.ndarray], Any]) -> tuple[int, ...] | None:
    """Where the first wrong element is, if there is one."""
    for start in range(0, len(array), _BLOCK):
        wrong = is_wrong(array[start : start + _BLOCK])
        if wrong.any():
            first, *others = (int(at) for at in np.unravel_index(wrong.argmax(), wrong.shape))
            return (start + first, *others)
    return None


def _element(key: str, array: np.ndarray, at: tuple[int, ...]) -> str:
    return f"{key}[{', '.join(str(i) for i in at)}] is {array[at]}"


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_unit(x: np.ndarray) -> bool:
    """Whether 1 is white: bool, or floats of which none is above 1."""
    return x.dtype.kind == "b" or (x.dtype.kind == "f" and not _first(x, lambda some: some > 1))


def _unusable(path: Path, rule: str, received: object, fix: str = _FETCH) -> SearchError:
    return SearchError(f"{path} is no usable data file: {rule}. Received: {received}. Fix: {fix}")
