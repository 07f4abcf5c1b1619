"""A folder of images as a data set: decoded once by the coordinator, mapped by the workers.

    flowers/train/<class>/*.png .jpg .jpeg   and, where there is one, flowers/test/<class>/*
    flowers/<class>/*                        the same without a test part

Classes are the class folders in the order of their names, images in that of theirs; hidden files,
other files and folders beside train/ and test/ are not read. Without test/ every 7th image of a
class (positions 6, 13, ...) is the test part. An image in colour makes all have 3 channels.
Transparency is laid on black, 16 bits become 8, EXIF says which side is up. Images of different
sizes are resized (bilinear, antialiased) to the median size of the training part.

The decoded copy lies in `<KERAS_HOME>/datasets/fmnist-search/`. Only `prepare` writes it, under
a temporary name first. It belongs to the files as they were: names, sizes and times of change.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import ExifTags, Image, UnidentifiedImageError

from search.data import fetching
from search.data.formats import NPZ_KEYS, Arrays, Shape, is_utf8
from search.errors import SearchError

logger = logging.getLogger("search")

SUFFIXES = (".png", ".jpg", ".jpeg")
TEST_EVERY = 7  # about the share of Fashion-MNIST: 10 000 of 70 000
LARGEST = 128  # pixels a side after resizing; a guess at what a search can afford
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # Pillow's modes of 16-bit grey
_GREY = ("1", "L", "LA", "La", *_DEEP)
_ORIENTATION = ExifTags.Base.Orientation
# What EXIF's numbers ask for, 1 aside.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_VERSION = 1  # of what is made of an image: another one prepares all copies again
_BATCH = 256  # images in memory at a time, decoded in parallel
_LAYOUT = "DIR/train/CLASS/*.png (.jpg, .jpeg) and maybe DIR/test/CLASS/*, or DIR/CLASS/*"

_Images = dict[str, list[Path]]  # of each class


class _Files(NamedTuple):
    """What the folder holds; a class is the position of its name."""

    class_names: tuple[str, ...]
    parts: dict[str, list[tuple[Path, int]]]  # "train" and "test": images and their classes
    fingerprint: str  # of names, sizes and times of change


def describe(folder: Path) -> tuple[Shape, tuple[str, ...]]:
    """Image shape and class names, from the prepared copy or from the images' headers.

    Raises:
        SearchError: if the folder is no data set; the message names the folder or the image.
    """
    files = _list(folder)
    meta = _meta(_copy_of(folder), files.fingerprint)
    shape = tuple(meta["input_shape"]) if meta else _common_shape(folder, files)[0]
    return shape, files.class_names


def prepare(folder: Path) -> str:
    """Decodes all images into the copy that `load` maps, unless it is there and intact.

    Returns:
        SHA-256 of pixels, labels and class names, 64 hexadecimal digits; not of paths or times.

    Raises:
        SearchError: if the folder is no data set, an image is damaged or the copy can't be written.
    """
    files, copy = _list(folder), _copy_of(folder)
    meta = _intact(copy, files.fingerprint)
    if meta is None:
        shape, note = _common_shape(folder, files)
        num_images = sum(len(images) for images in files.parts.values())
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with fetching.alone_in(copy.parent) as scratch:
                meta = _intact(copy, files.fingerprint)  # another process may have made it
                if meta is None:
                    logger.info("decoding the %d images of %s", num_images, folder.name)
                    meta = _write(scratch / "new", folder.stat().st_mode, files, shape, note)
                    if copy.exists():
                        os.rename(copy, scratch / "old")
                    os.rename(scratch / "new", copy)
        except OSError as error:
            raise SearchError(
                f"The images of {folder} could not be prepared in {copy.parent}: "
                f"{error.strerror or error}. Fix: make it writable with "
                f"{num_images * math.prod(shape) / 1e6:.1f} MB free, or set KERAS_HOME to another"
            ) from error
    if meta["note"]:
        logger.info("%s", meta["note"])
    for line in _left_out(folder):
        logger.warning("%s", line)
    return meta["sha256"]


def load(folder: Path, part: str) -> Arrays:
    """The "train" or "test" part of the prepared copy; opens no file of the other.

    Returns:
        x (n, height, width, channels) uint8, mapped; what is written there stays in this process,
        and y (n,).

    Raises:
        SearchError: if the images are not those that were prepared, or the copy is damaged.
    """
    copy = _copy_of(folder)
    if _meta(copy, _list(folder).fingerprint) is None:
        raise SearchError(
            f"The images of {folder} are not those that this run prepared: files changed, or "
            f"{copy} is gone. Fix: leave both alone while a run goes, and begin it again"
        )
    try:
        # Not "r": TensorFlow shares memory that may be written, and copies what may not.
        x = np.load(copy / f"x_{part}.npy", mmap_mode="c")
        return x.view(np.ndarray), np.load(copy / f"y_{part}.npy")
    except (OSError, ValueError, EOFError) as error:
        raise SearchError(
            f"{copy} is damaged: {error}. Fix: delete it; the next run makes it again"
        ) from error


def packed(folder: Path) -> bytes:
    """The prepared copy as the content of a .npz file, for machines that don't have the folder."""
    copy = _copy_of(folder)
    arrays = {key: np.load(copy / f"{key}.npy", mmap_mode="r") for key in NPZ_KEYS}
    stream = io.BytesIO()
    np.savez(stream, **arrays, class_names=np.array(_list(folder).class_names))
    return stream.getvalue()


