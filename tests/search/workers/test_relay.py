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
from search.workers.ray import _fraction


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
    assert node.end() == (
        False,
        "could not be given its files: OSError: no space left on device",
    )


@pytest.mark.parametrize(
    ("gpus", "workers", "each"), [(4, 8, 0.5), (2, 3, 0.5), (4, 3, 1.0), (1, 3, 0.3333)]
)
def test_so_many_workers_find_room_on_gpus_one_by_one(gpus, workers, each):
    share = _fraction(gpus, workers)
    assert share == each
    assert gpus * math.floor(1 / share) >= workers
