"""Where a study is kept: a URL becomes an Optuna storage with the settings that survive crashes.

    database = storage.at("sqlite:///runs/cnn/study.db")
    with database.lock("cnn"):
        study = database.open("cnn")

All that differs between SQLite (sqlite_file.py) and PostgreSQL (postgres.py) is a method of
`Database`. It is written by one process (the coordinator), which holds the lock.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from search.errors import EXIT_USAGE, SearchError

if TYPE_CHECKING:
    import optuna
    import sqlalchemy

    from search.storage.patience import PatientStorage
    from search.storage.snapshots import Snapshots
    from search.storage.writer import WriterStorage

# Of a study that was carried elsewhere, the attribute that is left of it: where to.
MOVED = "moved"


class Database(ABC):
    """What holds studies, behind a URL that holds no password."""

    def __init__(self, url: str):
        self.url = url

    @property
    @abstractmethod
    def label(self) -> str:
        """What messages call it."""

    @abstractmethod
    def check(self) -> None:
        """Raises SearchError if nothing could be kept there, as far as that shows unopened."""

    @abstractmethod
    def lock(self, study_name: str) -> AbstractContextManager[None]:
        """Hold a study for this process alone; raises SearchError naming who else holds it."""

    @abstractmethod
    def storage(self, study_name: str, wait: Callable[[float], None]) -> PatientStorage:
        """To write that study, with its tables made."""

    @abstractmethod
    def reader(self) -> PatientStorage | None:
        """To read, so that nothing can be written; None where nothing is."""

    @abstractmethod
    def lost(self, error: Exception) -> SearchError:
        """What it raised, for the user."""

    @abstractmethod
    def settle(self, engine: sqlalchemy.Engine) -> None:
        """Returns when what was committed outlives a loss of power."""

    @abstractmethod
    def snapshots(self) -> Snapshots | None:
        """What copies it now and then; None where that is somebody else's business."""

    def open(self, name: str, *, wait: Callable[[float], None] = time.sleep) -> optuna.Study:
        """The study, made if it is not there yet. The caller holds the lock and is its one writer.

        Args:
            wait: for so many seconds until a storage that fails is tried again; may raise.
        """
        import optuna

        from search.storage.writer import WriterStorage

        stored = self.open_storage(name, wait=wait)
        optuna.create_study(
            study_name=name, storage=stored, direction="maximize", load_if_exists=True
        )
        storage = WriterStorage(stored, name)
        return self._present(optuna.load_study(study_name=name, storage=storage))

    def open_storage(
        self, name: str, *, wait: Callable[[float], None] = time.sleep
    ) -> PatientStorage:
        """What `open` stores the study by; the arguments are the same."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the log says what is new
        with self._version_named():
            return self.storage(name, wait)

    def read(self, name: str) -> optuna.Study | None:
        """The study, opened so that nothing can be written, or None where there is none."""
        import optuna

        with self._version_named():
            storage = self.reader()
        if storage is None:
            return None
        try:
            return self._present(optuna.load_study(study_name=name, storage=storage))
        except KeyError:
            return None

    def names(self) -> list[str]:
        """Of the studies that are there."""
        with self._version_named():
            storage = self.reader()
        return [study.study_name for study in storage.get_all_studies()] if storage else []

    def _present(self, study: optuna.Study) -> optuna.Study:
        if to := study.user_attrs.get(MOVED):
            raise SearchError(
                f"study {study.study_name!r} was moved from {self.label} to {to}; name it: "
                f"--storage {to}",
                exit_code=EXIT_USAGE,
            )
        return study

    @contextmanager
    def _version_named(self) -> Iterator[None]:
        """Tables of another Optuna than this one are one line, with Optuna's own advice."""
        import optuna

        try:
            yield
        except RuntimeError as error:
            if "table schema" not in str(error):
                raise
            raise SearchError(
                f"the study {self.label} is not of this Optuna's ({optuna.__version__}) version. "
                f"{error}"
            ) from None

    @contextmanager
    def failures_named(self) -> Iterator[None]:
        """What the database raises becomes one line: a full disk, a lost file, no permission."""
        import optuna
        import sqlalchemy

        try:
            yield
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            raise self.lost(error) from error


def at(url: str) -> Database:
    """The database behind a URL.

    Raises:
        SearchError: if it names none; with the scheme only, since a URL may hold a password.
    """
    before, found, _ = url.partition("://")
    if before in ("postgresql", "postgresql+psycopg") and found:
        from search.storage.postgres import Postgres

        return Postgres(url)
    if not (url.startswith("sqlite:///") and is_plain_path(url.removeprefix("sqlite:///"))):
        scheme = f"a {before[:20]!r}" if found else "another"
        raise SearchError(
            "a study is kept in sqlite:///FILE, a path without ? % # { }, or in "
            f"postgresql://USER@HOST/DATABASE. Received: {scheme} address. Write for example "
            "--storage sqlite:///runs/cnn/study.db, or another --out",
            exit_code=EXIT_USAGE,
        )
    from search.storage.sqlite_file import SqliteFile

    return SqliteFile(Path(url.removeprefix("sqlite:///")))


def is_plain_path(named: str) -> bool:
    """Whether it means the same in a URL as on the disk."""
    return named not in ("", ":memory:") and not set(named) & set("?%#{}")


def url_in(folder: Path, url: str | None) -> str:
    """The given URL, checked, or that of the study file in a run's folder."""
    url = url or f"sqlite:///{folder / 'study.db'}"
    return at(url).url


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` for this process alone, and say in it who holds it; removed at the end.

    The kernel frees the lock when its holder dies, however that happens, so that a lock file left
    behind by a kill stops nobody.

    Raises:
        SearchError: at once, naming the holder, if another process has it; or if its file system
            knows no locks.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _unlockable(path, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise held_by(holder, "--out") from None
        except OSError as error:
            os.close(descriptor)
            raise _unlockable(path, error) from None
        # The holder before us removes the file when it ends: what we locked must still be it.
        if _still_at(path, descriptor):
            break
        os.close(descriptor)
    try:
        with suppress(OSError):  # a full disk: what the run needs of it is looked at later
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def held_by(holder: str, option: str) -> SearchError:
    """The refusal of a study that somebody else runs."""
    return SearchError(
        f"this study is being run by {holder}; wait for it, end it, or take another {option}",
        exit_code=EXIT_USAGE,
    )


def read_study(url: str, name: str) -> optuna.Study | None:
    """As `Database.read`."""
    return at(url).read(name)


def drop_reports_after(study: optuna.Study, trial_id: int, step: int) -> None:
    """Delete a running trial's reports after `step`, which a lost attempt left behind.

    An attempt that began again and ended sooner would otherwise be credited with the tail of the
    lost one.
    """
    _writer(study).drop_reports_after(trial_id, step)


def together(study: optuna.Study) -> AbstractContextManager[None]:
    """Store what is written inside in one transaction, at its end; an error's end, too."""
    return _writer(study).together()


def _writer(study: optuna.Study) -> WriterStorage:
    return study._storage  # type: ignore[return-value]


def _still_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _unlockable(path: Path, error: OSError) -> SearchError:
    return SearchError(
        f"{path} can't be locked for this run alone ({error.strerror}): its folder must be one "
        "that this user writes, on a file system with locks (NFS and Lustre may have none). Remove "
        "that file if it is somebody else's or a link, or take another --out",
        exit_code=EXIT_USAGE,
    )
