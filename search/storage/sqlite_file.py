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
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


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
        # With synchronous=NORMAL a commit alone is not flushed.
        with engine.connect() as connection:
            is_busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
        if is_busy:
            raise SearchError(
                f"{self.path} is being read by another process, so what was written is not safe on "
                "the disk yet: end that and type the same command"
            )

    def snapshots(self) -> Snapshots:
        from search.storage.snapshots import Snapshots

        return Snapshots(self.path)

    def storage(self, study_name: str, wait: Callable[[float], None]) -> PatientStorage:
        from sqlalchemy import event

        from search.storage.patience import PatientStorage, patiently

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check_file(wait=wait)
        if not self.path.exists():
            patiently(lambda _: _create(self.path), self.path, wait=wait)
        storage = PatientStorage(
            self.path,
            self.url,
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
        from sqlalchemy.pool import NullPool  # how it is to be opened may change meanwhile

        from search.storage.patience import PatientStorage

        self._check_file()
        if not self.path.exists():
            return None
        arguments = {"creator": lambda: _opened(self.path), "poolclass": NullPool}
        try:
            return PatientStorage(
                self.path, self.url, skip_table_creation=True, engine_kwargs=arguments
            )
        except optuna.exceptions.StorageInternalError:
            raise SearchError(
                f"{self.path} is no Optuna study: another program wrote it. Take another --out or "
                "--storage",
                exit_code=EXIT_DAMAGED,
            ) from None

    def lost(self, error: Exception) -> SearchError:
        from search.storage.patience import cause_of, code_of

        if code_of(error) in _DAMAGE:
            return _unusable(self.path, f"damaged ({cause_of(error)})")
        needed = f" ({_needed(self.path)})" if code_of(error) == sqlite3.SQLITE_FULL else ""
        return SearchError(
            f"the study {self.path} can't be written: {cause_of(error)}{needed}; free space or "
            "check permissions, then type the same command",
            exit_code=EXIT_STORAGE_LOST,
        )

    def _check_file(self, **trying: Any) -> None:
        """Raises SearchError if there is a file that is no sound database, or only snapshots of
        one: never a silent new one."""
        from search.storage.snapshots import taken_of

        if problem := problem_of(self.path, **trying):
            raise _unusable(self.path, f"damaged ({problem})")
        if self.path.exists():
            return
        if taken_of(self.path):
            raise _unusable(self.path, "missing, though there are snapshots of it")
        wal = self.path.with_name(f"{self.path.name}-wal")
        if wal.exists():  # SQLite would write what is in it into the new one
            raise SearchError(
                f"the study file {self.path} is missing, though its {wal.name} is there: put it "
                f"back, or move {wal.name} away to begin anew",
                exit_code=EXIT_DAMAGED,
            )


def problem_of(path: Path, **trying: Any) -> str:
    """What is wrong with a database file, or nothing; nothing for a missing one, too.

    Args:
        trying: as of `patiently`.

    Raises:
        SearchError: if it can't be read, which says nothing of what is written; exit code 3.
    """
    from search.storage.patience import patiently

    try:
        return patiently(lambda _: _problem(path), path, **trying)
    except (OSError, sqlite3.Error) as error:
        raise SearchError(
            f"the study file {path} can't be read ({error}); give this user the right to read it, "
            "or, if its folder is read-only, copy the folder elsewhere and name the copy",
            exit_code=EXIT_STORAGE_LOST,
        ) from None


def _problem(path: Path) -> str:
    if not path.exists():
        return ""
    if not path.is_file():  # reading a folder is an I/O error, which might pass
        return "it is no file"
    return "it is empty" if path.stat().st_size == 0 else _quick_check(path)


def _quick_check(path: Path) -> str:
    from search.storage.patience import code_of

    with closing(_opened(path)) as connection:
        try:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            if code_of(error) not in _DAMAGE:
                raise  # somebody writes: that says nothing of what is written
            return str(error)
    return "" if answer == "ok" else str(answer)


def _opened(path: Path) -> sqlite3.Connection:
    """To read it. A reader in WAL mode makes files beside it, which it can't in a read-only folder;
    where none is left of a writer's, all is in the file, and SQLite is told to need no others."""
    path = path.resolve()
    beside = [path.with_name(path.name + end) for end in ("-journal", "-shm", "-wal")]
    may_write = os.access(path.parent, os.W_OK, effective_ids=True)
    is_alone = not may_write and not any(map(Path.exists, beside))
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro" + ("&immutable=1" if is_alone else ""),
        uri=True,
        timeout=_BUSY,
        check_same_thread=False,  # the collector may close it, in any
    )


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


def _unusable(path: Path, how: str) -> SearchError:
    return SearchError(
        f"the study file {path} is {how}; `fmnist-search repair` with the same --study and --out "
        "puts the newest snapshot back; or move it and its snapshots away to begin anew",
        exit_code=EXIT_DAMAGED,
    )
