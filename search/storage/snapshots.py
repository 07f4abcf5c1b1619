"""Copies of the study while it grows, so that a damaged file costs minutes, not the study.

snapshots = Snapshots(Path("runs/cnn/study.db"))
snapshots.take_if_due()              # the coordinator, now and then
restored = restore(Path("runs/cnn/study.db"))  # fmnist-search repair
"""

from __future__ import annotations

import calendar
import logging
import os
import re
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from search import artifacts
from search.errors import EXIT_DAMAGED, EXIT_USAGE, SearchError
from search.storage.sqlite_file import problem_of

logger = logging.getLogger("search")

KEPT = 3
EVERY = 300.0  # seconds
_FOLDER = "snapshots"
_STAMP = "%Y%m%d-%H%M%S"


class Restored(NamedTuple):
    """What `restore` has done."""

    snapshot: Path
    num_trials: int  # finished ones in it
    aside: Path | None  # where the damaged file now lies


class Snapshots:
    """Takes snapshots of a study's database, and keeps the newest.

    Args:
        database: the SQLite file; snapshots lie in a folder beside it.
    """

    def __init__(self, database: Path):
        self._database = database
        self._taken = time.monotonic()

    def take_if_due(self) -> None:
        if time.monotonic() - self._taken >= EVERY:
            self.take()

    def take(self) -> None:
        """By SQLite's own backup, which a writer does not disturb, looked at before it takes the
        place of an older one: the writer reads from memory, and would not see a damaged page. A
        failure is a warning: the search goes on without."""
        self._taken = time.monotonic()
        path = _folder(self._database) / f"{self._database.stem}-{self._stamp()}.db"
        existing = f"{self._database.absolute().as_uri()}?mode=rw"  # it may have been deleted
        try:
            with artifacts.write_atomically(path) as beside:
                with (
                    closing(sqlite3.connect(existing, uri=True)) as source,
                    closing(sqlite3.connect(beside)) as target,
                ):
                    source.backup(target)
                    target.execute("PRAGMA journal_mode=delete")
                if problem := problem_of(beside, patience=0):  # the search goes on meanwhile
                    raise SearchError(f"{self._database} is damaged: {problem}")
            for old in taken_of(self._database)[KEPT:]:
                old.unlink(missing_ok=True)
        except (SearchError, sqlite3.Error) as error:
            logger.warning("no snapshot of the study: %s", error)

    def _stamp(self) -> str:
        """The clock's, but later than all there are: it may have been set back."""
        now = _now()
        for newest in taken_of(self._database)[:1]:
            with suppress(ValueError):  # somebody else's file, of a 99th month
                last = calendar.timegm(time.strptime(newest.stem[-15:], _STAMP))
                now = max(now, time.strftime(_STAMP, time.gmtime(last + 1)))
        return now


def restore(database: Path) -> Restored:
    """Put the newest sound snapshot in the place of a damaged study; the caller holds its lock.

    Raises:
        SearchError: if the study is sound, or no snapshot is.
    """
    problem = problem_of(database)
    if not problem and database.exists():
        raise SearchError(
            f"the study file {database} is sound: there is nothing to repair",
            exit_code=EXIT_USAGE,
        )
    for snapshot in taken_of(database):
        if problem_of(snapshot):
            continue
        aside = None
        with artifacts.write_atomically(database) as beside:
            # First, so that a full disk or a kill leaves what there is where it is.
            beside.write_bytes(snapshot.read_bytes())
            if database.exists():
                aside = database.with_name(f"{database.name}.damaged-{_now()}")
                _keep(database, aside)
            for rest in ("-wal", "-shm"):  # they belong to the damaged one
                database.with_name(database.name + rest).unlink(missing_ok=True)
        return Restored(snapshot, _num_finished(database), aside)
    raise SearchError(
        f"the study file {database} is {(problem and f'damaged ({problem})') or 'missing'} and no "
        f"sound snapshot lies in {_folder(database)}; put a copy of it back, or take another --out",
        exit_code=EXIT_DAMAGED,
    )


def _keep(database: Path, aside: Path) -> None:
    try:
        os.link(database, aside)
    except OSError:  # it is a folder, or on a file system without links
        os.replace(database, aside)


def _now() -> str:
    return time.strftime(_STAMP, time.gmtime())


def _folder(database: Path) -> Path:
    return database.parent / _FOLDER


def taken_of(database: Path) -> list[Path]:
    """The newest first; those of study-2.db are not study.db's."""
    name = re.compile(rf"{re.escape(database.stem)}-\d{{8}}-\d{{6}}\.db")
    found = (path for path in _folder(database).glob("*.db") if name.fullmatch(path.name))
    return sorted(found, reverse=True)


def _num_finished(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')"
        return int(connection.execute(query).fetchone()[0])
