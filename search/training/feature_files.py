"""The files of one prefix's activations: computed in chunks, and opened when they are intact.

A folder holds features.npy, sample.npy (some activations in float32, to compare with) and
meta.json, which says which chunks are on disk, with their hashes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from search import artifacts
from search.errors import SearchError
from search.training import backend, features
from search.training.features import Cut

if TYPE_CHECKING:
    import keras

Tell = Callable[[int, int], None]  # activations there are, and there will be

_SAMPLE = 2_000  # images on which float16 is compared with float32
_SAMPLE_BYTES = 512 << 20  # fewer, where their activations are larger
_TRIED = 8  # of them, for which the prefix is asked again when its activations are opened
_BATCH_BYTES = 128 << 20  # of the largest tensor in a batch of the prefix
_BATCHES = 2  # in a chunk, which is what a kill costs
verified: set[tuple[int, ...]] = set()  # files whose hashes this process has checked


@dataclass(frozen=True)
class Work:
    """Activations that are wanted."""

    folder: Path
    key: str
    parts: Cut
    images: np.ndarray  # (n, height, width, channels)
    shape: tuple[int, ...]  # of one activation
    tell: Tell

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.key}.partial"

    @property
    def coarse(self) -> Path:
        """A file that is there where a trained rest was in need of float32."""
        return self.folder / f"{self.key}.coarse"

    @cached_property
    def batch_size(self) -> int:
        return max(1, min(256, _BATCH_BYTES // (4 * features.largest(self.parts.prefix))))

    @property
    def sample(self) -> np.ndarray:
        """Positions of the images that are tried, (m,), all over the data."""
        most = max(100, _SAMPLE_BYTES // (4 * math.prod(self.shape)))
        size = min(_SAMPLE, len(self.images), most)
        return np.linspace(0, len(self.images) - 1, size).astype(int)

    def num_bytes(self, dtype: str) -> int:
        return len(self.images) * math.prod(self.shape) * np.dtype(dtype).itemsize

    def needed(self, dtype: str) -> int:
        """Bytes on disk, with the sample."""
        return self.num_bytes(dtype) + 4 * len(self.sample) * math.prod(self.shape)

    def __str__(self) -> str:
        return f"The activations of {len(self.images)} images, {self.shape} each,"


def key_of(parts: Cut, images: np.ndarray, data: str) -> str:
    """Names what is computed: prefix, its weights, images, versions; 32 hexadecimal digits."""
    import keras

    backend = keras.backend.backend()
    versions = [keras.__version__, backend, sys.modules[backend].__version__]
    about = [features.describe(parts.prefix), data, images.shape, str(images.dtype), versions]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for weights in parts.prefix.get_weights():
        # As bytes: of bfloat16 NumPy gives out no buffer.
        digest.update(np.ascontiguousarray(weights).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def _computed(work: Work, positions: np.ndarray, dtype: str) -> np.ndarray | None:
    """Activations of these images, or None where one is too large for the dtype."""
    batches = []
    for start in range(0, len(positions), work.batch_size):
        images = work.images[positions[start : start + work.batch_size]]
        batch = work.parts.prefix.predict_on_batch(images).astype(np.float32)
        stored = features.as_float16(batch) if dtype == "float16" else batch
        if stored is None:
            return None
        batches.append(stored)
    return np.concatenate(batches)


def make_sample(work: Work) -> None:
    """Activations of the sample in float32, unless an earlier attempt has left them."""
    path = work.partial / "sample.npy"
    with suppress(OSError, ValueError, EOFError):
        if _is_current(path, work):
            return
    (work.partial / "meta.json").unlink(missing_ok=True)  # its chunks would not be current either
    sample = _computed(work, work.sample, "float32")
    with artifacts.write_atomically(path) as beside:
        np.save(beside, sample)  # type: ignore[arg-type]


def write(work: Work, dtype: str) -> bool:
    """Chunk after chunk, from where it was killed; False at a number too large for the dtype."""
    num_images, rows = len(work.images), work.batch_size * _BATCHES
    meta = {"dtype": dtype, "rows": rows}
    earlier = meta_of(work.partial)
    is_same = {name: earlier.get(name) for name in meta} == meta
    chunks = _intact_chunks(work.partial, earlier) if is_same else []
    header = io.BytesIO()
    descr = npy.dtype_to_descr(np.dtype(dtype))
    about = {"descr": descr, "fortran_order": False, "shape": (num_images, *work.shape)}
    npy.write_array_header_1_0(header, about)
    with (work.partial / "features.npy").open("r+b") as stream:
        stream.write(header.getvalue())
        stream.truncate(stream.tell() + work.num_bytes(dtype))
        stream.seek(len(chunks) * rows * work.num_bytes(dtype) // num_images, os.SEEK_CUR)
        for start in range(len(chunks) * rows, num_images, rows):
            stop = min(start + rows, num_images)
            block = _computed(work, np.arange(start, stop), dtype)
            if block is None:
                return False
            stream.write(block.data)
            stream.flush()
            os.fsync(stream.fileno())
            chunks = [*chunks, hashlib.sha256(block.data).hexdigest()]
            artifacts.write_json(work.partial / "meta.json", {**meta, "chunks": chunks})
            work.tell(stop, num_images)
    return True


def opened(path: Path, work: Work, dtype: str) -> np.ndarray | None:
    """The mapped file, if it is as it was written, and what this prefix gives."""
    try:
        identity, meta = identity_of(path / "features.npy"), meta_of(path)
        # Private, since read-only memory can't be shared with TensorFlow.
        array = np.load(path / "features.npy", mmap_mode="c").view(np.ndarray)
        if array.dtype != dtype or array.shape != (len(work.images), *work.shape):
            return None
        if identity not in verified:
            num_chunks = math.ceil(len(array) / meta["rows"])
            if len(_intact_chunks(path, meta)) != num_chunks:
                return None
            if artifacts.sha256(path / "sample.npy") != meta["sample"]:
                return None
            verified.add(identity)
        return array if _is_current(path / "sample.npy", work) else None
    except (OSError, ValueError, EOFError, KeyError, TypeError, SearchError):
        return None


def _is_current(path: Path, work: Work) -> bool:
    """Whether the prefix gives what the sample says: a user's code is not part of the key."""
    sample = np.load(path, mmap_mode="r")
    if sample.shape != (len(work.sample), *work.shape):
        return False
    few = np.linspace(0, len(sample) - 1, min(_TRIED, len(sample))).astype(int)
    now = _computed(work, work.sample[few], "float32")
    assert now is not None
    # Batches of another size, or other threads, round in another way.
    tolerance = 1e-3 if is_float32(work) else 5e-2
    return np.allclose(now, sample[few], rtol=0, atol=tolerance * np.abs(now).max())


