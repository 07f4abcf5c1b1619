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


@pytest.mark.parametrize(
    ("gpus", "workers", "each"), [(4, 8, 0.5), (2, 3, 0.5), (4, 3, 1.0), (1, 3, 0.3333)]
)
def test_so_many_workers_find_room_on_gpus_one_by_one(gpus, workers, each):
    share = _fraction(gpus, workers)
    assert share == each
    assert gpus * math.floor(1 / share) >= workers
