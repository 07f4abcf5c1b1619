"""Where a study is kept: a URL becomes an Optuna storage with the settings that survive crashes.

    with storage.lock(url, "cnn"):
        study = storage.open_study(url, "cnn")

SQLite for now: one file, one writer (the coordinator), read live by Optuna's own tools.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from search.errors import EXIT_DAMAGED, EXIT_STORAGE_LOST, EXIT_USAGE, SearchError

if TYPE_CHECKING:
    import optuna

# WAL lets readers in while a trial is written; NORMAL loses nothing when a process dies; a minute
# is longer than any reader holds the file.
PRAGMAS = {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 60_000}
_PREFIX = "sqlite:///"


def database_path(url: str) -> Path:
    """The file behind a `sqlite:///` URL.

    Raises:
        SearchError: for any other URL; it names the scheme only, since a URL may hold a password.
    """
    named = url.removeprefix(_PREFIX)
    if named == url or named in ("", ":memory:") or set(named) & set("?%#{}"):
        raise SearchError(
            "the study is kept in sqlite:///FILE for now, a path without ? % # { }. Received: a "
            f"{url.split(':', 1)[0][:20]!r} address. Write for example "
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


def open_study(url: str, name: str) -> optuna.Study:
    """The study, made if it is not there yet. The caller holds the lock and is its one writer."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the log says what is new
    path = database_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_file(path)
    if not path.exists():
        _create(path)
    storage = _storage(url)
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
    read_only = f"{_PREFIX}file:{quote(str(path.resolve()))}?mode=ro&uri=true"
    try:
        storage = optuna.storages.RDBStorage(read_only, skip_table_creation=True)
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

    Optuna has no call for it: an attempt that began again and ended sooner would otherwise be
    credited with the tail of the lost one.
    """
    from sqlalchemy import text

    with _rdb(study).engine.begin() as connection:
        connection.execute(
            text("DELETE FROM trial_intermediate_values WHERE trial_id = :id AND step > :step"),
            {"id": trial_id, "step": step},
        )


def _rdb(study: optuna.Study) -> optuna.storages.RDBStorage:
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

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ or error
        raise SearchError(
            f"the study {database_path(url)} can't be written: {getattr(cause, 'orig', cause)}; "
            "free space or check permissions, then type the same command",
            exit_code=EXIT_STORAGE_LOST,
        ) from error


def _storage(url: str) -> optuna.storages.RDBStorage:
    import optuna
    from sqlalchemy import event

    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})

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
        raise SearchError(
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
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            connection.execute(f"PRAGMA busy_timeout={PRAGMAS['busy_timeout']}")
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        return str(error)
    return "" if answer == "ok" else str(answer)


def _still_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
