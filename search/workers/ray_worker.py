"""One worker on a node of a Ray cluster, as its actor (relay.py) keeps it."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any

from search import artifacts
from search.errors import SearchError
from search.workers import relay
from search.workers.cgroup import OomKills
from search.workers.protocol import Channel, Message

logger = logging.getLogger("search")

_GONE = 3.0  # seconds for an actor to end its worker, before it is ended itself
_PATHS = ("path", "pictures", "model")  # what tasks call files of the run's folder


class RayWorker:
    """A worker that an actor keeps on some node.

    Args:
        begun: the answer to its `begin`, to come.
        files: that have to be there before it is prepared; more may come.
        oom_kills: of each host, of all its workers.
    """

    def __init__(
        self, ray: Any, actor: Any, begun: Any, files: relay.Files, oom_kills: dict[str, OomKills]
    ):
        ours, self._theirs = socket.socketpair()
        self._ray, self._actor, self._begun = ray, actor, begun
        self._task: Message = {}
        self.channel = _RayChannel(ours, self._send)
        self.pid, self.host, self.log = 0, "the cluster", "its node"  # until it has begun
        self._files, self._oom_kills = files, oom_kills
        self._ended: Message = {}  # as its actor's `end` tells, or as far as is known without
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def was_killed(self) -> bool:
        return bool(self._ended.get("was_killed", True))

    def ran_out_of_memory(self) -> bool:
        """Whether there is evidence that it was killed for memory; ask once, if it was killed."""
        if "oom_kills" in self._ended:
            return self._oom_kills[self.host].has_grown(self._ended["oom_kills"])
        return bool(self._ended.get("out_of_memory"))

    def kill(self) -> None:
        with contextlib.suppress(Exception):  # it is gone, or has never been
            if not self._ended and self.pid:
                self._ended = self._ask("end", timeout=_GONE)
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor, no_restart=True)
        self.channel.close()
        self._thread.join(_GONE)

    def post_mortem(self) -> str:
        return str(self._ended.get("words", "was lost with its actor or node"))

    def _send(self, message: Message) -> None:
        if message["type"] == "start":
            named = {name: Path(message[name]) for name in _PATHS if message.get(name)}
            message = message | {name: str(path.absolute()) for name, path in named.items()}
            self._task = message
        line = json.dumps(message, allow_nan=False).encode()
        files = self._files if message["type"] == "prepare" else {}
        if model := message.get("model"):  # trained elsewhere, perhaps
            try:
                content = Path(model).read_bytes()
                files = {model: (artifacts.sha256(model), self._ray.put(content))}
            except OSError as error:  # not the worker's death, for which OSError stands here
                raise SearchError(f"{model} can't be read: {error}") from None
        try:
            self._actor.send.remote(line, files)
        except self._ray.exceptions.RayError as error:
            raise OSError(str(error)) from error

    def _listen(self) -> None:
        """Carries what the worker says to the coordinator's socket, until there is no more."""
        try:
            begun = self._ray.get(self._begun)
            self._oom_kills.setdefault(begun["host"], OomKills(begun["oom_kills"]))
            self.host, self.log, self.pid = begun["host"], begun["log"], begun["pid"]
            while (data := self._ask("receive")) != b"":
                for line in (data or b"").splitlines(keepends=True):
                    self._theirs.sendall(self._with_files(line))
            self._ended = self._ask("end", timeout=_GONE)
        except self._ray.exceptions.RayActorError:
            pass  # the actor has died: post_mortem says so
        except self._ray.exceptions.OutOfMemoryError:  # before the kernel would have
            self._ended = {"words": "was ended by Ray for memory", "out_of_memory": True}
        except (self._ray.exceptions.RayError, ValueError, OSError) as error:
            logger.debug("a worker's actor: %s", error)
            self._ended = {"words": f"was given up: {one_line(error)}"}
        finally:
            self._theirs.close()

    def _ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        answer = getattr(self._actor, method).remote(*arguments)
        return self._ray.get(answer, timeout=timeout)

    def _with_files(self, line: bytes) -> bytes:
        """What a task has written comes here before it is said that it has finished. Where this
        machine's disk can't hold it the task has failed: trained again, it would be no smaller."""
        message = json.loads(line)
        try:
            self._bring_files(message)
        except SearchError as error:
            stamp = {name: message[name] for name in ("type", "trial", "attempt", "rss")}
            failed = stamp | {"outcome": "error", "reason": str(error), "traceback": ""}
            return json.dumps(failed).encode() + b"\n"
        return line

    def _bring_files(self, message: Message) -> None:
        if message["type"] != "finished" or message.get("outcome") != "complete":
            return
        for path, sha256 in (("path", "sha256"), ("pictures", "pictures_sha256")):
            if self._task.get(path) and message.get(sha256):
                self._bring(self._task[path], message[sha256])

    def _read(self, path: str, start: int) -> bytes:
        """Of a file where the worker is. Raises ValueError: what fails there is not this disk."""
        try:
            piece: bytes = self._ask("read", path, start)
        except (self._ray.exceptions.RayError, OSError) as error:
            raise ValueError(f"{path} can't be read on {self.host}: {error}") from error
        return piece

    def _bring(self, path: str, sha256: str) -> None:
        with artifacts.write_atomically(path) as beside:
            with beside.open("wb") as stream:
                while piece := self._read(path, stream.tell()):
                    stream.write(piece)
            if artifacts.sha256(beside) != sha256:
                raise ValueError(f"{path} came from {self.host} with another hash")


class _RayChannel(Channel):
    """Hears through a socket, as the pool's selector wants it; speaks through the actor."""

    def __init__(self, sock: socket.socket, say: Any):
        super().__init__(sock)
        self._say = say

    def send(self, message: Message) -> None:
        self._say(message)


def one_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).strip()[:300]