def fits_float16(path: Path, work: Work) -> bool:
    return features.fits_float16(work.parts.rest, np.load(path / "sample.npy", mmap_mode="r"))


def difference(
    path: Path, work: Work, activations: np.ndarray, whole: keras.Model | None
) -> features.Difference:
    """Of the rest's answers to stored activations, from those to exact ones: the whole model's to
    the sample's images, or without it, the rest's to the sample."""
    # bfloat16 and a GPU's TF32 round differently in another graph.
    if whole is None or not is_float32(work) or backend.visible_gpus():
        exact = features.predicted(work.parts.rest, np.load(path / "sample.npy", mmap_mode="r"))
    else:
        exact = features.predicted(whole, work.images, work.sample)
    kept = features.predicted(work.parts.rest, activations, work.sample)
    return features.difference(exact, kept)


def is_float32(work: Work) -> bool:
    """Whether the prefix computes in float32."""
    return str(work.parts.prefix.outputs[0].dtype) == "float32"


def _intact_chunks(path: Path, meta: dict[str, Any]) -> list[str]:
    """Hashes of the chunks, from the first on, that are on disk as they were written."""
    try:
        array = np.load(path / "features.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return []
    chunks, rows = meta.get("chunks", []), meta["rows"]
    blocks = [array[at * rows : (at + 1) * rows] for at in range(len(chunks))]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        hashes = list(pool.map(lambda block: hashlib.sha256(block).hexdigest(), blocks))
    wrong = [at for at, found in enumerate(hashes) if found != chunks[at]]
    return chunks[: wrong[0]] if wrong else chunks


def meta_of(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError, EOFError):
        return {}
    return meta if isinstance(meta, dict) else {}


def identity_of(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
