"""The command line, killed by its own SIGKILL right after its n-th transaction that wrote.

    python -m tests.killed N --study tests/dummy.py --trials 4

Stands at the process's border, where Python's sqlite3 connects: SQLite does what it always does,
and then the power goes.
"""

import os
import signal
import sqlite3
import sys
from sqlite3 import dbapi2


def main():
    fatal = int(sys.argv.pop(1))
    done = 0

    class Connection(sqlite3.Connection):
        def commit(self):
            nonlocal done
            done += self.in_transaction
            super().commit()
            if done == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    connect = dbapi2.connect
    dbapi2.connect = lambda *args, **named: connect(*args, **{"factory": Connection, **named})
    from search.cli import main as command_line

    command_line()


main()
