"""Workers on the nodes of a Ray cluster, `pip install '.[ray]'`.

    fmnist-search --study cnn --engine ray --address auto

Ray core actors, one for each worker; what they do is in relay.py. The coordinator, the study and
the run's folder stay with this process. Ray's own transport carries everything: there is no other
port, and so no other way in than Ray's.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from search import artifacts, catalogue
from search.data import datasets, fetching, image_folder
from search.errors import EXIT_USAGE, SearchError
from search.workers import devices, relay
from search.workers.cgroup import OomKills
from search.workers.devices import Device
from search.workers.local import ROOT
from search.workers.protocol import Message
from search.workers.ray_worker import RayWorker, one_line

logger = logging.getLogger("search")

_MAX_STUDY = 10_000_000  # bytes of Python files beside a study's
_REACHABLE = 5.0  # seconds for a connection to a cluster
_ANSWER = 60.0  # seconds for a node's description
_LOOK = 5.0  # seconds between two looks at which nodes there are
_NO_TOKEN = (
    "whoever reaches a Ray cluster without token authentication runs code on it. Start it "
    "and this command with RAY_AUTH_MODE=token, or take --allow-insecure-ray"
)


class RayEngine:
    """Starts workers on a cluster.

    Args:
        folder: of the run.
        study: its file.
        address: of a cluster, as `ray.init` takes it; None for one of this machine alone, which
            ends with the run.
        shared: a folder that every node has; None for none.
        insecure: whether a cluster may be used that asks nobody for a token.

    Raises:
        SearchError: if Ray is absent, the cluster can't be reached or asks for no token, a node
            has other versions, or the folder is not shared.
    """

    has_wide_workers = False  # the cluster has given each actor its cores

    def __init__(
        self,
        folder: Path,
        study: Path,
        *,
        address: str | None = None,
        shared: Path | None = None,
        insecure: bool = False,
    ):
        self._ray = _joined(address, insecure)
        groups = {"in": 1, "out": 1, "end": 1}
        self._relay = self._ray.remote(concurrency_groups=groups)(relay.Relay)
        self._folder, self._study = str(folder.absolute()), study
        name = f"{socket.gethostname()}:{self._folder}"
        self._run = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._share = {"num_cpus": 1.0, "num_gpus": 0.0}  # of each worker
        self._device, self._num_workers = Device(1), 0
        # What workers are counted by, now and later, and how many there are for each.
        self._counted, self._per_counted = "", 1
        self._home = str(fetching.keras_datasets().parent.absolute())
        self._files: relay.Files = {}  # that workers read
        self._study_files = self._put(_contents(_beside(study)))
        self._shared = None if shared is None else Path(shared).absolute()
        self._insecure = insecure or address is None
        self._word = secrets.token_hex(8)  # written into the shared folder
        self._versions = relay.versions()
        self._asked: dict[str, Any] = {}  # nodes -> their descriptions, to come
        self._fit: set[str] = set()  # nodes that can be used
        self._unfit: set[str] = set()
        self._oom_kills: dict[str, OomKills] = {}  # by host
        self._looked = time.monotonic()
        try:
            self._ask(self._newcomers())
            for node in list(self._asked):
                self._judge(node)
        except BaseException:
            self._clear_shared()
            self._ray.shutdown()
            raise

    def devices(self, workers: str, per_gpu: int = 1) -> list[Device]:
        gpus, cpus = self._total("GPU"), self._total("CPU")
        if workers != "auto" and not (workers.isdecimal() and int(workers)):
            raise SearchError(
                f"--workers is auto or a number above 0. Received: {workers!r}",
                exit_code=EXIT_USAGE,
            )
        if not (gpus or cpus):
            raise SearchError("the cluster has neither GPU nor CPU to give to a worker")
        devices.check_per_gpu(workers, per_gpu, gpus)
        count = int(workers) if workers != "auto" else gpus * per_gpu or cpus
        if not gpus:
            logger.info("the cluster has no GPU: workers run on its %d cores", cpus)
        # More workers than GPUs share them; more than cores, too.
        self._share = {
            "num_gpus": _fraction(gpus, count) if gpus else 0.0,
            "num_cpus": 0.0 if gpus else _cores_each(self._each("CPU"), count),
        }
        threads = max(1, cpus // max(count, gpus or 1))
        if not gpus:
            threads = max(1, int(self._share["num_cpus"]))
        if workers == "auto":
            self._counted, self._per_counted = ("GPU", per_gpu) if gpus else ("CPU", 1)
        # Those that share a GPU share its memory as they come, as Ray has it.
        beside = 1  # on the largest node, at most
        if not gpus:
            beside = min(count, int(max(self._each("CPU")) / (self._share["num_cpus"] or 1)))
        gpu = "of the cluster" if gpus else None
        self._device, self._num_workers = Device(threads, gpu, max(1, beside)), count
        return [self._device] * count

    def joined(self) -> list[Device]:
        if time.monotonic() < self._looked + _LOOK:
            return []
        self._looked = time.monotonic()
        newcomers = self._newcomers()
        try:
            self._ask(newcomers)
        except SearchError as error:
            self._unfit |= newcomers
            logger.warning("%s; a node that has joined is not used", error)
        for node, answer in list(self._asked.items()):
            if not self._ray.wait([answer], timeout=0)[0]:
                continue
            try:
                self._judge(node)
            except SearchError as error:
                self._unfit.add(node)
                logger.warning("%s; it is not used", error)
        most = self._total(self._counted) * self._per_counted if self._counted else 0
        added = max(0, most - self._num_workers)
        if added:
            logger.info("nodes have joined: %d more worker%s", added, "" if added == 1 else "s")
        self._num_workers += added
        return [self._device] * added

    def provide(self, settings: Message) -> Message:
        reference = "" if settings.get("kind") == "objective" else settings.get("dataset", "")
        contents = {}
        if reference in datasets.DATASETS:
            contents = _contents(datasets.files_of(datasets.DATASETS[reference]))
        elif os.path.isdir(reference):
            settings = settings | {"dataset": f"{reference}.npz"}
            contents = {settings["dataset"]: image_folder.packed(Path(reference))}
        elif reference:
            contents = _contents([Path(reference)])
        if settings.get("weights") and os.path.isfile(settings["weights"]):
            contents |= _contents([Path(settings["weights"])])
        self._files |= self._put(contents)
        return settings

    def start(self, device: Device, slot: int) -> RayWorker:
        options = self._relay.options(**self._share, **self._elsewhere())
        actor = options.remote(self._run, self._folder, str(ROOT))
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        begun = actor.begin.remote(
            slot, device, self._home, backend, self._study_files, self._versions
        )
        return RayWorker(self._ray, actor, begun, self._files, self._oom_kills)

    def close(self) -> None:
        self._clear_shared()
        with contextlib.suppress(Exception):  # a node that is gone has forgotten
            forgotten = [self._call(node, relay.forget, self._run) for node in self._alive()]
            self._ray.get(forgotten, timeout=10)
        self._ray.shutdown()

    def _put(self, contents: dict[str, bytes]) -> relay.Files:
        """Into the object store, from which a node takes each once."""
        return {
            path: (hashlib.sha256(content).hexdigest(), self._ray.put(content))
            for path, content in contents.items()
        }

    def _elsewhere(self) -> dict[str, Any]:
        """An actor's option that keeps it away from nodes that can't be used."""
        nodes = ", ".join(sorted(self._unfit))
        return {"label_selector": {"ray.io/node-id": f"!in({nodes})"}} if nodes else {}

    def _alive(self) -> dict[str, dict[str, float]]:
        """Nodes and what each has."""
        return {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}

    def _each(self, resource: str) -> list[int]:
        """What the nodes have that can be used and have any."""
        nodes = self._alive()
        found = (int(nodes[node].get(resource, 0)) for node in nodes.keys() & self._fit)
        return [count for count in found if count]

    def _total(self, resource: str) -> int:
        return sum(self._each(resource))

    def _call(self, node: str, function: Any, *arguments: Any) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node, soft=False)
        call = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)
        return call.remote(*arguments)

    def _newcomers(self) -> set[str]:
        return self._alive().keys() - self._asked.keys() - self._fit - self._unfit

    def _ask(self, nodes: set[str]) -> None:
        """Have them describe themselves.

        Raises:
            SearchError: if the shared folder can't be written.
        """
        if nodes and self._shared:
            artifacts.write_text(self._shared / f".{self._word}", self._word)
        for node in nodes:
            folder = str(self._shared or "")
            self._asked[node] = self._call(node, relay.describe, folder, self._word, node)

    def _judge(self, node: str) -> None:
        """Read its description.

        Raises:
            SearchError: if it can't be used; the message says why.
        """
        try:
            found = self._ray.get(self._asked.pop(node), timeout=_ANSWER)
            # By its name: a network folder's listing may be a minute old.
            answer = self._shared and os.path.isfile(self._shared / f".{self._word}.{node}")
        except self._ray.exceptions.RayError as error:
            if node not in self._alive():  # a cluster notices late that one has gone
                logger.warning("a node of the cluster left before it could be asked")
                return
            raise SearchError(
                f"a node of the cluster can't run this project ({one_line(error)}); install "
                "fmnist-search there, with the same versions as here"
            ) from None
        finally:
            if not self._asked:
                self._clear_shared()
        host = found["host"]
        if not (found["has_token"] or self._insecure):
            raise SearchError(f"node {host} asks for no token: {_NO_TOKEN}", exit_code=EXIT_USAGE)
        if differing := relay.differences(self._versions, found["versions"]):
            raise SearchError(f"node {host} has other versions than this one: {differing}")
        if self._shared and found["word"] != self._word:
            raise SearchError(
                f"--shared {self._shared} is not shared: node {host} does not find there "
                "what was written here",
                exit_code=EXIT_USAGE,
            )
        if self._shared and not answer:
            raise SearchError(
                f"--shared {self._shared} is not shared: what node {host} wrote there is not "
                "found here",
                exit_code=EXIT_USAGE,
            )
        self._fit.add(node)

    def _clear_shared(self) -> None:
        with contextlib.suppress(OSError):  # a network folder may be away
            for left in self._shared.glob(f".{self._word}*") if self._shared else ():
                left.unlink(missing_ok=True)


def _joined(address: str | None, insecure: bool) -> Any:
    """Ray, connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise SearchError("--engine ray needs Ray: pip install '.[ray]'") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init(
            "local",
            num_cpus=devices.cores(),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _system_config={"worker_niceness": 0},  # Ray's is 15: behind all else on this machine
            **quiet,
        )
        return ray
    if not (insecure or relay.asks_for_token()):
        raise SearchError(_NO_TOKEN, exit_code=EXIT_USAGE)
    _refuse_unreachable(address)
    try:
        ray.init(address, **quiet)
    except Exception as error:  # ConnectionError, RuntimeError for versions, gRPC's own
        raise SearchError(
            f"the Ray cluster at --address {address!r} can't be joined: {one_line(error)}"
        ) from None
    return ray


