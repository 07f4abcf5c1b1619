"""What runs on a cluster's node: an actor that starts a worker process and carries its words.

The worker is the one of a local search, `python -m search.workers.worker` on a socket pair. Paths
of the driver's that a message names lie below a folder of the node's own, `<node folder>/<path>`;
files come there from Ray's object store once, or are linked where the node has the same file.
Checkpoints alone lie where the driver says: in the folder that all nodes share.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search import folders, provenance
from search.workers import cgroup
from search.workers.devices import Device
from search.workers.local import ROOT, LocalEngine, LocalWorker

CHUNK = 4 << 20  # bytes of a file in one message
_PACKAGES = ("search", "spaces", "studies")  # installed on each node
_PATIENCE = 20.0  # seconds until a worker that is silent is asked for again
_SHARED = ("checkpoint", "checkpoints")  # a message's names for what is not translated
Files = dict[str, tuple[str, Any]]  # the driver's path -> SHA-256, reference of the content


def versions() -> dict[str, str]:
    """This machine's, which have to be those of all others."""
    return provenance.versions() | {"code": _code()}


def differences(here: dict[str, str], there: dict[str, str]) -> str:
    """Two machines' versions where they are not the same; nothing where all are."""
    return ", ".join(
        f"{name} {there.get(name, 'absent')} (here {here.get(name, 'absent')})"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    )


def describe(shared: str, word: str, node: str) -> dict[str, Any]:
    """This node's versions, whether it asks for tokens, what it finds in a shared folder.

    Args:
        shared: the folder, in which the driver has written `word` into a file; or "".
        node: its name in the cluster: the answer in the shared folder bears it.
    """
    found = ""
    if shared:
        with_word = Path(shared) / f".{word}"
        with contextlib.suppress(OSError):  # what is missing on either side tells
            found = with_word.read_text()
            with_word.with_suffix(f".{node}").write_text(found)
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "has_token": asks_for_token(),
        "word": found,
    }


def asks_for_token() -> bool:
    """Whether this process, and so the node's Ray that has started it, refuses who has none."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def forget(run: str) -> None:
    """Remove what a run has left on this node."""
    shutil.rmtree(_node_folder(run), ignore_errors=True)


def _group(name: str) -> Any:
    """Marks a method that runs beside those of other groups; ray:// takes no group with a call."""
    try:
        from ray import method
    except ImportError:  # the engine says so
        return lambda function: function
    return method(concurrency_group=name)


