"""What a cluster's engine does that needs no Ray: comparing nodes, placing files, sharing GPUs."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from search.workers import relay
from search.workers.devices import Device
from search.workers.ray import _cores_each, _fraction


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"keras": "3.1", "numpy": "2.0"}, ""),
        ({"keras": "3.2", "numpy": "2.0"}, "keras 3.2 (here 3.1)"),
        ({"keras": "3.1"}, "numpy absent (here 2.0)"),
        ({"keras": "3.1", "numpy": "2.0", "optuna": "5"}, "optuna 5 (here absent)"),
        ({}, "keras absent (here 3.1), numpy absent (here 2.0)"),
    ],
)
def test_versions_that_differ(there, words):
    assert relay.differences({"keras": "3.1", "numpy": "2.0"}, there) == words


def test_a_node_that_can_only_read_leaves_no_answer(tmp_path, monkeypatch):
    (tmp_path / ".word").write_text("word")
    monkeypatch.setattr(Path, "write_text", lambda *_: os.open(tmp_path, os.O_WRONLY))  # OSError
    assert relay.describe(str(tmp_path), "word", "node")["word"] == "word"
    assert [path.name for path in tmp_path.iterdir()] == [".word"]


def test_a_file_comes_to_a_node_once(tmp_path, monkeypatch):
    """Whatever the number of its workers; not at all where it is the same already."""
    fetched = []
    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(get=lambda content: fetched.append(1) or content)
    )
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    there, elsewhere = str(tmp_path / "same.npz"), "/of/the/driver/data.npz"
    Path(there).write_bytes(b"same")
    contents = {there: b"same", elsewhere: b"content"}
    files = {path: (hashlib.sha256(data).hexdigest(), data) for path, data in contents.items()}
    for _ in range(3):
        node = relay.Relay("run", "/of/the/driver/run", "/of/the/driver/package")
        node._node.mkdir(parents=True, exist_ok=True)
        node._place(files)
        for path, content in contents.items():
            assert Path(node._translated(path)).read_bytes() == content
    assert len(fetched) == 1


def test_what_lies_beside_the_package_is_brought_too(tmp_path, monkeypatch):
    """In a checkout the package's root is the user's folder, with data and runs."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda content: content))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    node = relay.Relay("run", "/checkout/runs/mine", "/checkout")
    node._node.mkdir(parents=True)
    files = {"/checkout/photos.npz": b"data", "/checkout/runs/mine/models/m.keras": b"model"}
    node._place({path: (hashlib.sha256(data).hexdigest(), data) for path, data in files.items()})
    for path, content in files.items():
        assert Path(node._translated(path)).read_bytes() == content
    node._place({"/checkout/studies/cnn.py": ("0" * 64, None)})  # each node has its own
    assert node._translated("/checkout/studies/cnn.py") == str(relay.ROOT / "studies/cnn.py")


def test_a_message_whose_files_cannot_be_placed_ends_the_worker_and_says_why(tmp_path, monkeypatch):
    """Nobody waits for the call that passes it on: unsaid, the run would wait for ever."""

    def lost(reference):
        raise OSError("no space left on device")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lost))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / "run"
    node = relay.Relay("run", str(folder), "/elsewhere")
    for name in ("KERAS_HOME", "KERAS_BACKEND"):  # the node's process is this one, here
        monkeypatch.setenv(name, os.environ.get(name, ""))
    umask = os.umask(0o022)
    try:
        node.begin(0, Device(1), str(tmp_path / "home"), "tensorflow", {}, relay.versions())
    finally:
        os.umask(umask)
    node.send(b'{"type": "prepare"}', {"/data.npz": ("0" * 64, b"")})
    assert node.receive() == b""
    ended = node.end()
    assert not ended["was_killed"]
    assert ended["words"] == "could not be given its files: OSError: no space left on device"


@pytest.mark.parametrize("shared", ["/mnt/all/cnn", "/mnt/all/cnn/shared", "/mnt/all", "/checkout"])
def test_checkpoints_lie_where_all_nodes_see_them(shared):
    """Also where the folder that they share is the run's, which each node has for itself."""
    node = relay.Relay("run", "/mnt/all/cnn", "/checkout")
    node._mapped["/mnt/all/cnn"] = node._own("/mnt/all/cnn")
    checkpoint = f"{shared}/cnn-0-checkpoints/trial-7.npz"
    message = {"task": "retrain", "checkpoint": checkpoint, "path": "/mnt/all/cnn/models/m.keras"}
    translated = node._translated({"settings": {"checkpoints": shared}, **message})
    assert translated["checkpoint"] == checkpoint
    assert translated["settings"]["checkpoints"] == shared
    assert translated["path"] == f"{node._node}/mnt/all/cnn/models/m.keras"


def test_what_is_on_the_way_out_of_the_node_s_folder_stays_in_it(tmp_path):
    node = relay.Relay("run", "/home/me/../../run", "/checkout")
    assert node._own("/home/me/../../run") == f"{node._node}/run"
    with pytest.raises(ValueError, match=r"absolute\. Received: 'runs/cnn"):
        node._place({"runs/cnn/models/m.keras": ("0" * 64, None)})


@pytest.mark.parametrize(
    ("gpus", "workers", "each"), [(4, 8, 0.5), (2, 3, 0.5), (4, 3, 1.0), (1, 3, 0.3333)]
)
def test_so_many_workers_find_room_on_gpus_one_by_one(gpus, workers, each):
    share = _fraction(gpus, workers)
    assert share == each
    assert gpus * math.floor(1 / share) >= workers


@pytest.mark.parametrize(
    ("nodes", "workers", "each"),
    [
        ([8], 2, 4.0),  # as on this machine alone
        ([8], 8, 1.0),
        ([2], 4, 0.5),
        ([4, 4], 3, 2.0),
        ([3, 3, 3], 4, 1.0),  # 9 // 4, but each node has room for one of two
        ([8, 2], 2, 2.0),  # may run on either
        ([3, 3], 1, 3.0),
    ],
)
def test_so_many_workers_share_the_cores(nodes, workers, each):
    share = _cores_each(nodes, workers)
    assert share == each
    assert sum(node // share for node in nodes) >= workers