def _refuse_unreachable(address: str) -> None:
    """Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    try:
        with socket.create_connection((host, int(port)), _REACHABLE):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise SearchError(
            f"--address is auto, HOST:PORT or ray://HOST:PORT of a cluster that runs. "
            f"Received: {address!r} ({getattr(error, 'strerror', None) or error})",
            exit_code=EXIT_USAGE,
        ) from None


def _fraction(available: int, count: int) -> float:
    """Of a resource for each of so many workers: 1/K, so that K fit on each GPU, wherever it is;
    rounded down as Ray counts."""
    return int(10_000 / math.ceil(count / available)) / 10_000


def _cores_each(nodes: list[int], count: int) -> float:
    """Of the cores of these nodes for each of so many workers: as many as let all of them run at
    once, and one of them on whichever node is left."""
    if count > sum(nodes):
        return _fraction(sum(nodes), count)
    most = min(sum(nodes) // count, *nodes)
    fits = (each for each in range(most, 0, -1) if sum(node // each for node in nodes) >= count)
    return float(next(fits))


def _beside(study: Path) -> list[Path]:
    """A study's file and the Python files that it may import from its folder."""
    if catalogue.is_installed(study):
        return []
    files = [study, *(file for file in sorted(study.parent.glob("*.py")) if file != study)]
    return files if sum(file.stat().st_size for file in files) < _MAX_STUDY else [study]


def _contents(files: list[Path]) -> dict[str, bytes]:
    return {str(file.absolute()): file.read_bytes() for file in files}