class Relay:
    """One worker of a run, on this node.

    Args:
        run: its name among all runs of this user on this node.
        folder: of the run, on the driver.
        root: of the package, on the driver.
    """

    def __init__(self, run: str, folder: str, root: str):
        self._node = _node_folder(run)
        self._folder = folder
        self._installed = tuple(f"{root}/{package}/" for package in _PACKAGES)
        self._mapped = {root: str(ROOT)}  # the driver's prefix -> this node's
        self._begun = threading.Event()
        self._worker: LocalWorker | None = None
        self._unread = b""
        self._failure = ""  # why a message could not be passed on

    def begin(
        self,
        slot: int,
        device: Device,
        home: str,
        backend: str,
        files: Files,
        driver: dict[str, str],
    ) -> Any:
        """Start the worker; its process, its host, and how often that has killed for memory.

        Args:
            home: the driver's KERAS_HOME.
            backend: of Keras.
            files: of the study.
            driver: its versions. This node may have joined a moment ago, and not been asked yet.
        """
        if differing := differences(driver, versions()):
            raise RuntimeError(f"{socket.gethostname()} has other versions: {differing}")
        os.umask(folders.PRIVATE)
        self._node.mkdir(parents=True, exist_ok=True)
        if self._node.parent.stat().st_uid != os.getuid():
            raise PermissionError(f"{self._node.parent} belongs to another user; remove it")
        self._mapped[self._folder] = self._own(self._folder)
        self._place(files)
        # Ray has chosen the GPU, and says so where a local engine does.
        if device.gpu is not None:
            device = Device(device.threads, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        os.environ |= {"KERAS_HOME": self._own(home), "KERAS_BACKEND": backend}
        self._mapped[home] = self._own(home)
        logs = Path(self._own(self._folder)) / "logs" / str(os.getpid())
        self._worker = LocalEngine(logs).start(device, slot)
        self._begun.set()
        host = socket.gethostname()
        return {
            "pid": self._worker.pid,
            "host": host,
            "log": f"{host}:{self._worker.log}",
            "oom_kills": cgroup.oom_kills(),
        }

    @_group("in")
    def send(self, line: bytes, files: Files) -> None:
        """Pass a message on, once the files that it speaks of are here."""
        self._begun.wait()
        assert self._worker is not None
        try:
            self._place(files)
        except Exception as error:  # nobody waits for this call's end: the worker's has to say it
            self._failure = f"could not be given its files: {type(error).__name__}: {error}"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    self._worker.pid, signal.SIGKILL
                )  # `receive` reads its end, then `end` asks
            return
        try:
            self._worker.channel.send(self._translated(json.loads(line)))
        except OSError:
            return  # it has died: `receive` says so

    @_group("out")
    def receive(self) -> bytes | None:
        """Whole lines of what the worker has said; None if nothing for a while, b"" at its end."""
        assert self._worker is not None
        channel = self._worker.channel
        while True:
            if not channel.is_readable(_PATIENCE):
                return None
            try:
                data = os.read(channel.fileno(), 1 << 20)
            except OSError:
                data = b""
            whole, found, rest = (self._unread + data).rpartition(b"\n")
            if not data:
                return b""
            self._unread = rest
            if found:
                return whole + found

    @_group("end")
    def end(self) -> dict[str, Any]:
        """End the worker and what it has started; whether it was killed, its last words, and how
        often its host has now killed for memory."""
        if self._worker is None:
            return {"was_killed": True, "words": "had not begun"}
        self._worker.kill()
        return {
            "was_killed": not self._failure and self._worker.was_killed(),
            "words": self._failure or self._worker.post_mortem(),
            "oom_kills": cgroup.oom_kills(),
        }

    @_group("out")
    def read(self, path: str, offset: int) -> bytes:
        """A piece of a file that the worker has written, under the driver's name for it."""
        with open(self._translated(path), "rb") as stream:
            stream.seek(offset)
            return stream.read(CHUNK)

    def _translated(self, value: Any) -> Any:
        """A message with this node's paths in the place of the driver's."""
        match value:
            case dict():
                return {
                    name: inner if name in _SHARED else self._translated(inner)
                    for name, inner in value.items()
                }
            case list():
                return [self._translated(inner) for inner in value]
            case str():
                for theirs in sorted(self._mapped, key=len, reverse=True):
                    if value == theirs or value.startswith(theirs + os.sep):
                        return self._mapped[theirs] + value.removeprefix(theirs)
        return value

    def _own(self, path: str) -> str:
        if not os.path.isabs(path):
            raise ValueError(f"paths of the driver's are absolute. Received: {path!r}")
        return f"{self._node}{os.path.normpath(path)}"  # ".." might lead out of the folder

    def _place(self, files: Files) -> None:
        """Have these files here, each once for all workers of the node."""
        for path, (sha256, reference) in files.items():
            if path.startswith(self._installed):
                continue
            self._mapped.setdefault(path, self._own(path))
            place = Path(self._own(path))
            place.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self._node):
                if _sha256(place) == sha256:
                    continue
                place.unlink(missing_ok=True)
                if _sha256(Path(path)) == sha256:
                    place.symlink_to(path)
                    continue
                import ray

                beside = place.with_name(f".{place.name}.partial")
                content: Any = ray.get(reference)
                beside.write_bytes(content)
                os.replace(beside, place)


def _node_folder(run: str) -> Path:
    return Path(tempfile.gettempdir()) / f"fmnist-search-{os.getuid()}" / run


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def _code() -> str:
    """A hash of this project's own code: an older checkout has the same version."""
    digest = hashlib.sha256()
    for folder in _PACKAGES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
