"""Activations of a frozen prefix on disk: computed once, mapped by all workers of a run.

    store = FeatureStore(folder, max_bytes=8 << 30)
    with store.open(parts, images, data=content_hash, tell=show) as activations:
        rows = features.Rows(activations, positions)  # trains parts.rest (search/features.py)

    KEY-float16/   features.npy, sample.npy, meta.json: whole, and never written again
    KEY.partial/   the same on the way; its meta.json says which chunks are on disk
    KEY.lock       locked by the process that computes them

Kept in float16, or in float32 where that would show (`features.fits_float16`). A killed computation
goes on after its last chunk. Every lock is the kernel's and ends with its process: that of a user
lies on features.npy, so that nothing in use is evicted. Needs a local file system.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from search import artifacts, features
from search.errors import SearchError
from search.features import Cut

logger = logging.getLogger("search")

Tell = Callable[[int, int], None]  # activations there are, and there will be

_SAMPLE = 2_000  # images on which float16 is compared with float32
_SAMPLE_BYTES = 512 << 20  # fewer where their activations are larger
_PIXELS = 1 << 18  # in a batch of the prefix: 256 images of 32x32
_BATCHES = 2  # in a chunk: what a kill costs
_WAIT = 0.2  # seconds between two looks at a lock
_TRASH = ".evicted-"
_verified: set[tuple[int, ...]] = set()  # files whose hashes this process has checked


@dataclass(frozen=True)
class _Work:
    """Activations that are wanted."""

    key: str
    parts: Cut
    images: np.ndarray  # (n, height, width, channels)
    tell: Tell
    max_bytes: int
    shape: tuple[int, ...]  # of one activation

    @property
    def batch_size(self) -> int:
        return max(1, min(256, _PIXELS // math.prod(self.images.shape[1:3])))

    @property
    def sample(self) -> np.ndarray:
        """Positions of the images that are tried, (m,), all over the data."""
        most = max(100, _SAMPLE_BYTES // (4 * math.prod(self.shape)))
        size = min(_SAMPLE, len(self.images), most)
        return np.linspace(0, len(self.images) - 1, size).astype(int)

    def num_bytes(self, dtype: str) -> int:
        return len(self.images) * math.prod(self.shape) * np.dtype(dtype).itemsize


class FeatureStore:
    """Activations in a folder.

    Args:
        folder: on a local disk; all processes that share activations share it.
        max_bytes: that it may hold; those not used for longest make room.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder = folder
        self._max_bytes = max_bytes

    @contextmanager
    def open(
        self, parts: Cut, images: np.ndarray, *, data: str, tell: Tell = lambda done, of: None
    ) -> Iterator[np.ndarray]:
        """The prefix's activations of all images, from disk; computed where they are not there.

        Args:
            images: (n, height, width, channels), those of a whole training set, so that searching
                and retraining share them; parts of it are rows.
            data: names the images' content, such as the data set's hash.
            tell: called as the activations grow, also where another process computes them.

        Yields:
            (n, ...) float16 or float32, mapped. They are not evicted until the block ends.

        Raises:
            SearchError: if they can't be kept: limit, disk or file system.
        """
        shape = parts.prefix.compute_output_shape((1, *images.shape[1:]))[1:]
        key = _key(parts, images, data)
        work = _Work(key, parts, images, tell, self._max_bytes, tuple(shape))
        try:
            activations, held = self._found_or_computed(work)
        except OSError as error:
            raise SearchError(
                f"{self._folder} can't keep the activations of {parts.prefix.name}: "
                f"{error.strerror or error}. {self._needed(work, 'float16')}. "
                "Fix: a writable folder on a local disk with that much free"
            ) from error
        with held:
            yield activations

    def _found_or_computed(self, work: _Work) -> tuple[np.ndarray, BinaryIO]:
        self._folder.mkdir(parents=True, exist_ok=True)
        for _ in range(3):  # more, if the limit is so tight that another process evicts them
            if found := self._find(work):
                return found
            with self._alone(work):
                if found := self._find(work):  # another process has computed them meanwhile
                    return found
                self._compute(work)
                if found := self._find(work):
                    return found
        raise SearchError(
            f"The activations of {work.parts.prefix.name} differ each time they are computed, or "
            f"are evicted at once. {self._needed(work, 'float16')}. Fix: a larger --cache-size"
        )

    def _find(self, work: _Work) -> tuple[np.ndarray, BinaryIO] | None:
        """Activations that suit this rest, and the open file that holds them."""
        for dtype in ("float32", "float16"):
            path = self._folder / f"{work.key}-{dtype}"
            held = _hold(path / "features.npy")
            if held is None:
                continue
            try:
                if _is_intact(path, held, work):
                    sample = np.load(path / "sample.npy", mmap_mode="r")
                    if dtype == "float32" or features.fits_float16(work.parts.rest, sample):
                        os.utime(path / "meta.json")  # used last
                        # Private, since TensorFlow shares no read-only memory.
                        array = np.load(path / "features.npy", mmap_mode="c")
                        return array.view(np.ndarray), held
                else:
                    logger.warning("%s is damaged or outdated; it is computed again", path)
            except BaseException:
                held.close()
                raise
            held.close()
        return None

    @contextmanager
    def _alone(self, work: _Work) -> Iterator[None]:
        """Only one process computes a key. The others say how far it is."""
        with (self._folder / f"{work.key}.lock").open("ab") as lock:
            while not _try_lock(lock, fcntl.LOCK_EX):
                work.tell(_num_done(self._partial(work.key)), len(work.images))
                time.sleep(_WAIT)
            yield

    def _compute(self, work: _Work) -> None:
        partial = self._partial(work.key)
        partial.mkdir(exist_ok=True)
        self._reserve(work, "float16")
        sample = _computed_sample(work, partial / "sample.npy")
        dtype = "float16" if features.fits_float16(work.parts.rest, sample) else "float32"
        if dtype == "float32" or not self._write(work, partial, "float16"):
            dtype = "float32"
            self._reserve(work, dtype)
            self._write(work, partial, dtype)
        final = self._folder / f"{work.key}-{dtype}"
        if final.exists():
            self._discard(final)
        _verified.add(_identity(partial / "features.npy"))
        os.rename(partial, final)

    def _write(self, work: _Work, partial: Path, dtype: str) -> bool:
        """Chunk after chunk from where it ended; False at a number that float16 does not hold."""
        num_images, num_rows = len(work.images), work.batch_size * _BATCHES
        header = _header((num_images, *work.shape), dtype)
        meta = {"dtype": dtype, "rows": num_rows, "images": num_images}
        chunks: list[str] = _intact_chunks(partial, meta)
        with (partial / "features.npy").open("r+b") as stream:
            stream.truncate(len(header) + work.num_bytes(dtype))
            stream.write(header)
            for start in range(len(chunks) * num_rows, num_images, num_rows):
                stop = min(start + num_rows, num_images)
                block = _computed(work, np.arange(start, stop), dtype)
                if block is None:
                    return False
                stream.seek(len(header) + work.num_bytes(dtype) // num_images * start)
                stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
                chunks.append(hashlib.sha256(block).hexdigest())
                artifacts.write_json(partial / "meta.json", meta | {"chunks": chunks})
                work.tell(stop, num_images)
        return True

    def _reserve(self, work: _Work, dtype: str) -> None:
        """Makes room, and takes it by a sparse file of that size, which other processes count."""
        partial = self._partial(work.key)
        needed = work.num_bytes(dtype) + 4 * len(work.sample) * math.prod(work.shape)
        with (self._folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self._folder.glob(f"{_TRASH}*"):
                shutil.rmtree(left, ignore_errors=True)
            others = [p for p in self._folder.iterdir() if p.is_dir() and p != partial]
            held = {path: _size(path) for path in others}
            for path in sorted(others, key=_last_used):
                free = shutil.disk_usage(self._folder).free + _allocated(partial)
                if sum(held.values()) + needed <= self._max_bytes and needed <= free:
                    break
                if self._evict(path):
                    del held[path]
            free = shutil.disk_usage(self._folder).free + _allocated(partial)
            in_use = sum(held.values())
            if in_use + needed > self._max_bytes:
                raise SearchError(
                    f"{self._needed(work, dtype)}, --cache-size allows {_text(self._max_bytes)}, "
                    f"of which {_text(in_use)} are in use. Fix: --cache-size "
                    f"{math.ceil((in_use + needed) / 1e9)}G"
                )
            if needed > free:
                raise SearchError(
                    f"{self._needed(work, dtype)}, {self._folder} has {_text(free)} free. "
                    "Fix: free that much, or take another folder"
                )
            with (partial / "features.npy").open("ab") as stream:
                stream.truncate(max(work.num_bytes(dtype), stream.tell()))

    def _evict(self, path: Path) -> bool:
        """Removes what no process uses or computes."""
        partial = path.suffix == ".partial"
        lock = path.with_suffix(".lock") if partial else path / "features.npy"
        with suppress(FileNotFoundError), lock.open("rb") as stream:
            if not _try_lock(stream, fcntl.LOCK_EX):
                return False
            logger.info("evicting %s, %s", path.name, _text(_size(path)))
            self._discard(path)
            return True
        self._discard(path)
        return True

    def _discard(self, path: Path) -> None:
        """Under another name first, so that a kill leaves nothing that looks whole."""
        trash = self._folder / f"{_TRASH}{secrets.token_hex(4)}"
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _partial(self, key: str) -> Path:
        return self._folder / f"{key}.partial"

    def _needed(self, work: _Work, dtype: str) -> str:
        num_bytes = work.num_bytes(dtype) + 4 * len(work.sample) * math.prod(work.shape)
        return (
            f"The activations of {len(work.images)} images, {work.shape} {dtype} each, need "
            f"{_text(num_bytes)}"
        )
