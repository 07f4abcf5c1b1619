"""The machine's faults: no memory, a clock that jumps; and whose a run's files are."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from search import artifacts, doctor, folders
from search.data import weights
from search.errors import EXIT_DAMAGED, EXIT_USAGE, SearchError
from search.winners import inference
from tests import dummy, invariants
from tests.command import ROOT, Command

# Memory


@pytest.fixture
def cgroup():
    """A control group with 400 MB, of either version: the words that start a command in it."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"fmnist-search-{os.getpid()}"
    limit = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
    swap = "memory.memsw.limit_in_bytes" if version_1.is_dir() else "memory.swap.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(400 * 2**20))
        if (group / swap).exists():  # else it swaps for minutes before it is killed
            (group / swap).write_text(str(400 * 2**20 if version_1.is_dir() else 0))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            group.rmdir()
            return
        except OSError:  # its last process has not quite ended
            time.sleep(0.1)


@pytest.mark.fault("N3")
@pytest.mark.slow
def test_n3_a_trial_killed_for_memory_runs_once_more_alone(tmp_path, cgroup):
    command = Command(tmp_path, prefix=cgroup, DUMMY_FAULT="memory", DUMMY_SLEEP="0.02")
    code, output = command.run("--trials", "6", "--workers", "2", "--pruner", "none")
    assert code == 0, output
    assert "trial 2 runs again alone" in output
    trials = command.study().trials
    assert [t.number for t in trials if t.state.name != "COMPLETE"] == [2]
    assert trials[2].state.name == "PRUNED"
    assert trials[2].user_attrs["reason"].startswith("out_of_memory: its worker ended by signal 9")
    assert trials[2].constraints == {"out_of_memory": 1.0}
    attempts = trials[2].user_attrs["attempts"]
    assert [attempt["reason"] for attempt in attempts] == ["out_of_memory"] * 2
    check_alone(trials, attempts[-1])
    invariants.wait_until_no_worker(command.folder, 2)


@pytest.mark.slow
@pytest.mark.fault("N3")
def test_n3_an_error_of_memory_passes_where_a_trial_is_alone(tmp_path):
    command = Command(tmp_path, DUMMY_FAULT="memory-error")
    code, output = command.run("--trials", "6", "--workers", "3", "--pruner", "none")
    assert code == 0, output
    invariants.check(command.folder, command.log, 6)
    trials = command.study().trials
    assert all(trial.state.name == "COMPLETE" for trial in trials)
    for trial in trials[2:4]:
        attempts = trial.user_attrs["attempts"]
        assert [attempt["reason"] for attempt in attempts] == ["out_of_memory", "complete"]
        check_alone(trials, attempts[-1])


@pytest.mark.slow
def test_n3_an_error_of_a_shared_gpu_s_memory_passes_where_a_trial_has_all_of_it(tmp_path):
    command = Command(tmp_path, DUMMY_FAULT="memory-error", CUDA_VISIBLE_DEVICES="0")
    code, output = command.run("--trials", "6", "--per-gpu", "3", "--pruner", "none")
    assert code == 0, output
    invariants.check(command.folder, command.log, 6)
    shares = {(at["trial"], at["attempt"]): at["gpu_share"] for at in command.entries("begin")}
    again = {(2, 2), (3, 2)}
    assert {at: share for at, share in shares.items() if at in again} == dict.fromkeys(again, 1.0)
    assert {round(share, 3) for at, share in shares.items() if at not in again} == {0.333}


def check_alone(trials, alone):
    """No other attempt ran beside this one."""
    for trial in trials:
        for attempt in trial.user_attrs["attempts"]:
            if attempt != alone:
                overlap = min(attempt["end"], alone["end"]) - max(attempt["start"], alone["start"])
                assert overlap <= 0.01, (trial.number, attempt, alone)


