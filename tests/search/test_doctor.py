"""What `doctor` finds on machines that lack something, each a folder made for the test."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from search import doctor, run_record
from search.data import datasets, weights
from search.storage import storage
from tests.command import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "search", "doctor", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def states(findings):
    return [finding.state for finding in findings]


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_machine_that_has_all_it_needs(tmp_path):
    done = run("--dataset", "digits", "--out", str(tmp_path / "runs"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    by_subject = {finding["subject"]: finding for finding in told["findings"]}
    assert by_subject["Keras"]["what"].endswith("tensorflow")
    assert by_subject["precision"]["state"] == "ok"
    assert by_subject["data digits"]["what"] == "images of 8 x 8 x 1, 10 classes"
    assert "optuna" in by_subject["versions"]["what"]
    assert list(tmp_path.iterdir()) == []  # nothing is written for good


def test_a_problem_is_told_with_its_fix(tmp_path):
    done = run("--dataset", "digits", "--out", str(tmp_path), KERAS_BACKEND="caffe")
    assert done.returncode == 1
    assert "problem" in done.stdout
    assert "unset KERAS_BACKEND" in done.stdout
    assert "1 problem" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("keras", "words", "timeout"),
    [
        ("import os; os.abort()", "killed by signal 6", 60),
        ("raise ImportError('libcudart.so')", "libcudart.so", 60),
        pytest.param(
            *("import time; time.sleep(60)", "not imported within", 3), marks=pytest.mark.slow
        ),
    ],
    ids=["crashes", "raises", "hangs"],
)
def test_a_backend_that_cannot_be_imported(tmp_path, monkeypatch, keras, words, timeout):
    (tmp_path / "keras.py").write_text(keras)
    monkeypatch.setattr(doctor, "BACKEND_TIMEOUT", timeout)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor._backend()
    assert finding.state == "problem"
    assert words in finding.what
    assert finding.fix


def test_published_data_that_are_missing_are_fetched_later(home):
    (data,) = doctor._data("fashion_mnist")
    (pretrained,) = doctor._weights()
    assert (data.state, pretrained.state) == ("warning", "warning")
    assert "4 of 4" in data.what
    assert not home.exists()


def test_published_data_that_are_damaged_are_a_problem_and_left_alone(home):
    folder = home / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    damaged = folder / datasets.DATASETS["fashion_mnist"].train_files[0].name
    damaged.write_bytes(b"half a download")
    (home / "models").mkdir()
    (home / "models" / weights.PUBLISHED.name).touch()
    before = content(home)
    (data,) = doctor._data("fashion_mnist")
    (pretrained,) = doctor._weights()
    assert (data.state, pretrained.state) == ("problem", "problem")
    assert damaged.name in data.what
    assert "delete it" in data.fix
    assert content(home) == before


def test_data_of_the_users(tmp_path):
    x, y = np.zeros((40, 5, 4), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "good.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez(tmp_path / "bad.npz", x_train=x, y_train=y[:3], x_test=x, y_test=y)
    (good,) = doctor._data(str(tmp_path / "good.npz"))
    assert (good.state, good.what) == ("ok", "images of 5 x 4 x 1, 2 classes")
    for name in ("bad.npz", "none.npz", "fashion"):
        (finding,) = doctor._data(str(tmp_path / name) if "." in name else name)
        assert (finding.state, bool(finding.what and finding.fix)) == ("problem", True)


def test_a_folder_for_runs(tmp_path):
    (finding,) = doctor._folder(tmp_path / "not" / "yet")
    assert finding.state == "ok"
    (tmp_path / "file").touch()
    (finding,) = doctor._folder(tmp_path / "file")
    assert (finding.state, finding.fix) == ("problem", "take another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    # Root may write anywhere on a disk, but not into a kernel's file system.
    (finding,) = doctor._folder(Path("/proc/1"))
    assert finding.state == "problem"


@pytest.mark.parametrize(("kind", "state"), [("ext4", "ok"), ("nfs4", "warning")])
def test_a_disk_of_another_machine_is_warned_of(tmp_path, monkeypatch, kind, state):
    monkeypatch.setattr(doctor, "_file_system", lambda folder: kind)
    assert states(doctor._folder(tmp_path)) == [state]


@pytest.mark.parametrize(
    ("free", "state"), [(10**11, "ok"), (10**9, "warning"), (10**7, "problem")]
)
def test_little_disk(tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    assert states(doctor._disk("runs", tmp_path, 200 * 2**20)) == [state]


def test_runs_of_other_versions_and_damaged_ones(tmp_path):
    for name in ("now", "earlier", "other", "damaged"):
        (tmp_path / name).mkdir()
    for name, attr in (
        ("now", {"format": run_record.FORMAT}),
        ("earlier", {"fixed": {}}),
        ("other", {}),
    ):
        study = storage.at(f"sqlite:///{tmp_path / name}/study.db").open(name)
        study.set_user_attr("run", attr)
        study._storage._backend.engine.dispose()
    with sqlite3.connect(tmp_path / "other" / "study.db") as connection:
        connection.execute("UPDATE version_info SET schema_version = 1")
        connection.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    connection.close()
    (tmp_path / "damaged" / "study.db").write_bytes(b"no database" * 500)
    findings = list(doctor._studies(tmp_path))
    assert states(findings) == ["problem"] * 3 + ["ok"]
    told = {finding.what.split("study.db")[0].rpartition("/")[0]: finding.what
            for finding in findings[:3]}  # fmt: skip
    assert "another version" in told[str(tmp_path / "earlier")]
    assert "Optuna" in told[str(tmp_path / "other")]
    assert "damaged" in told[str(tmp_path / "damaged")] or "not a database" in str(told)
    assert "1 study" in findings[3].what
