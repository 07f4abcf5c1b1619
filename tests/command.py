"""The command line on the dummy study, in a folder of its own: what the fault tests start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from search.storage import storage
from tests import dummy, invariants

ROOT = Path(__file__).parents[1]
_STARTED: list[tuple[subprocess.Popen, Path]] = []  # with the folders of their runs


def end_started() -> None:
    """What a failed test has left running would slow the next ones."""
    for process, folder in _STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            for worker in invariants.workers_of(folder):
                worker.kill()
    _STARTED.clear()


class Command:
    """The same command, as often as it takes.

    Args:
        folder: the run goes below it, and the dummy's log.
        prefix: words before the command, such as a wrapper that sets limits.
        url: of the storage; None for the file in the run's folder.
        environment: more of it.
    """

    def __init__(self, folder: Path, *, prefix: tuple[str, ...] = (), url: str | None = None,
                 **environment: str):  # fmt: skip
        self.folder = folder / "run"
        self.log = folder / "dummy.log"
        self._prefix = prefix
        self._url = url
        self._environment = {**os.environ, "DUMMY_LOG": str(self.log), **environment}

    def start(self, *arguments: str, program: tuple[str, ...] = ("search",)):
        process = subprocess.Popen(
            [*self._prefix, sys.executable, "-m", *program, "--study", str(Path(dummy.__file__)),
             "--out", str(self.folder), *(["--storage", self._url] if self._url else []),
             *arguments],
            cwd=ROOT, env=self._environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        _STARTED.append((process, self.folder))
        return process

    def start_slowly(self, *arguments: str, seconds: float = 1.0) -> subprocess.Popen:
        """It runs, a report has been answered, and more work is left than a test needs to disturb
        it, until `hurry` is called."""
        self.slow_down(seconds)
        process = self.start(*arguments)
        self.wait_for_report()
        assert process.poll() is None, process.stdout.read()
        return process

    def slow_down(self, seconds: float = 1.0) -> None:
        """Between two reports at most, also of trials that run already."""
        self._sleep.write_text(str(seconds))

    def hurry(self) -> None:
        self._sleep.unlink(missing_ok=True)

    @property
    def _sleep(self) -> Path:
        return self.log.with_name(f"{self.log.name}.sleep")

    def run(self, *arguments: str, program: tuple[str, ...] = ("search",)) -> tuple[int, str]:
        process = self.start(*arguments, program=program)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def study(self):
        return storage.read_study(storage.url_in(self.folder, self._url), "dummy")

    def entries(self, event: str) -> list[dict]:
        """Of the dummy's log."""
        found = map(json.loads, self.log.read_text().splitlines())
        return [entry for entry in found if entry["event"] == event]

    def wait_for_worker(self) -> None:
        self._wait(lambda: invariants.workers_of(self.folder))

    def wait_for_report(self) -> None:
        self._wait(lambda: self.log.exists() and '"answer"' in self.log.read_text())

    def _wait(self, condition, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)
