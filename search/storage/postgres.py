"""Studies in a PostgreSQL database, `pip install '.[postgres]'`.

    fmnist-search --study cnn --storage postgresql://me@host/studies

The writer has one connection, and that connection holds the study's advisory lock: whoever has
lost it in an outage takes the lock again before it writes another word, or learns that somebody
else runs the study by now. No password stands in a URL, which other users of a machine can see:
libpq finds it in PGPASSFILE, in ~/.pgpass, in ?passfile=FILE (0600 all), or in PGPASSWORD.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from search.errors import EXIT_STORAGE_LOST, EXIT_USAGE, SearchError
from search.storage.storage import Database, held_by

if TYPE_CHECKING:
    import psycopg
    import sqlalchemy

    from search.storage.patience import PatientStorage

# Without a password in it: what stands before an @ is a name alone.
_URL = re.compile(
    r"postgresql(?:\+psycopg)?://(?:(?P<user>[^:/?#@\s]+)@)?"
    r"(?P<host>[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?"
    r"/(?P<dbname>[^:/?#@\s]+)(?:\?(?P<query>[^#@\s]*))?"
)
_PARAMETERS = frozenset(
    (
        *("host", "port", "passfile", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl"),
        *("channel_binding", "gssencmode", "krbsrvname", "target_session_attrs"),
    )
)
# A network that is gone without a word is noticed in half a minute, not in a quarter of an hour.
_TIMES: dict[str, Any] = {
    "connect_timeout": 5,  # seconds
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}
# The server's side: its end of a machine that is gone holds the study's lock for as long.
_NOTICED = "".join(f" -c tcp_{name}={_TIMES[name]}" for name in _TIMES if "keepalives_" in name)
_LET_GO = 1.0  # seconds that a killed holder's connection may take to vanish
_DRIVER = "postgresql+psycopg://"
_TABLES = 0x666D6E697374  # the lock under which tables are made
_HOLDER = """
SELECT pid, application_name FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND objsubid = 1
  AND ((classid::bigint << 32) | objid::bigint) = %s
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class Postgres(Database):
    """A database of a PostgreSQL server.

    Raises:
        SearchError: for a URL with a password, or with what libpq is not given here.
    """

    def __init__(self, url: str):
        super().__init__(url)
        self._parameters = _parameters(url)
        # What the server sees us as. By the random part we know our own lost connections, whose end
        # the server may not have noticed.
        token = secrets.token_hex(4)
        self._ours = f"fmnist-search {os.getpid()} {token} {socket.gethostname()}"[:63]
        self._locked: psycopg.Connection | None = None  # until a storage takes it over
        self._engine: sqlalchemy.Engine | None = None

    @property
    def label(self) -> str:
        return self.url.partition("?")[0]

    def check(self) -> None:
        """Whether it answers shows when the lock is taken."""

    def settle(self, engine: sqlalchemy.Engine) -> None:
        """A commit does that."""

    def snapshots(self) -> None:
        """None: copies are its server's business (pg_dump, pg_basebackup)."""

    @contextmanager
    def lock(self, study_name: str) -> Iterator[None]:
        with self._reached():
            self._locked = self._connect_locked(study_name)
        try:
            yield
        finally:
            for end in (self._locked and self._locked.close, self._engine and self._engine.dispose):
                with suppress(Exception):  # it is gone already
                    end and end()
            self._locked = self._engine = None

    def storage(self, study_name: str, wait: Callable[[float], None]) -> PatientStorage:
        from search.storage.patience import PatientStorage

        def connect() -> psycopg.Connection:
            connection, self._locked = self._locked, None
            return connection or self._connect_locked(study_name)

        self._make_tables()
        storage = PatientStorage(
            self.label,
            _DRIVER,
            wait=wait,
            skip_table_creation=True,
            skip_compatibility_check=True,  # just done; it takes a second connection
            engine_kwargs={
                **{"creator": connect, "pool_size": 1, "max_overflow": 0},
                "pool_pre_ping": True,
            },
        )
        self._engine = storage.engine
        return storage

    def reader(self) -> PatientStorage | None:
        from sqlalchemy.pool import NullPool  # a reader comes, looks and goes

        from search.storage.patience import PatientStorage

        with self._reached(), self._connect(writes=False) as connection:
            (tables,) = connection.execute("SELECT to_regclass('version_info')").fetchone() or (0,)
        if tables is None:
            return None
        return PatientStorage(
            self.label,
            _DRIVER,
            skip_table_creation=True,
            engine_kwargs={"creator": lambda: self._connect(writes=False), "poolclass": NullPool},
        )

    def lost(self, error: Exception) -> SearchError:
        from search.storage.patience import cause_of

        return SearchError(
            f"the study in {self.label} can't be written: {_one_line(cause_of(error))}; see to the "
            "database, then type the same command",
            exit_code=EXIT_STORAGE_LOST,
        )

    def _connect(self, *, writes: bool = True) -> psycopg.Connection:
        import psycopg

        read_only = "" if writes else " -c default_transaction_read_only=on"
        return psycopg.connect(
            **self._parameters,
            **_TIMES,
            application_name=self._ours,
            options=f"-c timezone=UTC{_NOTICED}{read_only}",
        )

    def _connect_locked(self, study_name: str) -> psycopg.Connection:
        connection = self._connect()
        try:
            _take(connection, study_name, self._ours)
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_tables(self) -> None:
        """By one process at a time: studies may begin at once in an empty database."""
        import optuna
        from sqlalchemy.pool import NullPool

        with self._reached(), self._connect() as connection:
            connection.execute("SELECT pg_advisory_lock(%s)", (_TABLES,))
            arguments = {"creator": self._connect, "poolclass": NullPool}
            optuna.storages.RDBStorage(_DRIVER, arguments)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """What keeps the first connection from being made is said at once: later ones are tried
        again, since an outage passes and a wrong password does not."""
        try:
            import psycopg
        except ImportError:
            raise SearchError(
                "--storage postgresql://... needs psycopg: pip install '.[postgres]'"
            ) from None
        self._check_password_files()
        try:
            yield
        except psycopg.Error as error:
            why = _one_line(error)
            hint = (
                "; its password is read from PGPASSFILE, ~/.pgpass or PGPASSWORD"
                if "password" in why
                else ""
            )
            raise SearchError(
                f"the database {self.label} can't be used: {why}{hint}",
                exit_code=EXIT_STORAGE_LOST,
            ) from None

    def _check_password_files(self) -> None:
        """libpq passes over a file that others may read; that ends as a wrong password."""
        named = self._parameters.get("passfile") or os.environ.get("PGPASSFILE")
        path = Path(named or Path.home() / ".pgpass")
        if named and not path.is_file():
            raise SearchError(f"there is no password file {path}", exit_code=EXIT_USAGE)
        with suppress(OSError):
            if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise SearchError(
                    f"others may read the password file {path}. Fix: chmod 600 {path}",
                    exit_code=EXIT_USAGE,
                )


