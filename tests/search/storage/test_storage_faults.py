"""The study's storage fails, is locked, is full: training goes on, and nothing is counted twice."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from sqlite3 import dbapi2

import optuna
import pytest

from search import artifacts
from search.errors import EXIT_STORAGE_LOST, Interrupted, SearchError
from search.storage import patience, storage
from tests import failing, invariants
from tests.command import ROOT, Command

# Holds a database for itself, also from readers, for so many seconds.
HOLDER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
connection.execute("PRAGMA locking_mode=EXCLUSIVE")
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def fail(monkeypatch):
    """Lets this process's transactions fail."""
    monkeypatch.setattr(dbapi2, "connect", dbapi2.connect)
    yield failing.install
    failing.install("before", only=-1)


def trials_of(url, number=5):
    """What a coordinator does to its storage, trial by trial."""
    study = storage.at(url).open("mine")
    study.sampler = optuna.samplers.RandomSampler(seed=1)
    for _ in range(number):
        if len(study.get_trials(deepcopy=False)) == 2:
            study.enqueue_trial({"x": 0.5, "kind": "a"}, user_attrs={"known_point": 0})
        trial = study.ask()
        trial.suggest_float("x", 0.0, 1.0)
        trial.suggest_categorical("kind", ["a", "b"])
        with storage.together(study):
            for step in (1, 2, 3):
                study._storage.set_trial_intermediate_value(trial._trial_id, step, step / 4)
            trial.set_user_attr("history", {})
        storage.drop_reports_after(study, trial._trial_id, 2)
        study._storage.set_trial_user_attr(trial._trial_id, "seconds", trial.number)
        study.tell(trial.number, trial.params["x"])
    study._storage.remove_session()
    study._storage._backend.engine.dispose()
    read = storage.read_study(url, "mine")
    found = read.trials
    read._storage.remove_session()
    read._storage._backend.engine.dispose()
    return [
        (t.number, t.state.name, t.params, t.value, t.intermediate_values, t.user_attrs)
        for t in found
    ]


def check_each(tmp_path, fail, when, every):
    """Fail one transaction after the other, each in a study of its own; how many there are."""
    undisturbed = trials_of(f"sqlite:///{tmp_path}/undisturbed.db")
    assert [(number, state) for number, state, *_ in undisturbed] == [
        (number, "COMPLETE") for number in range(5)
    ]
    number = 1
    while True:
        fail(when, only=number)
        assert trials_of(f"sqlite:///{tmp_path}/{number}.db") == undisturbed, number
        if failing.Connection.count < number:
            return number
        number += every


@pytest.mark.fault("S1")
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_s1_a_transaction_that_fails_is_made_once(tmp_path, fail, when):
    assert check_each(tmp_path, fail, when, every=29) > 40


@pytest.mark.fault("S1")
@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_s1_each_transaction_that_fails_is_made_once(tmp_path, fail, when):
    assert check_each(tmp_path, fail, when, every=1) > 40


@pytest.mark.fault("S1")
def test_s1_a_trial_whose_answer_is_lost_is_made_once(url, fail):
    fail("after", only=-1)  # its connections are the failing ones from the start
    study = storage.at(url).open("mine")
    storage.at(url).open("another").ask()
    for number in range(4):
        fail("after", only=number + 1)
        study.enqueue_trial({"x": 0.5})
        assert len(study.trials) == number + 1
        fail("after", only=number + 1)
        assert study.ask().number == number
        assert len(study.trials) == number + 1


@pytest.mark.fault("S1")
@pytest.mark.slow
def test_s1_one_transaction_in_five_fails_in_a_whole_run(tmp_path):
    command = Command(tmp_path, DUMMY_SLEEP="0.02")
    code, output = command.run("--trials", "5", "--workers", "2", program=("tests.failing",))
    assert code == 0, output
    invariants.check(command.folder, command.log, 5)
    for trial in command.study().trials:
        assert len(trial.user_attrs["attempts"]) == 1


def lock(path, seconds):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    return holder


def check_locked(command, seconds):
    """Locked in the middle of a run, while its workers train; nothing is ended for being silent."""
    process = command.start_slowly("--trials", "12", "--workers", "2", "--silence", "2s")
    path = command.folder / "study.db"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    holder = lock_while_written(path, seconds)
    command.hurry()
    output, _ = process.communicate(timeout=240)
    holder.join()
    assert process.returncode == 0, output
    assert "does not answer (database is locked)" in output
    assert "answers again" in output
    invariants.check(command.folder, command.log, 12)
    attempts = [a for t in command.study().trials for a in t.user_attrs["attempts"]]
    assert {attempt["reason"] for attempt in attempts} <= {"complete", "pruned"}


def lock_while_written(path, seconds):
    """The write lock of a database in use: in WAL mode its readers go on, its writers wait."""

    is_held = threading.Event()

    def hold():
        with closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            is_held.set()
            time.sleep(seconds)
            connection.rollback()

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(30)
    return thread


@pytest.mark.fault("S3")
@pytest.mark.slow
def test_s3_a_file_that_another_process_locks_is_waited_for(tmp_path):
    check_locked(Command(tmp_path), 5)


@pytest.mark.fault("S3")
@pytest.mark.slow
def test_s3_a_file_that_is_locked_for_30_seconds_is_waited_for(tmp_path):
    check_locked(Command(tmp_path), 30)


