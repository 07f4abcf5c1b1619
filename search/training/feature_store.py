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
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from search import artifacts
from search.errors import SearchError
from search.training import feature_files
from search.training.feature_files import Tell, Work
from search.training.features import Cut

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
        shape = tuple(parts.prefix.compute_output_shape((1, *images.shape[1:]))[1:])
        work = Work(
            self._folder, feature_files.key_of(parts, images, data), parts, images, shape, tell
        )
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
        for dtype in ("float32", "float16"):
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
        self._reserve(work, "float16")
        work.tell(0, len(work.images))
        feature_files.make_sample(work)
        dtype = "float16"
        if not (
            feature_files.fits_float16(work.partial, work) and feature_files.write(work, dtype)
        ):
            dtype = "float32"
            self._reserve(work, dtype)
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

    def _lack(self, work: Work, dtype: str, used: int) -> str:
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


def _text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