def _parameters(url: str) -> dict[str, Any]:
    """What libpq is given; a message never repeats what may be a password."""
    match = _URL.fullmatch(url)
    if match is None:
        raise SearchError(
            "a PostgreSQL database is named postgresql://USER@HOST:PORT/DATABASE, without a "
            "password: that stands in PGPASSFILE, ~/.pgpass or PGPASSWORD (and @ : / in a name are "
            "%40 %3A %2F)",
            exit_code=EXIT_USAGE,
        )
    named = dict(parse_qsl(match["query"] or "", keep_blank_values=True))
    if named.keys() - _PARAMETERS:
        raise SearchError(
            "a PostgreSQL URL is written without a password (it stands in PGPASSFILE, ~/.pgpass or "
            f"PGPASSWORD) and takes ?{', '.join(sorted(_PARAMETERS))}. Received another parameter",
            exit_code=EXIT_USAGE,
        )
    parts = {name: unquote(value) for name, value in match.groupdict().items() if value}
    parts.pop("query", None)
    return {**parts, **named}


def _take(connection: psycopg.Connection, study_name: str, ours: str) -> None:
    """The study's lock, for as long as the connection lives; taken from a lost one of ours."""
    digest = hashlib.sha256(f"fmnist-search:{study_name}".encode()).digest()
    key = int.from_bytes(digest[:8]) >> 1  # a positive bigint
    end = time.monotonic() + _LET_GO
    while True:
        taken = connection.execute("SELECT pg_try_advisory_lock(%s)", (key,)).fetchone()
        if taken and taken[0]:
            connection.commit()  # the lock is the session's, not the transaction's
            return
        process, name = connection.execute(_HOLDER, (key,)).fetchone() or (0, "")
        if name == ours:
            connection.execute("SELECT pg_terminate_backend(%s)", (process,))
        connection.commit()
        if time.monotonic() > end:
            raise held_by(_holder(name), "--storage")
        time.sleep(0.1)


def _holder(application_name: str | None) -> str:
    match (application_name or "").split():
        case ["fmnist-search", process, _, host]:
            return f"process {process} on {host}"
    return "another process"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
