"""Studies in an SQLite file: one writer (the coordinator), read live by Optuna's own tools."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from search import folders
from search.errors import EXIT_DAMAGED, EXIT_STORAGE_LOST, SearchError
from search.storage.storage import Database, lock

if TYPE_CHECKING:
    import sqlalchemy

    from search.storage.patience import PatientStorage
    from search.storage.snapshots import Snapshots

# WAL lets readers in while a trial is written; NORMAL loses nothing when a process dies. SQLite
# itself waits for a second only, since a signal is not heard meanwhile: patience.py goes on.
_BUSY = 1.0  # seconds
PRAGMAS = {"journal_mode": "wal", "synchronous": 1, "busy_timeout": round(1000 * _BUSY)}
PREFIX = "sqlite:///"


class SqliteFile(Database):
    """One file.

    Args:
        path: that means the same in a URL.
    """

    def __init__(self, path: Path):
        super().__init__(f"{PREFIX}{path}")
        self.path = path

    @property
    def label(self) -> str:
        return str(self.path)

    def check(self) -> None:
        folders.check(self.path.parent, "--storage")

    def lock(self, study_name: str) -> AbstractContextManager[None]:
        """By a file beside the database, which several runs may share."""
        return lock(self.path.with_name(f".{self.path.name}.{study_name}.lock"))

    def settle(self, engine: sqlalchemy.Engine) -> None:
        with (
            engine.connect() as connection
        ):  # with synchronous=NORMAL a commit alone is not flushed
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def snapshots(self) -> Snapshots:
        from search.storage.snapshots import Snapshots

        return Snapshots(self.path)

    def storage(
        self, study_name: str, wait: Callable[[float], None], patience: float
    ) -> PatientStorage:
        from sqlalchemy import event

        from search.storage.patience import PatientStorage, patiently

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check_file()
        if not self.path.exists():
            patiently(lambda _: _create(self.path), self.path, wait=wait)
        storage = PatientStorage(
            self.path,
            self.url,
            patience=patience,
            wait=wait,
            engine_kwargs={"connect_args": {"timeout": _BUSY}},
        )

        def set_pragmas(connection: sqlite3.Connection, _record: Any) -> None:
            for name, value in PRAGMAS.items():
                connection.execute(f"PRAGMA {name}={value}")

        event.listen(storage.engine, "connect", set_pragmas)
        # RDBStorage has made its tables on a pooled connection already, which no listener reaches.
        storage.engine.dispose()
        return storage

    def reader(self) -> PatientStorage | None:
        import optuna

        from search.storage.patience import PatientStorage

        if not self.path.exists():
            return None
        self._check_file()
        read_only = f"{PREFIX}file:{quote(str(self.path.resolve()))}?mode=ro&uri=true"
        arguments = {"connect_args": {"timeout": _BUSY}}
        try:
            return PatientStorage(
                self.path, read_only, skip_table_creation=True, engine_kwargs=arguments
            )
        except optuna.exceptions.StorageInternalError:
            raise SearchError(
                f"{self.path} is no Optuna study: another program wrote it. Take another --out or "
                "--storage",
                exit_code=EXIT_DAMAGED,
            ) from None

    def lost(self, error: Exception) -> SearchError:
        from search.storage.patience import cause_of, code_of

        if code_of(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return _damaged(self.path, str(cause_of(error)))
        needed = f" ({_needed(self.path)})" if code_of(error) == sqlite3.SQLITE_FULL else ""
        return SearchError(
            f"the study {self.path} can't be written: {cause_of(error)}{needed}; free space or "
            "check permissions, then type the same command",
            exit_code=EXIT_STORAGE_LOST,
        )

    def _check_file(self) -> None:
        """Raises SearchError if there is a file that is no sound database: never a silent new
        one."""
        if problem := problem_of(self.path):
            raise _damaged(self.path, problem)


def problem_of(path: Path) -> str:
    """What is wrong with a database file, or nothing; nothing for a missing one, too."""
    if not path.exists():
        return ""
    return "it is empty" if path.stat().st_size == 0 else _quick_check(path)


def _quick_check(path: Path) -> str:
    from search.storage.patience import code_of, patiently

    def check(_: bool) -> str:
        try:
            with closing(
                sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
            ) as connection:
                connection.execute(f"PRAGMA busy_timeout={PRAGMAS['busy_timeout']}")
                (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            if code_of(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise  # somebody writes: that says nothing of what is written
            return str(error)
        return "" if answer == "ok" else str(answer)

    return patiently(check, path)


def _create(path: Path) -> None:
    """An empty study file appears whole: a kill must not leave what looks like a damaged one."""
    import optuna

    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        optuna.storages.RDBStorage(f"{PREFIX}{beside}").engine.dispose()
        try:
            # Never in the place of one that another study's run, under a lock of its own, has made.
            os.link(beside, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _needed(path: Path) -> str:
    """What writing the study takes: as much as it has, while SQLite moves its log into it."""
    parts = [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]
    size = sum(part.stat().st_size for part in parts if part.exists())
    return f"it needs {size} bytes, {shutil.disk_usage(path.parent).free} are free"


def _damaged(path: Path, problem: str) -> SearchError:
    return SearchError(
        f"the study file {path} is damaged ({problem}); `fmnist-search repair` with the same "
        "--study and --out puts the newest snapshot back; or move it away to begin anew",
        exit_code=EXIT_DAMAGED,
    )
