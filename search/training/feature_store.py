"""Activations of a frozen prefix on disk: computed once, mapped by all workers of a run.

    store = FeatureStore(folder, max_bytes=8_000_000_000)
    with store.open(parts, images, data=content_hash, tell=show) as activations:
        rows = backend.Rows(activations, positions)  # what parts.rest is trained on

    KEY-float16/   features.npy, sample.npy, meta.json: whole, and never written again
    KEY.partial/   the same on the way; its meta.json says which chunks are on disk
    KEY.lock       locked by the process that computes them
    KEY.coarse     float16 was too coarse for a trained rest: float32 from then on

Kept in float16, or in float32 where that would show: at first as far as an untrained rest tells
(`features.fits_float16`), then by those that have been trained (`holds`). A killed computation goes
on after its last chunk. Every lock is the kernel's and ends with its process; that of a user
lies on features.npy, so that nothing in use is evicted. Needs a local file system.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from search import artifacts
from search.errors import SearchError
from search.training import feature_files
from search.training.feature_files import Tell, Work
from search.training.features import Cut

if TYPE_CHECKING:
    import keras

logger = logging.getLogger("search")

_WAIT = 0.2  # seconds between two looks at a lock
_TRASH = ".evicted-"


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
        work = self._work(parts, images, data, tell)
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

    def holds(
        self,
        parts: Cut,
        images: np.ndarray,
        activations: np.ndarray,
        *,
        data: str,
        whole: keras.Model | None = None,
    ) -> bool:
        """Whether the rest, trained by now, answers to stored activations as to exact ones.

        Where float16 is too coarse for it, these activations are kept in float32 from now on. What
        is in float32 holds, being all that there is; what differs nevertheless is logged.

        Args:
            activations: of the images, while they are open.
            whole: the model that was cut, if it is to be kept: what it says of the images is exact.
                Without it, what the rest says of a sample in float32; and float16 stays where
                float32 never has room: reading images would cost more than it is worth.
        """
        dtype = str(activations.dtype)
        if dtype == "float32" and whole is None:
            return True
        work = self._work(parts, images, data)
        path = self._folder / f"{work.key}-{dtype}"
        try:
            found = feature_files.difference(path, work, activations, whole)
            if found.is_small:
                return True
            logger.warning("%s are too coarse in %s for a trained model: %s", work, dtype, found)
            if dtype == "float16" and (whole or work.needed("float32") <= self._max_bytes):
                work.coarse.touch()
        except OSError as error:  # no reason to lose a training
            logger.warning("%s could not be held against a trained model: %s", work, error)
            return whole is not None
        return dtype == "float32"

    def _work(
        self, parts: Cut, images: np.ndarray, data: str, tell: Tell = lambda done, of: None
    ) -> Work:
        shape = tuple(parts.prefix.compute_output_shape((1, *images.shape[1:]))[1:])
        key = feature_files.key_of(parts, images, data)
        return Work(self._folder, key, parts, images, shape, tell)

    def _found_or_computed(self, work: Work) -> tuple[np.ndarray, BinaryIO]:
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

    def _find(self, work: Work) -> tuple[np.ndarray, BinaryIO] | None:
        """Activations that suit this rest, and the open file that holds them."""
        for dtype in ("float32",) if work.coarse.exists() else ("float32", "float16"):
            path = self._folder / f"{work.key}-{dtype}"
            held = _hold(path / "features.npy")
            if held is None:
                continue
            try:
                array = feature_files.opened(path, work, dtype)
                if array is None:
                    logger.warning("%s is damaged or outdated and is computed again", path)
                elif dtype == "float32" or feature_files.fits_float16(path, work):
                    os.utime(path / "meta.json")  # the last use
                    return array, held
            except BaseException:
                held.close()
                raise
            held.close()
        return None

    @contextmanager
    def _alone(self, work: Work) -> Iterator[None]:
        """One process computes a key. The others tell how far it is."""
        with (self._folder / f"{work.key}.lock").open("ab") as lock:
            told = -1
            while not _try_lock(lock, fcntl.LOCK_EX):
                meta = feature_files.meta_of(work.partial)
                done = min(len(meta.get("chunks", ())) * meta.get("rows", 0), len(work.images))
                if done != told:
                    work.tell(done, len(work.images))
                told = done
                time.sleep(_WAIT)
            yield

    def _compute(self, work: Work) -> None:
        work.partial.mkdir(exist_ok=True)
        dtype = "float32" if work.coarse.exists() else "float16"
        self._reserve(work, dtype)
        work.tell(0, len(work.images))
        feature_files.make_sample(work)
        if dtype == "float16" and not (
            feature_files.fits_float16(work.partial, work) and feature_files.write(work, dtype)
        ):
            dtype = "float32"
            self._reserve(work, dtype)
        if dtype == "float32":
            feature_files.write(work, dtype)
        meta = {
            **feature_files.meta_of(work.partial),
            "sample": artifacts.sha256(work.partial / "sample.npy"),
        }
        artifacts.write_json(work.partial / "meta.json", meta)
        final = self._folder / f"{work.key}-{dtype}"
        with self._locked():
            if final.exists():
                self._discard(final)  # it was damaged; who has mapped it keeps it
            os.rename(work.partial, final)
        feature_files.verified.add(feature_files.identity_of(final / "features.npy"))

    def _reserve(self, work: Work, dtype: str) -> None:
        """Makes room, and takes it by a sparse file of that size, which other processes count: as
        bytes in use, and as bytes of the disk that are not free, though nothing is written yet.

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
            if work.coarse.exists():
                # Nobody will open float16 again; whoever still reads it is not to be waited for.
                for path in [path for path in sizes if work.key in path.name]:
                    self._evict(path)
                    del sizes[path]
            for path in sorted(sizes, key=_last_used):
                if self._lack(work, dtype, sum(sizes.values())) and self._evict(path):
                    del sizes[path]
            if lack := self._lack(work, dtype, sum(sizes.values())):
                raise SearchError(f"{work} need {_text(needed)} in {dtype}. {lack}")
            with (work.partial / "features.npy").open("ab") as stream:
                # With the sample, which comes next; `write` cuts it to size.
                stream.truncate(max(needed, stream.tell()))

    def _lack(self, work: Work, dtype: str, used: int) -> str:
        """What there is too little of beside so many bytes in use, and the fix; or nothing."""
        needed = work.needed(dtype)
        promised = sum(map(_unwritten, set(self._folder.glob("*.partial")) - {work.partial}))
        free = shutil.disk_usage(self._folder).free - promised
        free += _size(work.partial, allocated=True)
        if used + needed > self._max_bytes:
            return (
                f"--cache-size allows {_text(self._max_bytes)}, of which {_text(used)} are in use. "
                f"Fix: --cache-size {math.ceil((used + needed) / 1e9)}G"
            )
        if needed > free:
            return (
                f"{self._folder} has {_text(max(0, free))} free. Fix: free that much, or take a "
                "folder on another disk"
            )
        return ""

    def _others(self, work: Work) -> list[Path]:
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


def _unwritten(path: Path) -> int:
    """Bytes of the disk that a folder's files will take, and do not take yet."""
    return max(0, _size(path) - _size(path, allocated=True))


def _text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
