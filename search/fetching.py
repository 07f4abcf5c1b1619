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

logger = logging.getLogger("search")


class DataFile(NamedTuple):
    name: str
    md5: str


class NotFetched(Exception):
    """Says why in a few words."""


def wrong_files(folder: Path, files: Iterable[DataFile]) -> list[DataFile]:
    """Those that are missing, unreadable or not what was published."""
    return [file for file in files if _md5(folder / file.name) != file.md5]


def fetch(url: str, folder: Path, files: tuple[DataFile, ...]) -> None:
    """Put what is missing or wrong into `folder`; a wrong download is tried once more.

    Raises:
        NotFetched: if that fails. Nothing is then half-written.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # it would explain each retry in a paragraph
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder) as scratch:
            wrong = wrong_files(folder, files)  # another process may have fetched them meanwhile
            source = pooch.create(
                scratch,
                url,
                registry={f.name: f"md5:{f.md5}" for f in wrong},
                retry_if_failed=1,
            )
            for file in wrong:
                logger.info("fetching %s", url + file.name)
                source.fetch(file.name)
                (scratch / file.name).chmod(0o644)  # pooch's are for their owner only
                os.replace(scratch / file.name, folder / file.name)
    except ValueError as error:  # pooch: the hash differs, also the second time
        raise NotFetched("the server's file has another MD5") from error
    except OSError as error:  # also the base class of requests' errors
        raise NotFetched(error.strerror or type(error).__name__) from error


def _md5(path: Path) -> str | None:
    try:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError:
        return None


@contextmanager
def _alone_in(folder: Path) -> Iterator[Path]:
    """Gives an empty folder inside `folder`, to one process at a time where it can be locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            # The folder itself is locked: no lock file is left, and a dead owner's lock is gone.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for left in folder.glob(".fetch-*"):  # a killed download's
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # NFS locks no folder: each process then fetches its own copy, which is correct
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            yield Path(scratch)
    finally:
        os.close(descriptor)
