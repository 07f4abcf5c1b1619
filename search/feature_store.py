"""Activations of a frozen prefix on disk: computed once, mapped by all workers of a run.

    store = FeatureStore(folder, max_bytes=8_000_000_000)
    with store.open(parts, images, data=content_hash, tell=show) as activations:
        rows = backend.Rows(activations, positions)  # what parts.rest is trained on

    KEY-float16/   features.npy, sample.npy, meta.json: whole, and never written again
    KEY.partial/   the same on the way; its meta.json says which chunks are on disk
    KEY.lock       locked by the process that computes them

Kept in float16, or in float32 where that would show (`features.fits_float16`). A killed computation
goes on after its last chunk. Every lock is the kernel's and ends with its process; that of a user
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
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
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
_SAMPLE_BYTES = 512 << 20  # fewer, where their activations are larger
_TRIED = 8  # of them, for which the prefix is asked again when its activations are opened
_BATCH_BYTES = 128 << 20  # of the largest tensor in a batch of the prefix
_BATCHES = 2  # in a chunk, which is what a kill costs
_WAIT = 0.2  # seconds between two looks at a lock
_TRASH = ".evicted-"
_verified: set[tuple[int, ...]] = set()  # files whose hashes this process has checked


@dataclass(frozen=True)
class _Work:
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
        shape = tuple(parts.prefix.compute_output_shape((1, *images.shape[1:]))[1:])
        work = _Work(self._folder, _key(parts, images, data), parts, images, shape, tell)
        try:
            activations, held = self._found_or_computed(work)
        except OSError as error:
            raise SearchError(
                f"{work} can't be kept in {self._folder}: {error.strerror or error}. They need "
                f"{_text(work.needed('float16'))} or twice that. Fix: a writable folder on a "
                "local disk with that much free"
            ) from error
        with held:
            yield activations

    def _found_or_computed(self, work: _Work) -> tuple[np.ndarray, BinaryIO]:
        self._folder.mkdir(parents=True, exist_ok=True)
        for _ in range(3):  # another process may evict them before they are held
            if found := self._find(work):
                return found
            with self._alone(work):
                if found := self._find(work):  # another process has computed them meanwhile
                    return found
                self._compute(work)
        if found := self._find(work):
            return found
        raise SearchError(
            f"{work} differ each time they are computed, or are evicted at once. Fix: a larger "
            f"--cache-size than {_text(self._max_bytes)}"
        )

    def _find(self, work: _Work) -> tuple[np.ndarray, BinaryIO] | None:
        """Activations that suit this rest, and the open file that holds them."""
        for dtype in ("float32", "float16"):
            path = self._folder / f"{work.key}-{dtype}"
            held = _hold(path / "features.npy")
            if held is None:
                continue
            try:
                array = _opened(path, work, dtype)
                if array is None:
                    logger.warning("%s is damaged or outdated and is computed again", path)
                elif dtype == "float32" or _fits_float16(path, work):
                    os.utime(path / "meta.json")  # the last use
                    return array, held
            except BaseException:
                held.close()
                raise
            held.close()
        return None

    @contextmanager
    def _alone(self, work: _Work) -> Iterator[None]:
        """One process computes a key. The others tell how far it is."""
        with (self._folder / f"{work.key}.lock").open("ab") as lock:
            told = -1
            while not _try_lock(lock, fcntl.LOCK_EX):
                meta = _meta(work.partial)
                done = min(len(meta.get("chunks", ())) * meta.get("rows", 0), len(work.images))
                if done != told:
                    work.tell(done, len(work.images))
                told = done
                time.sleep(_WAIT)
            yield

    def _compute(self, work: _Work) -> None:
        work.partial.mkdir(exist_ok=True)
        self._reserve(work, "float16")
        work.tell(0, len(work.images))
        _make_sample(work)
        dtype = "float16"
        if not (_fits_float16(work.partial, work) and _write(work, dtype)):
            dtype = "float32"
            self._reserve(work, dtype)
            _write(work, dtype)
        meta = {**_meta(work.partial), "sample": artifacts.sha256(work.partial / "sample.npy")}
        artifacts.write_json(work.partial / "meta.json", meta)
        final = self._folder / f"{work.key}-{dtype}"
        with self._locked():
            if final.exists():
                self._discard(final)  # it was damaged; who has mapped it keeps it
            os.rename(work.partial, final)
        _verified.add(_identity(final / "features.npy"))

    def _reserve(self, work: _Work, dtype: str) -> None:
        """Makes room, and takes it by a sparse file of that size, which other processes count.

        Raises:
            SearchError: if there is not as much.
        """
        needed = work.needed(dtype)
        with self._locked():
            for left in self._folder.glob(f"{_TRASH}*"):
                shutil.rmtree(left, ignore_errors=True)
            sizes = {}
            if needed <= self._max_bytes:  # else all would be evicted in vain
                sizes = {path: _size(path) for path in self._others(work)}
            for path in sorted(sizes, key=_last_used):
                if self._lack(work, dtype, sum(sizes.values())) and self._evict(path):
                    del sizes[path]
            if lack := self._lack(work, dtype, sum(sizes.values())):
                raise SearchError(f"{work} need {_text(needed)} in {dtype}. {lack}")
            with (work.partial / "features.npy").open("ab") as stream:
                stream.truncate(max(work.num_bytes(dtype), stream.tell()))

    def _lack(self, work: _Work, dtype: str, used: int) -> str:
        """What there is too little of beside so many bytes in use, and the fix; or nothing."""
        needed = work.needed(dtype)
        free = shutil.disk_usage(self._folder).free + _size(work.partial, allocated=True)
        if used + needed > self._max_bytes:
            return (
                f"--cache-size allows {_text(self._max_bytes)}, of which {_text(used)} are in use. "
                f"Fix: --cache-size {math.ceil((used + needed) / 1e9)}G"
            )
        if needed > free:
            return (
                f"{self._folder} has {_text(free)} free. Fix: free that much, or take a folder on "
                "another disk"
            )
        return ""

    def _others(self, work: _Work) -> list[Path]:
        found = [*self._folder.glob("*.partial"), *self._folder.glob("*-float*")]
        return [path for path in found if path != work.partial]

    def _evict(self, path: Path) -> bool:
        """Removes what no process uses or computes."""
        is_partial = path.suffix == ".partial"
        lock = path.with_suffix(".lock") if is_partial else path / "features.npy"
        with lock.open("rb") if lock.exists() else nullcontext() as stream:
            if stream and not _try_lock(stream, fcntl.LOCK_EX):
                return False
            logger.info("evicting %s (%s)", path.name, _text(_size(path)))
            self._discard(path)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time renames or removes folders here."""
        with (self._folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _discard(self, path: Path) -> None:
        """Under another name first, so that a kill leaves nothing that looks whole."""
        trash = self._folder / f"{_TRASH}{secrets.token_hex(4)}"
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _key(parts: Cut, images: np.ndarray, data: str) -> str:
    """Names what is computed: prefix, its weights, images, versions; 32 hexadecimal digits."""
    import keras

    backend = keras.backend.backend()
    versions = [keras.__version__, backend, sys.modules[backend].__version__]
    about = [features.describe(parts.prefix), data, images.shape, str(images.dtype), versions]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for weights in parts.prefix.get_weights():
        digest.update(np.ascontiguousarray(weights).data)
    return digest.hexdigest()[:32]


def _computed(work: _Work, positions: np.ndarray, dtype: str) -> np.ndarray | None:
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


def _make_sample(work: _Work) -> None:
    """Activations of the sample in float32, unless an earlier attempt has left them."""
    path = work.partial / "sample.npy"
    with suppress(OSError, ValueError):
        if _is_current(path, work):
            return
    (work.partial / "meta.json").unlink(missing_ok=True)  # its chunks would not be current either
    sample = _computed(work, work.sample, "float32")
    with artifacts.write_atomically(path) as beside:
        np.save(beside, sample)  # type: ignore[arg-type]


def _write(work: _Work, dtype: str) -> bool:
    """Chunk after chunk, from where it was killed; False at a number too large for the dtype."""
    num_images, rows = len(work.images), work.batch_size * _BATCHES
    meta = {"dtype": dtype, "rows": rows}
    earlier = _meta(work.partial)
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


def _opened(path: Path, work: _Work, dtype: str) -> np.ndarray | None:
    """The mapped file, if it is as it was written, and what this prefix gives."""
    try:
        identity, meta = _identity(path / "features.npy"), _meta(path)
        # Private, since read-only memory can't be shared with TensorFlow.
        array = np.load(path / "features.npy", mmap_mode="c").view(np.ndarray)
        if array.dtype != dtype or array.shape != (len(work.images), *work.shape):
            return None
        if identity not in _verified:
            num_chunks = math.ceil(len(array) / meta["rows"])
            if len(_intact_chunks(path, meta)) != num_chunks:
                return None
            if artifacts.sha256(path / "sample.npy") != meta["sample"]:
                return None
            _verified.add(identity)
        return array if _is_current(path / "sample.npy", work) else None
    except (OSError, ValueError, KeyError, TypeError, SearchError):
        return None


def _is_current(path: Path, work: _Work) -> bool:
    """Whether the prefix gives what the sample says: a user's code is not part of the key."""
    sample = np.load(path, mmap_mode="r")
    if sample.shape != (len(work.sample), *work.shape):
        return False
    few = np.linspace(0, len(sample) - 1, min(_TRIED, len(sample))).astype(int)
    now = _computed(work, work.sample[few], "float32")
    assert now is not None
    # Batches of another size, or other threads, round in another way.
    tolerance = 1e-3 if str(work.parts.prefix.outputs[0].dtype) == "float32" else 5e-2
    return np.allclose(now, sample[few], rtol=0, atol=tolerance * np.abs(now).max())


def _fits_float16(path: Path, work: _Work) -> bool:
    return features.fits_float16(work.parts.rest, np.load(path / "sample.npy", mmap_mode="r"))


def _intact_chunks(path: Path, meta: dict[str, Any]) -> list[str]:
    """Hashes of the chunks, from the first on, that are on disk as they were written."""
    try:
        array = np.load(path / "features.npy", mmap_mode="r")
    except (OSError, ValueError):
        return []
    chunks, rows = meta.get("chunks", []), meta["rows"]
    blocks = [array[at * rows : (at + 1) * rows] for at in range(len(chunks))]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        hashes = list(pool.map(lambda block: hashlib.sha256(block).hexdigest(), blocks))
    wrong = [at for at, found in enumerate(hashes) if found != chunks[at]]
    return chunks[: wrong[0]] if wrong else chunks


def _hold(path: Path) -> BinaryIO | None:
    """The file, open and locked against eviction; None if it isn't there, or is just going."""
    with suppress(FileNotFoundError):
        held = path.open("rb")
        with suppress(FileNotFoundError):
            if _try_lock(held, fcntl.LOCK_SH) and os.path.samestat(
                os.stat(path), os.fstat(held.fileno())
            ):
                return held
        held.close()
    return None


def _try_lock(stream: Any, kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _last_used(path: Path) -> float:
    for file in (path / "meta.json", path):
        with suppress(OSError):
            return file.stat().st_mtime
    return 0.0


def _size(path: Path, *, allocated: bool = False) -> int:
    """Bytes of a folder's files, or those of the disk that they take: one may be sparse."""
    total = 0
    for file in path.iterdir():
        with suppress(FileNotFoundError):  # a temporary one of a process that computes
            status = file.stat()
            total += status.st_blocks * 512 if allocated else status.st_size
    return total


def _text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