def read_image(path: Path, input_shape: Sequence[int], invert: bool = False) -> np.ndarray:
    """An image file as a model of that input shape takes it, decoded as those of a data set.

    Args:
        input_shape: height, width and channels (1 or 3), to which it is resized and converted.
        invert: make black white, for dark ink where the model knows bright.

    Returns:
        (height, width, channels) uint8.

    Raises:
        SearchError: if it can't be read.
    """
    height, width, channels = input_shape
    with _quietly():
        pixels = _decode(path, (height, width, channels), ground=255 if invert else 0)
    return 255 - pixels if invert else pixels


def _list(folder: Path) -> _Files:
    if not is_utf8(str(folder)):  # as of classes, below
        raise _refused(ascii(str(folder)), "its path is UTF-8", ascii(folder.name), "rename it")
    try:
        has_train = _has_train(folder)
        train = _images_by_class(folder / "train" if has_train else folder)
        if has_train and (folder / "test").is_dir():
            test = _images_by_class(folder / "test")
            _check_parts(folder, train, test)
        else:
            train, test = _set_apart(folder, train)
        paths = [path for part in (train, test) for of_class in part.values() for path in of_class]
        state = [_state(path, folder) for path in paths]
    except OSError as error:
        fix = "check the path and its permissions"
        raise _refused(error.filename or folder, "it can be read", error.strerror, fix) from error
    fingerprint = hashlib.sha256(json.dumps([_VERSION, sorted(state)]).encode()).hexdigest()
    parts = {
        name: [(path, label) for label, paths in enumerate(part.values()) for path in paths]
        for name, part in (("train", train), ("test", test))
    }
    return _Files(tuple(train), parts, fingerprint)


def _has_train(folder: Path) -> bool:
    """Whether classes lie below train/. Images may lie in train/ and test/ themselves, which is
    refused, but with others beside them these are classes."""
    names = {path.name for path in _folders(folder)}
    return bool(_folders(folder / "train")) or {"train"} <= names <= {"train", "test"}


def _left_out(folder: Path) -> Iterator[str]:
    """What somebody may think is read, a line each."""
    tops = [folder]
    if _has_train(folder):
        tops = [folder / "train", folder / "test"]
        for other in _folders(folder):
            if other not in tops:
                yield f"{other} is not read: a folder's parts are train/ and test/"
    others = Counter(
        "folders" if path.is_dir() else path.suffix or "no suffix"
        for top in tops
        for of_class in _folders(top)
        for path in of_class.iterdir()
        if path.name[0] != "." and (path.is_dir() or not path.name.lower().endswith(SUFFIXES))
    )
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        yield f"in {folder} {kinds} beside images are not read: images are {', '.join(SUFFIXES)}"