# The clock

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
/* The clock on the wall, set as the file says, in seconds. */
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int answer = real(id, now);
    if (id == CLOCK_REALTIME && access(getenv("CLOCK_SET"), F_OK) == 0)
        now->tv_sec += atol(getenv("CLOCK_SECONDS"));
    return answer;
}
"""


@pytest.mark.fault("T1")
@pytest.mark.parametrize("seconds", [pytest.param(3600, marks=pytest.mark.slow), -3600])
def test_t1_a_clock_that_jumps_an_hour(tmp_path, seconds):
    if not shutil.which("cc"):
        pytest.skip("no C compiler, to set the clock of one process")
    (tmp_path / "clock.c").write_text(CLOCK)
    library = str(tmp_path / "clock.so")
    build = ["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "clock.c"), "-ldl"]
    subprocess.run(build, check=True)
    set_ = tmp_path / "set"
    command = Command(
        tmp_path,
        LD_PRELOAD=library,
        CLOCK_SET=str(set_),
        CLOCK_SECONDS=str(seconds),
        TZ="Pacific/Kiritimati",
    )
    process = command.start_slowly("--trials", "6", "--workers", "2", "--trial-timeout", "60s")
    set_.touch()
    command.hurry()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    invariants.check(command.folder, command.log, 6)
    trials = command.study().trials
    began = [trial.user_attrs["attempts"][0]["start"] for trial in trials]
    assert abs(max(began) - min(began)) > 3000  # it did jump
    for trial in trials:
        (attempt,) = trial.user_attrs["attempts"]
        assert 0 < attempt["end"] - attempt["start"] < 60
        assert 0 < trial.user_attrs["seconds"] < 60


# Whose files


@pytest.mark.slow
def test_a_run_is_private(tmp_path):
    command = Command(tmp_path, DUMMY_SLEEP="0.01")
    assert command.run("--trials", "2", "--workers", "1", "--log", "csv")[0] == 0
    (command.folder / "report.html").unlink()
    assert command.run(program=("search", "report"))[0] == 0
    (command.folder / "study.db").write_text("damaged")
    assert command.run(program=("search", "repair"))[0] == 0
    for path in (command.folder, *command.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.fault("X2")
@pytest.mark.parametrize("name", folders.WRITTEN)
def test_x2_nothing_is_written_through_a_link(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(outside)
    with pytest.raises(SearchError, match="not written through symbolic links"):
        folders.refuse_links(run)
    (run / name).unlink()
    (run / name).symlink_to(outside / "new")
    with pytest.raises(SearchError, match="remove the link"):
        folders.refuse_links(run)


def test_a_folder_that_may_not_be_entered_is_one_line(tmp_path):
    user = os.geteuid()
    tmp_path.chmod(0)
    try:
        os.seteuid(user or 65534)  # permissions don't bind root
        with pytest.raises(SearchError, match=r"run can't be read: Permission denied"):
            folders.refuse_links(tmp_path / "run")
        with pytest.raises(SearchError, match=r"there is no image"):
            inference.classify("mine", tmp_path, tmp_path, [tmp_path / "x.png"])
        assert tmp_path.is_relative_to(doctor._existing(tmp_path / "run"))
        with pytest.raises(SearchError, match=r"which is not there"):
            weights.ensure(str(tmp_path / "w.h5"))
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


@pytest.mark.fault("X2")
def test_x2_the_command_refuses_the_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    command = Command(tmp_path)
    (command.folder / "logs").mkdir(parents=True)
    (command.folder / "logs" / "worker-0.log").symlink_to(precious)
    code, output = command.run("--trials", "2", "--workers", "1")
    assert code == 1
    assert f"worker-0.log -> {precious}" in output
    assert precious.read_text() == "precious"


@pytest.mark.fault("X6")
def test_x6_a_study_that_anybody_may_write_is_not_run(tmp_path):
    file = tmp_path / "mine.py"
    shutil.copy(Path(dummy.__file__), file)
    file.chmod(0o666)
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", str(file), "--out", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == EXIT_USAGE
    assert f"anybody may write {file}" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("X4")
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cr3t@host/db",
        "postgresql://me:s3cr3t@{}:5432/db?password=s3cr3t",
        "postgresql://me@host/db?password=s3cr3t",
        "postgresql://me:s3cr3t@s3cr3t@host/db",
        "postgresql://me:s3cr3t/db",
        "sqlite:///runs/x.db?password=s3cr3t",
        "s3cr3t@host",
    ],
)
def test_x4_no_secret_is_shown(tmp_path, url):
    command = Command(tmp_path)
    code, output = command.run("--trials", "2", "-vv", "--storage", url)
    assert code == EXIT_USAGE
    assert "s3cr3t" not in output
    assert "sqlite:///FILE" in output or "without a password" in output


@pytest.mark.fault("X3")
def test_x3_a_config_runs_no_code(tmp_path):
    config = tmp_path / "best.yaml"
    config.write_text(f"!!python/object/apply:os.mkdir ['{tmp_path}/made']")
    done = subprocess.run(
        [sys.executable, "-m", "search", "train", str(config), "--out", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == EXIT_DAMAGED
    assert "is no YAML file" in done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.fault("X3", "A2")
def test_x3_a_model_in_the_place_of_another_is_not_loaded(tmp_path):
    (tmp_path / "models").mkdir()
    model = tmp_path / "models" / "trial-0-seed-0.keras"
    model.write_bytes(b"somebody else's")
    seed = {"model": f"models/{model.name}", "model_sha256": "0" * 64}
    with pytest.raises(SearchError, match="is not what was written; the search's own command"):
        artifacts.verified_models({"winners": [{"seeds": [seed]}]}, tmp_path)
