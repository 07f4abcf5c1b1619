"""Files from the network: verified, whole or not there, fetched once however many ask.

`keras.datasets` checks no hash and leaves a partial file under its final name when it is killed;
hence pooch, into a folder of its own, and a rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from search.errors import SearchError

logger = logging.getLogger("search")


class DataFile(NamedTuple):
    name: str
    hash: str  # as published, with its algorithm: "md5:..." or "sha256:..."


class NotFetched(Exception):
    """Says why in a few words."""


def keras_datasets() -> Path:
    """`<KERAS_HOME>/datasets`, existing or not: Keras's rule, less its silent move to /tmp.

    Raises:
        SearchError: if there is no home folder.
    """
    home = Path(os.environ.get("KERAS_HOME") or "~/.keras")
    try:
        return home.expanduser() / "datasets"
    except RuntimeError as error:
        raise SearchError(
            f"Data sets need a folder. Received: no home folder ({error}). Fix: set KERAS_HOME"
        ) from error


def wrong_files(folder: Path, files: Iterable[DataFile]) -> list[DataFile]:
    """Those that are missing, unreadable or not what was published."""
    return [file for file in files if _hash(folder / file.name, file.hash) != file.hash]


def fetch(url: str, folder: Path, files: tuple[DataFile, ...]) -> None:
    """Put what is missing or wrong into `folder`; a wrong download is tried once more.

    Raises:
        NotFetched: if that fails. Nothing is then half-written.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # it would explain each retry in a paragraph
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder) as scratch:
            wrong = wrong_files(folder, files)  # another process may have fetched them meanwhile
            source = pooch.create(
                scratch,
                url,
                registry={file.name: file.hash for file in wrong},
                retry_if_failed=1,
            )
            for file in wrong:
                logger.info("fetching %s", url + file.name)
                source.fetch(file.name)
                (scratch / file.name).chmod(0o644)  # pooch's are for their owner only
                os.replace(scratch / file.name, folder / file.name)
    except ValueError as error:  # pooch: the hash differs, also the second time
        raise NotFetched("the server's file has another hash") from error
    except OSError as error:  # also the base class of requests' errors
        raise NotFetched(error.strerror or type(error).__name__) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[Path]:
    """Gives an empty folder inside `folder`, to one process at a time where it can be locked.

    It is removed afterwards with what is left in it; what a killed process left there, by the next.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            # The folder itself is locked: no lock file is left, and a dead owner's lock is gone.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for left in folder.glob(".fetch-*"):
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # NFS locks no folder: each process then fetches its own copy, which is correct
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            yield Path(scratch)
    finally:
        os.close(descriptor)


def _hash(path: Path, wanted: str) -> str | None:
    """That of the file, by the algorithm of the wanted one."""
    algorithm = wanted.partition(":")[0]
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(
                stream, lambda: hashlib.new(algorithm, usedforsecurity=False)
            )
    except OSError:
        return None
    return f"{algorithm}:{digest.hexdigest()}"