def _state(path: Path, folder: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.relative_to(folder)), status.st_size, status.st_mtime_ns


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir())


def _images_by_class(top: Path) -> _Images:
    folders = _folders(top)
    if len(folders) < 2:
        received = ", ".join(folder.name for folder in folders) or "none"
        fix = f"lay images out as {_LAYOUT}"
        raise _refused(top, "it holds 2 or more folders, one for each class", received, fix)
    images: _Images = {}
    for folder in folders:
        if not is_utf8(folder.name):  # no page could show it
            raise _refused(top, "class names are UTF-8", ascii(folder.name), "rename the folder")
        names = [name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES)]
        images[folder.name] = [folder / name for name in sorted(names) if name[0] != "."]
        if not images[folder.name]:
            received = f"{len(os.listdir(folder))} other files"
            fix = "put images there, or take the folder away"
            raise _refused(folder, f"it holds images ({', '.join(SUFFIXES)})", received, fix)
    return images


def _check_parts(folder: Path, train: _Images, test: _Images) -> None:
    for name in sorted(train.keys() ^ test.keys()):
        received = f"{name!r} only in {'train' if name in train else 'test'}"
        fix = "give both the same class folders"
        raise _refused(folder, "train/ and test/ have the same class folders", received, fix)
    for name, paths in train.items():
        if len(paths) < 2:
            rule = "a class has 2 images or more to train on"
            raise _refused(folder / "train" / name, rule, len(paths), "add images")


def _set_apart(folder: Path, images: _Images) -> tuple[_Images, _Images]:
    """The training and the test part where there is no test/."""
    for name, paths in images.items():
        if len(paths) < TEST_EVERY:
            rule = f"without test/ a class has {TEST_EVERY} images, of which one is to test"
            raise _refused(folder, rule, f"{len(paths)} of {name!r}", "add images or test/")
    test = {name: paths[TEST_EVERY - 1 :: TEST_EVERY] for name, paths in images.items()}
    train = {
        name: [path for at, path in enumerate(paths) if at % TEST_EVERY != TEST_EVERY - 1]
        for name, paths in images.items()
    }
    return train, test


def _common_shape(folder: Path, files: _Files) -> tuple[Shape, str]:
    """The shape that all images get, and a note where that changes their sizes."""
    with _quietly():
        looks = {
            part: list(_in_parallel(_look, [path for path, _ in images]))
            for part, images in files.parts.items()
        }
    every = looks["train"] + looks["test"]
    channels = 3 if any(is_colour for _, _, is_colour in every) else 1
    heights, widths, _ = zip(*every, strict=True)
    if len(set(zip(heights, widths, strict=True))) == 1:
        return (heights[0], widths[0], channels), ""
    height, width = (
        min(LARGEST, statistics.median_low(look[axis] for look in looks["train"]))
        for axis in (0, 1)
    )
    note = (
        f"images of {folder.name} are {min(heights)}-{max(heights)} pixels high and "
        f"{min(widths)}-{max(widths)} wide; all are resized to {height}x{width}"
    )
    return (height, width, channels), note


def _look(path: Path) -> tuple[int, int, bool]:
    """Height, width and whether it is in colour, by the file's header."""
    with _opened(path) as image:
        width, height = image.size
        if _orientation(image) in (5, 6, 7, 8):
            height, width = width, height  # a quarter turn
        return height, width, image.mode not in _GREY


