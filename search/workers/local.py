"""Workers as processes of this machine, each in its own session, joined by a socket pair."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from search import folders
from search.errors import SearchError
from search.workers import cgroup
from search.workers.devices import Device, share_out
from search.workers.protocol import Channel, Message

ROOT = Path(__file__).parents[2]  # the folder that holds the package, installed or checked out
_TAIL_BYTES = 2000
# Workers never see the storage, nor what opens it.
NOT_A_WORKER_S = {"PGPASSWORD", "PGPASSFILE"}


@dataclass
class LocalWorker:
    """A running worker process."""

    channel: Channel
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int  # bytes of the log that earlier workers wrote
    oom_kills: cgroup.OomKills  # of all workers of the engine

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def host(self) -> str:
        return socket.gethostname()

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def was_killed(self) -> bool:
        """Whether a signal ended it; call after `kill`, which does not change how it ended."""
        return self.process.returncode < 0

    def ran_out_of_memory(self) -> bool:
        """Whether there is evidence that it was killed for memory; ask once, if it was killed."""
        return self.oom_kills.has_grown(cgroup.oom_kills())

    def kill(self) -> None:
        """End it now, whatever it does, and what it has started; returns when it is gone."""
        # It leads a session of its own. macOS refuses where all that is left of it has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()

    def post_mortem(self) -> str:
        """How it ended and the last lines that it wrote; call after `kill`."""
        code = self.process.returncode
        how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        try:
            with self.log.open("rb") as log:
                log.seek(max(self.log_start, self.log.stat().st_size - _TAIL_BYTES))
                last = log.read().decode(errors="replace").strip().splitlines()[-5:]
        except OSError:  # somebody has cleaned up; that ends no search
            last = []
        return "\n".join([how, *last])


class LocalEngine:
    """Starts workers here.

    Args:
        log_folder: each slot's workers write what they print to `worker-<slot>.log` in it.
    """

    has_wide_workers = True

    def __init__(self, log_folder: Path):
        self._log_folder = log_folder
        self._oom_kills = cgroup.OomKills(cgroup.oom_kills())

    def devices(self, workers: str, per_gpu: int = 1) -> list[Device]:
        return share_out(workers, per_gpu)

    def joined(self) -> list[Device]:
        return []

    def provide(self, settings: Message) -> Message:
        return settings  # what workers read is on this machine

    def close(self) -> None:
        """Workers are the pool's to end."""

    def start(self, device: Device, slot: int) -> LocalWorker:
        try:
            return self._start(device, slot)
        except OSError as error:
            raise SearchError(
                f"no worker can be started: {error}. Free what lacks (memory, processes, open "
                "files or room on the disk); the same command goes on"
            ) from None

    def _start(self, device: Device, slot: int) -> LocalWorker:
        ours, theirs = socket.socketpair()
        path = self._log_folder / f"worker-{slot}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with theirs, path.open("ab") as log:
            process = subprocess.Popen(
                # -P: the user's folder may hold a search.py of its own.
                [sys.executable, "-P", "-m", "search.workers.worker", str(theirs.fileno())],
                env=environment(device),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Out of the terminal's reach: Ctrl-C is the coordinator's to answer.
                start_new_session=True,
                umask=folders.PRIVATE,
            )
            return LocalWorker(Channel(ours), process, path, log.tell(), self._oom_kills)


def environment(device: Device) -> dict[str, str]:
    """Of a worker on this device."""
    return {
        **{name: os.environ[name] for name in os.environ.keys() - NOT_A_WORKER_S},
        **device.environment(),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
