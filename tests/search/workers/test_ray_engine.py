"""The engine on a Ray that is made up: what real clusters are too slow or too well for."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from search.workers import ray as ray_engine
from search.workers import relay
from tests.command import ROOT

exceptions = pytest.importorskip("ray.exceptions", reason="pip install '.[ray]' brings Ray")
NODES = ["a" * 56, "b" * 56]
BEGUN = {"pid": 7, "host": "there", "log": "there:worker.log", "oom_kills": 3}


class Actor:
    """Its methods answer with what `says` holds of them, one after the other."""

    def __init__(self, says):
        self._says = says
        self.sent = []

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments: self._call(method, *arguments))

    def _call(self, method, *arguments):
        if method == "send":
            self.sent.append(json.loads(arguments[0]))
        answers = self._says.get(method, [None])
        return answers.pop(0) if len(answers) > 1 else answers[0]


class Ray:
    """A cluster whose nodes are this process; an answer that is an exception is raised."""

    exceptions = exceptions

    def __init__(self, says):
        self.num_nodes = 1
        self.has = {"CPU": 2}  # each node
        self.actor = Actor(says)
        self.options = []  # of each actor
        self.num_classes = 0

    def nodes(self):
        names = NODES[: self.num_nodes]
        return [{"NodeID": name, "Alive": True, "Resources": self.has} for name in names]

    def put(self, content):
        return content

    def remote(self, **_):
        def decorate(function):
            if function is not relay.Relay:
                return SimpleNamespace(remote=function)
            self.num_classes += 1
            return SimpleNamespace(options=self._started)

        return decorate

    def _started(self, **options):
        self.options.append(options)
        return SimpleNamespace(remote=lambda *_: self.actor)

    def wait(self, answers, timeout):
        return answers, []

    def get(self, answer, timeout=None):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, actor, no_restart):
        pass

    def shutdown(self):
        pass


@pytest.fixture
def make(tmp_path, monkeypatch):
    """An engine, and the Ray whose actors say this."""

    def make(**says):
        ray = Ray(says)
        monkeypatch.setattr(ray_engine, "_joined", lambda *_: ray)
        monkeypatch.setattr(ray_engine, "_LOOK", 0)
        (tmp_path / "shared").mkdir()
        engine = ray_engine.RayEngine(
            tmp_path / "run", ROOT / "tests/dummy.py", shared=tmp_path / "shared"
        )
        return engine, ray

    return make


def lost(engine):
    """A worker that has ended."""
    worker = engine.start(engine.devices("1")[0], 0)
    worker._thread.join(10)
    worker.kill()
    return worker


def test_a_node_that_joins_when_nothing_can_be_shared_is_left_out(make, tmp_path, caplog):
    engine, ray = make(begin=[BEGUN], receive=[b""], end=[{}])
    shutil.rmtree(tmp_path / "shared")
    (tmp_path / "shared").write_text("no folder")
    ray.num_nodes = 2
    with caplog.at_level(logging.WARNING, "search"):
        assert engine.joined() == engine.joined() == []
    assert caplog.text.count("could not be written") == 1
    lost(engine)
    assert ray.options[0]["label_selector"] == {"ray.io/node-id": f"!in({NODES[1]})"}


def test_workers_share_gpus_also_those_of_nodes_that_join(make):
    engine, ray = make(begin=[BEGUN], receive=[b""], end=[{}])
    ray.has = {"CPU": 8, "GPU": 2}
    found = engine.devices("auto", 2)
    assert len(found) == 4
    engine.start(found[0], 0).kill()
    assert ray.options[0]["num_gpus"] == 0.5
    ray.num_nodes = 2
    assert len(engine.joined()) == 4


def test_all_workers_are_actors_of_one_class(make):
    engine, ray = make(begin=[BEGUN], receive=[b""], end=[{}])
    for _ in range(3):
        lost(engine)
    assert (len(ray.options), ray.num_classes) == (3, 1)


def test_a_task_s_relative_paths_are_sent_as_absolute_ones(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.keras").write_bytes(b"model")
    engine, ray = make(begin=[BEGUN], receive=[b""], end=[{}])
    worker = engine.start(engine.devices("1")[0], 0)
    task = {"type": "start", "model": "m.keras", "path": "run/e.npz", "pictures": None}
    worker.channel.send(task)
    worker.kill()
    (sent,) = ray.actor.sent
    assert sent["model"] == str(tmp_path / "m.keras")
    assert sent["path"] == str(tmp_path / "run/e.npz")
    assert (sent["pictures"], task["path"]) == (None, "run/e.npz")


def finishing(make, path, read):
    """A worker whose task has ended, and written a file where it is."""
    sha256 = hashlib.sha256(b"model").hexdigest()
    stamp = {"type": "finished", "trial": 4, "attempt": 1, "rss": 1}
    line = json.dumps(stamp | {"outcome": "complete", "sha256": sha256}).encode() + b"\n"
    says = {"begin": [BEGUN], "receive": [None], "end": [{}], "read": read}
    engine, _ = make(**says)
    worker = engine.start(engine.devices("1")[0], 0)
    worker.channel.send({"type": "start", "path": str(path), "pictures": None})
    says["receive"][:] = [line, b""]
    worker._thread.join(10)
    return worker


def test_what_a_task_has_written_comes_before_it_has_finished(make, tmp_path):
    worker = finishing(make, tmp_path / "m.keras", [b"mod", b"el", b""])
    (message,) = worker.channel.receive()
    worker.kill()
    assert message["outcome"] == "complete"
    assert (tmp_path / "m.keras").read_bytes() == b"model"


def test_a_disk_that_cannot_take_it_ends_the_task_and_no_worker(make, tmp_path):
    (tmp_path / "file").touch()
    worker = finishing(make, tmp_path / "file" / "m.keras", [b"model", b""])
    (message,) = worker.channel.receive()
    worker.kill()
    assert (message["trial"], message["outcome"]) == (4, "error")
    assert f"{tmp_path}/file" in message["reason"]


@pytest.mark.parametrize("read", [[OSError("gone")], [b"another", b""]])
def test_a_file_that_does_not_come_whole_costs_the_worker(make, tmp_path, read):
    worker = finishing(make, tmp_path / "m.keras", read)
    with pytest.raises(EOFError):
        worker.channel.receive()
    worker.kill()
    assert "was given up: " in worker.post_mortem()
    assert not (tmp_path / "m.keras").exists()


def test_a_kill_for_memory_counts_once_on_its_host(make):
    end = {"was_killed": True, "words": "ended by signal 9"}
    engine, _ = make(
        begin=[BEGUN, BEGUN, BEGUN, BEGUN | {"host": "elsewhere"}],
        receive=[b""],
        end=[end | {"oom_kills": count} for count in (3, 4, 4, 3)],
    )
    workers = [lost(engine) for _ in range(4)]
    assert all(worker.was_killed() for worker in workers)
    assert [worker.ran_out_of_memory() for worker in workers] == [False, True, False, False]


@pytest.mark.parametrize(
    ("error", "has_evidence", "words"),
    [
        (exceptions.OutOfMemoryError("low"), True, "was ended by Ray for memory"),
        (exceptions.ActorDiedError(), False, "was lost with its actor or node"),
        (OSError("no"), False, "was given up: no"),
    ],
)
def test_what_is_known_of_a_worker_whose_actor_has_died(make, error, has_evidence, words):
    engine, _ = make(begin=[BEGUN], receive=[error], end=[exceptions.ActorDiedError()])
    worker = lost(engine)
    assert worker.was_killed()
    assert (worker.ran_out_of_memory(), worker.post_mortem()) == (has_evidence, words)
