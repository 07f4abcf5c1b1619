"""A run's folder: whether it can be used, and what killed runs left in it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from search import artifacts
from search.errors import SearchError

LOCK = ".lock"
FEATURES = "features"  # activations of frozen parts, until the winners are measured
CHECKPOINTS = "checkpoints"  # of trainings that run
# Models, predictions and the study of a usual run; less is refused before the first trial.
NEEDED_BYTES = 200 * 2**20


def clean(folder: Path) -> None:
    """What killed writers left; only where this project writes, since --out may be any folder."""
    for name in (".", "models", "evaluation", "configs", CHECKPOINTS):
        artifacts.remove_partials(folder / name)


def remove_scratch(folder: Path) -> None:
    """What nothing reads any more once the winners are measured."""
    for name in (FEATURES, CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)


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
