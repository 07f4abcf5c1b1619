"""The command line, whose calls to SQLite fail.

    python -m tests.failing --study tests/dummy.py --trials 5

One transaction in five fails, by chance: before it has done anything, or after it was done, so that
only its answer is lost. Stands at the process's border, where Python's sqlite3 connects.
"""

import random
import sqlite3
from sqlite3 import dbapi2


class Connection(sqlite3.Connection):
    """Some of its commits fail."""

    when = None  # "before" or "after" it was done; None for either
    only = None  # the number of the one commit that fails; None for one in five
    count = 0  # commits so far, of all connections
    chance = random.Random(7)

    def commit(self):
        Connection.count += 1
        # Opening is a dozen in one call, which would begin again at each.
        fails = self.chance.random() < 0.2 and Connection.count > 20
        if self.only:
            fails = Connection.count == self.only
        when = self.when or self.chance.choice(("before", "after"))
        if fails and when == "before":
            raise busy()
        super().commit()
        if fails:
            raise busy()


def busy():
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


def install(when=None, only=None):
    """Let the transactions of this process fail from now on."""
    Connection.when, Connection.only, Connection.count = when, only, 0
    connect = sqlite3.connect

    def failing(*arguments, **named):
        return connect(*arguments, **{"factory": Connection, **named})

    dbapi2.connect = failing


if __name__ == "__main__":
    install()
    from search.cli import main

    main()
