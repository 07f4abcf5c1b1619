"""The command in a real pseudo-terminal, and what a screen of that size shows of it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLEARED = "\x1b[2J"  # what the live view writes when the terminal's width has changed


class Terminal:
    """The command in a pseudo-terminal, and what a screen of that size shows of it."""

    def __init__(self, *arguments: str, columns: int, lines: int = 24, **environment: str):
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        # These would stand for the terminal's own size; pytest-xdist sets them in its processes.
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "search", *arguments],
            cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**inherited, "TERM": "xterm-256color", **environment},
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def resize(self, columns: int, lines: int = 24) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self, seconds: float = 60, until: str | None = None) -> str:
        """What comes until then, or until the text has come, or until the end."""
        begun, end = len(self.text), time.monotonic() + seconds
        while time.monotonic() < end:
            if not select.select([self._master], [], [], 0.1)[0]:
                continue
            try:
                self.text += os.read(self._master, 65_536).decode(errors="replace")
            except OSError:  # its last writer has gone
                break
            if until is not None and until in self.text[begun:]:
                break
        return self.text[begun:]

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)


def frames(text: str) -> list[str]:
    """Lines as they were written, without colours and cursor movements."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
