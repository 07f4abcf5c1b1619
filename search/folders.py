"""A run's folder: whether it can be used, whose it is, and what killed runs left in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search import artifacts
from search.errors import SearchError

LOCK = ".lock"
FEATURES = "features"  # activations of frozen parts, until the winners are measured
CHECKPOINTS = "checkpoints"  # of trainings that run
# What a run writes; --out may be a folder with other things in it.
WRITTEN = (
    *("study.db", "study.db-wal", "study.db-shm", "snapshots", "search.log", "logs"),
    *("models", "evaluation", "configs", "metrics.json", "report.html", "csv", "tensorboard"),
    *(FEATURES, CHECKPOINTS),
)
PRIVATE, SHARED = 0o077, 0o022  # what others may not: anything in a run; write what is cached
# Models, predictions and the study of a usual run; less is refused before the first trial.
NEEDED_BYTES = 200 * 2**20


def clean(folder: Path) -> None:
    """What killed writers left; only where this project writes, since --out may be any folder."""
    for name in (".", "models", "evaluation", "configs", "snapshots", CHECKPOINTS):
        artifacts.remove_partials(folder / name)


def remove_scratch(folder: Path, *, checkpoints: bool = True) -> None:
    """What nothing reads any more once the winners are measured.

    Args:
        checkpoints: those too; False while trainings are to go on from them.
    """
    for name in (FEATURES, CHECKPOINTS) if checkpoints else (FEATURES,):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """New files and folders of this process are PRIVATE or SHARED meanwhile."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def refuse_links(folder: Path) -> None:
    """Raises SearchError if something that a run writes in `folder` is a link that leads out."""
    inside = folder.resolve()
    try:
        paths = [p for name in WRITTEN for p in (folder / name, *(folder / name).rglob("*"))]
        links = [path for path in paths if path.is_symlink()]
    except OSError as error:
        raise SearchError(f"{folder} can't be read: {error.strerror}; take another") from None
    for path in links:
        if not path.resolve().is_relative_to(inside):
            raise SearchError(
                f"Files are not written through symbolic links. Received: {path} -> "
                f"{os.readlink(path)}. Fix: remove the link"
            )


def check(folder: Path, option: str) -> None:
    """Raises SearchError if a run can't be kept in `folder`, which `option` has named."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if option == "--out":
            (folder / "logs").mkdir(exist_ok=True)
            (folder / "search.log").open("a").close()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise SearchError(
            f"{option} {folder} can't be written: {error.strerror}; make it writable or take "
            "another"
        ) from None
    if free < NEEDED_BYTES:
        raise SearchError(
            f"{option} {folder} has {free >> 20} MB free, a run needs about "
            f"{NEEDED_BYTES >> 20} MB; free some or take another"
        )