def _decode(path: Path, shape: Shape, ground: int = 0) -> np.ndarray:
    """Args: ground: what lies behind transparent pixels, from 0 (black) to 255."""
    height, width, channels = shape
    with _opened(path) as image:
        turn = _TURNS.get(_orientation(image))
        pixels: Image.Image = image if turn is None else image.transpose(turn)
        if pixels.mode in _DEEP:
            pixels = Image.fromarray(_to_8_bits(np.asarray(pixels)))
        if pixels.has_transparency_data:
            pixels = pixels.convert("RGBA")
            behind = Image.new("RGBA", pixels.size, (ground, ground, ground, 255))
            pixels = Image.alpha_composite(behind, pixels)
        pixels = pixels.convert("L" if channels == 1 else "RGB")
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(pixels).reshape(shape)


def _orientation(image: Image.Image) -> int:
    """How it is to be turned, as EXIF has it; 1 where that says nothing that could be read."""
    # A PNG's may stand behind its pixels, where a look at the header does not come.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever Pillow raises at odd metadata
        return 1


def _to_8_bits(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels.clip(0, 65_535) / 257).astype(np.uint8)  # 65 535 = 257 * 255


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            yield image
    except Exception as error:  # whatever Pillow raises at damaged content
        why = "other content" if isinstance(error, UnidentifiedImageError) else error
        fix = "replace it or take it away"
        raise _refused(path, "it is a complete PNG or JPEG image", why, fix) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Pillow warns of odd metadata and of large images; both are decoded all the same."""
    with warnings.catch_warnings(action="ignore"):
        yield


def _in_parallel(function: Callable, paths: list[Path]) -> Iterator[Any]:
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), _BATCH):
            yield from pool.map(function, paths[start : start + _BATCH])


def _write(copy: Path, mode: int, files: _Files, shape: Shape, note: str) -> dict[str, Any]:
    """Args: mode: of the images' folder, whose readers may read the copy, and no others."""
    copy.mkdir(0o700 | mode & 0o055)
    for part, images in files.parts.items():
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *shape)}
        # Written, not mapped: a full disk is then an error and no SIGBUS.
        with open(copy / f"x_{part}.npy", "wb") as stream, _quietly():
            npy.write_array_header_1_0(stream, header)
            for pixels in _in_parallel(lambda path: _decode(path, shape), [p for p, _ in images]):
                stream.write(pixels.tobytes())
        y = np.array([label for _, label in images])
        np.save(copy / f"y_{part}.npy", y.astype(np.min_scalar_type(len(files.class_names) - 1)))
    meta = {
        "fingerprint": files.fingerprint,
        "sha256": _content_hash(copy, files.class_names),
        "class_names": files.class_names,
        "input_shape": shape,
        "note": note,
    }
    (copy / "meta.json").write_text(json.dumps(meta))
    return meta


def _copy_of(folder: Path) -> Path:
    absolute = os.path.abspath(folder)
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:12]
    return fetching.keras_datasets() / "fmnist-search" / f"{folder.name[:50]}-{digest}"


def _meta(copy: Path, fingerprint: str) -> dict[str, Any] | None:
    """What is known of a copy, if it was made of these files."""
    try:
        meta = json.loads((copy / "meta.json").read_text())
        return meta if meta["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _intact(copy: Path, fingerprint: str) -> dict[str, Any] | None:
    meta = _meta(copy, fingerprint)
    try:
        if meta and _content_hash(copy, meta["class_names"]) == meta["sha256"]:
            return meta
    except Exception:  # whatever numpy raises at a damaged copy
        logger.debug("%s is damaged", copy, exc_info=True)
    return None


def _content_hash(copy: Path, class_names: Sequence[str]) -> str:
    arrays = [np.load(copy / f"{key}.npy", mmap_mode="r") for key in NPZ_KEYS]
    about = [list(class_names), [array.shape for array in arrays]]
    digest = hashlib.sha256(json.dumps(about).encode())
    for array in arrays:
        digest.update(array)
    return digest.hexdigest()


def _refused(path: Path | str, rule: str, received: object, fix: str) -> SearchError:
    return SearchError(f"{path} is no usable data: {rule}. Received: {received}. Fix: {fix}")
