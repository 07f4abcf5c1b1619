"""Where a study is kept: a URL becomes an Optuna storage with the settings that survive crashes.

    with storage.lock(url, "cnn"):
        study = storage.open_study(url, "cnn")

SQLite for now: one file, one writer (the coordinator), read live by Optuna's own tools.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from search.errors import EXIT_DAMAGED, EXIT_STORAGE_LOST, EXIT_USAGE, SearchError

if TYPE_CHECKING:
    import optuna

    from search.patience import PatientStorage

# WAL lets readers in while a trial is written; NORMAL loses nothing when a process dies. SQLite
# itself waits for a second only, since a signal is not heard meanwhile: patience.py goes on.
_BUSY = 1.0  # seconds
PRAGMAS = {"journal_mode": "wal", "synchronous": 1, "busy_timeout": round(1000 * _BUSY)}
_PREFIX = "sqlite:///"


def database_path(url: str) -> Path:
    """The file behind a `sqlite:///` URL.

    Raises:
        SearchError: for any other URL; it names the scheme only, since a URL may hold a password.
    """
    named = url.removeprefix(_PREFIX)
    before, found, _ = url.partition("://")
    scheme = f"a {before[:20]!r}" if found else "another"
    if named == url or named in ("", ":memory:") or set(named) & set("?%#{}"):
        raise SearchError(
            "the study is kept in sqlite:///FILE for now, a path without ? % # { }. Received: "
            f"{scheme} address. Write for example "
            "--storage sqlite:///runs/cnn/study.db, or another --out",
            exit_code=EXIT_USAGE,
        )
    return Path(named)


def url_in(folder: Path, url: str | None) -> str:
    """The given URL, checked, or that of the study file in a run's folder."""
    url = url or f"{_PREFIX}{folder / 'study.db'}"
    database_path(url)
    return url


def lock_beside(url: str, study_name: str) -> Path:
    """Where a study's lock lies: beside its database, which several runs may share."""
    path = database_path(url)
    return path.with_name(f".{path.name}.{study_name}.lock")


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` for this process alone, and say in it who holds it; removed at the end.

    The kernel frees the lock when its holder dies, however that happens, so that a lock file left
    behind by a kill stops nobody.

    Raises:
        SearchError: at once, naming the holder, if another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise SearchError(
                f"this study is being run by {holder}; wait for it, end it, or take another --out",
                exit_code=EXIT_USAGE,
            ) from None
        # The holder before us removes the file when it ends: what we locked must still be it.
        if _still_at(path, descriptor):
            break
        os.close(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def open_study(
    url: str,
    name: str,
    *,
    wait: Callable[[float], None] = time.sleep,
    patience: float | None = None,
) -> optuna.Study:
    """The study, made if it is not there yet. The caller holds the lock and is its one writer.

    Args:
        wait: for so many seconds until a storage that fails is tried again; may raise.
        patience: seconds, until it is lost; None for the usual.
    """
    import optuna

    from search.patience import patiently

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the log says what is new
    path = database_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_file(path)
    if not path.exists():
        patiently(lambda _: _create(path), path, wait=wait)
    storage = _storage(url, wait, patience)
    return optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True
    )


def read_study(url: str, name: str) -> optuna.Study | None:
    """The study, opened so that nothing can be written, or None where there is none."""
    import optuna

    path = database_path(url)
    if not path.exists():
        return None
    _check_file(path)
    from search.patience import PatientStorage

    read_only = f"{_PREFIX}file:{quote(str(path.resolve()))}?mode=ro&uri=true"
    arguments = {"connect_args": {"timeout": _BUSY}}
    try:
        storage = PatientStorage(path, read_only, skip_table_creation=True, engine_kwargs=arguments)
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None
    except optuna.exceptions.StorageInternalError:
        raise SearchError(
            f"{path} is no Optuna study: another program wrote it. Take another --out or --storage",
            exit_code=EXIT_DAMAGED,
        ) from None


def drop_reports_after(study: optuna.Study, trial_id: int, step: int) -> None:
    """Delete a running trial's reports after `step`, which a lost attempt left behind.

    An attempt that began again and ended sooner would otherwise be credited with the tail of the
    lost one.
    """
    _rdb(study).drop_reports_after(trial_id, step)


def _rdb(study: optuna.Study) -> PatientStorage:
    """The database behind Optuna's cache, which keeps only finished trials."""
    return study._storage._backend  # type: ignore[attr-defined]


def _create(path: Path) -> None:
    """An empty study file appears whole: a kill must not leave what looks like a damaged one."""
    import optuna

    beside = path.with_name(f".{path.name}.partial")
    beside.unlink(missing_ok=True)
    optuna.storages.RDBStorage(f"{_PREFIX}{beside}").engine.dispose()
    os.replace(beside, path)


@contextmanager
def failures_named(url: str) -> Iterator[None]:
    """What the database raises becomes one line: a full disk, a lost file, no permission."""
    import optuna
    import sqlalchemy

    from search.patience import cause_of, code_of

    path = database_path(url)
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        if code_of(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _damaged(path, str(cause_of(error))) from error
        needed = f" ({_needed(path)})" if code_of(error) == sqlite3.SQLITE_FULL else ""
        raise SearchError(
            f"the study {path} can't be written: {cause_of(error)}{needed}; free space or check "
            "permissions, then type the same command",
            exit_code=EXIT_STORAGE_LOST,
        ) from error


def _needed(path: Path) -> str:
    """What writing the study takes: as much as it has, while SQLite moves its log into it."""
    parts = [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]
    size = sum(part.stat().st_size for part in parts if part.exists())
    return f"it needs {size} bytes, {shutil.disk_usage(path.parent).free} are free"


def _storage(
    url: str, wait: Callable[[float], None], patience: float | None
) -> optuna.storages.RDBStorage:
    from sqlalchemy import event

    from search.patience import PATIENCE, PatientStorage

    storage = PatientStorage(
        database_path(url),
        url,
        patience=PATIENCE if patience is None else patience,
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


def _check_file(path: Path) -> None:
    """Raises SearchError if there is a file that is no sound database: never a silent new one."""
    if problem := problem_of(path):
        raise _damaged(path, problem)


def _damaged(path: Path, problem: str) -> SearchError:
    return SearchError(
        f"the study file {path} is damaged ({problem}); `fmnist-search repair` with the same "
        "--study and --out puts the newest snapshot back; or move it away to begin anew",
        exit_code=EXIT_DAMAGED,
    )


def problem_of(path: Path) -> str:
    """What is wrong with a database file, or nothing; nothing for a missing one, too."""
    if not path.exists():
        return ""
    return "it is empty" if path.stat().st_size == 0 else _quick_check(path)


def _quick_check(path: Path) -> str:
    from search.patience import code_of, patiently

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


def _still_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