@pytest.mark.fault("S3")
def test_s3_a_locked_file_is_not_a_damaged_one(tmp_path, url):
    trials_of(url, 1)
    holder = lock(tmp_path / "study.db", 1.5)  # longer than SQLite itself waits
    assert len(storage.read_study(url, "mine").trials) == 1
    holder.communicate()


def test_a_storage_that_stays_silent_is_lost(tmp_path, url, monkeypatch):
    trials_of(url, 1)
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    study = storage.at(url).open("mine")
    with closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SearchError, match=r"has not answered .*is locked") as lost:
            study.set_user_attr("key", 1)
    assert lost.value.exit_code == EXIT_STORAGE_LOST
    study.set_user_attr("key", 2)
    assert storage.read_study(url, "mine").user_attrs == {"key": 2}


def test_a_signal_ends_the_waiting(tmp_path, url):
    def wait(seconds):
        raise Interrupted(2)

    trials_of(url, 1)
    study = storage.at(url).open("mine", wait=wait)
    with closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Interrupted):
            study.set_user_attr("key", 1)


def test_what_does_not_pass_is_raised_at_once(tmp_path, url):
    trials_of(url, 1)
    study = storage.read_study(url, "mine")
    began = time.monotonic()
    with pytest.raises(optuna.exceptions.StorageInternalError) as raised:
        study.set_user_attr("key", 1)
    assert time.monotonic() - began < 1
    assert patience.code_of(raised.value) == sqlite3.SQLITE_READONLY
    assert not patience.passes(raised.value)


# A full disk


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own in a folder."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    """A small file system, which `fill` fills."""
    folder = tmp_path / "disk"
    with small_disk(folder, "230m"):
        yield folder


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(2**16))
        except OSError:
            pass
        try:
            while True:
                filler.write(bytes(512))
        except OSError:
            return


@pytest.mark.fault("S4")
@pytest.mark.slow
def test_s4_a_full_disk_at_a_commit_or_a_log_line(disk, tmp_path):
    command = Command(disk)
    command.log = tmp_path / "dummy.log"
    command._environment["DUMMY_LOG"] = str(command.log)
    arguments = ("--trials", "8", "--workers", "2", "--log", "csv")
    process = command.start_slowly(*arguments)
    command.slow_down(3.0)
    fill(disk)
    output, _ = process.communicate(timeout=120)
    last = output.splitlines()[-1]
    assert process.returncode == EXIT_STORAGE_LOST, output
    assert "Traceback" not in output
    assert f"{command.folder}/study.db can't be written" in last
    assert "it needs" in last
    assert "bytes" in last
    code, output = command.run(*arguments)
    assert code == 1, output
    assert "MB free, a run needs about" in output
    (disk / "filler").unlink()
    command.hurry()
    code, output = command.run(*arguments)
    assert code == 0, output
    (command.folder / "csv").rename(disk / "csv")  # the checker knows no logs
    invariants.check(command.folder, command.log, 8)


WIDE = """
import keras
from studies.study import Study

def wide(hp):
    model = keras.Sequential([
        keras.Input((8, 8, 1), dtype="uint8"),
        keras.layers.Rescaling(1 / 16),
        keras.layers.Flatten(),
        keras.layers.Dense(8192, "relu"),  # 2.5 MB with the next layer's
        keras.layers.Dense(10, "softmax", dtype="float32"),
    ])
    optimizer = keras.optimizers.SGD(hp.Float("rate", 0.01, 0.1))
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model

study = Study(name="wide", space=wide, dataset="digits", trials=1, epochs=1)
"""


@pytest.mark.fault("S4")
@pytest.mark.slow
def test_s4_a_full_disk_at_a_winner_s_save(tmp_path):
    """There is room for one model and a half."""
    (tmp_path / "wide.py").write_text(WIDE)
    run = tmp_path / "run"
    first, second = (run / "models" / f"trial-0-seed-{index}.keras" for index in range(2))

    def search() -> tuple[int, str]:
        command = [sys.executable, "-m", "search", "--study", str(tmp_path / "wide.py")]
        done = subprocess.run(
            [*command, "--out", str(run), "--workers", "1", "--seeds", "2"],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        )  # fmt: skip
        return done.returncode, done.stdout

    def records() -> list[dict]:
        attrs = storage.read_study(f"sqlite:///{run}/study.db", "wide").user_attrs
        return [attrs[key] for key in sorted(attrs) if key.startswith("retrained:")]

    with small_disk(run / "models", "7m"):
        second.write_text("of another length")
        code, output = search()
        assert code == 1, output
        why = re.search(
            f"trial-0-seed-1 failed: {second} could not be written: No space left on device. "
            r"It needs (\d+) bytes, (\d+) are free",
            output.splitlines()[-1],
        )
        assert why, output
        assert 4_800_000 < int(why[1]) < 5_100_000  # weights and their average
        assert 2_000_000 < int(why[2]) < 3_000_000
        assert sorted(first.parent.iterdir()) == [first, second]
        assert second.read_text() == "of another length"
        (record,) = records()
        assert artifacts.sha256(first) == record["model_sha256"]

        subprocess.run(["mount", "-o", "remount,size=64m", str(first.parent)], check=True)
        code, output = search()
        assert code == 0, output
        assert "training trial-0-seed-1\n" in output
        before, (after, last) = record["model_sha256"], records()
        assert artifacts.sha256(first) == before == after["model_sha256"]
        assert artifacts.sha256(second) == last["model_sha256"]
        assert {"evaluation", "evaluation_sha256"} <= after.keys() & last.keys()
