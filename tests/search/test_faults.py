"""Whatever dies, the same command finishes the study with exactly N trials (the dummy study)."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import time

import psutil
import pytest

from tests import invariants
from tests.command import Command

IS_RAY_THERE = importlib.util.find_spec("ray") is not None
ON_RAY = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_RAY_THERE, reason="pip install '.[ray]' brings Ray"),
]


@pytest.fixture
def command(tmp_path):
    return Command(tmp_path)


@pytest.fixture(params=["local", pytest.param("ray", marks=ON_RAY)])
def engine(request):
    return "--engine", request.param


def test_undisturbed(command):
    code, output = command.run("--trials", "8", "--workers", "2")
    assert code == 0, output
    invariants.check(command.folder, command.log, 8)


def test_the_same_command_again_adds_nothing(command):
    command.run("--trials", "4", "--workers", "2")
    before = command.log.read_bytes()
    code, output = command.run("--trials", "4", "--workers", "2")
    assert (code, command.log.read_bytes()) == (0, before)
    assert "4 of 4 trials finished" in output


def kill_at_random(command, arguments, num_kills, kills_at=()):
    """SIGKILLs workers at random, and the coordinator after so many of them; seconds it took."""
    rng = random.Random(1)
    began, kills = time.monotonic(), 0
    process = command.start(*arguments)
    while kills < num_kills:
        time.sleep(rng.uniform(0.05, 0.4))
        assert process.poll() is None, f"finished after {kills} kills: {process.stdout.read()}"
        if not (workers := invariants.workers_of(command.folder)):
            continue
        rng.choice(workers).kill()
        kills += 1
        if kills in kills_at:
            process.kill()
            process.communicate()
            invariants.wait_until_no_worker(command.folder, 2)
            process = command.start(*arguments)
            command.wait_for_worker()
    command.hurry()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return time.monotonic() - began


def check_killed(command, num_trials, *arguments, num_kills, kills_at=()):
    arguments = ("--trials", str(num_trials), "--workers", "4", "--max-attempts", "50", *arguments)
    seconds = kill_at_random(command, arguments, num_kills, kills_at)
    invariants.check(command.folder, command.log, num_trials)
    assert not any(trial.state.name == "FAIL" for trial in command.study().trials)
    return seconds


@pytest.mark.fault("K1", "K2")
@pytest.mark.slow
def test_k1_and_k2_thirty_workers_and_three_coordinators_killed(tmp_path):
    command = Command(tmp_path)
    command.slow_down()
    check_killed(command, 60, num_kills=30, kills_at={8, 16, 24})


@pytest.mark.longest
@pytest.mark.parametrize(
    "kills_at",
    [
        pytest.param((), marks=pytest.mark.fault("K1"), id="k1"),
        pytest.param((17, 34, 51, 68, 85), marks=pytest.mark.fault("K2"), id="k2"),
    ],
)
def test_200_trials_end_whoever_is_killed_100_times(tmp_path, kills_at):
    (tmp_path / "alone").mkdir()
    alone = Command(tmp_path / "alone", DUMMY_SLEEP="0.7")
    began = time.monotonic()
    code, output = alone.run("--trials", "200", "--workers", "4", "--pruner", "none")
    undisturbed = time.monotonic() - began
    assert code == 0, output
    command = Command(tmp_path, DUMMY_SLEEP="0.7")
    seconds = check_killed(command, 200, "--pruner", "none", num_kills=100, kills_at=kills_at)
    print(f"undisturbed {undisturbed:.0f} s, killed {seconds:.0f} s")
    assert seconds < 2 * undisturbed


@pytest.mark.fault("K3")
@pytest.mark.slow
def test_a_retry_replaces_reports_and_is_not_pruned_where_it_had_passed(tmp_path):
    command = Command(tmp_path, DUMMY_FAULT="die-once")
    code, output = command.run("--trials", "16", "--workers", "2")
    assert code == 0, output
    invariants.check(command.folder, command.log, 16)
    retried = [t for t in command.study().trials if len(t.user_attrs["attempts"]) == 2]
    assert retried
    assert all(trial.last_step >= 3 for trial in retried)  # it died after passing step 2


def check_killed_after_write(folder, number):
    """A coordinator killed after its n-th write; whether it got as far before it was done."""
    folder.mkdir()
    command = Command(folder, DUMMY_SLEEP="0.002")
    arguments = ("--trials", "4", "--workers", "1")
    process = command.start(*arguments, program=("tests.killed", str(number)))
    process.communicate(timeout=300)
    if process.returncode == 0:
        return False
    assert process.returncode == -signal.SIGKILL
    code, output = command.run(*arguments)
    assert code == 0, output
    invariants.check(command.folder, command.log, 4)
    for trial in command.study().trials:
        said = trial.user_attrs.get("reason", "")
        assert said.startswith("pruned") == (trial.state.name == "PRUNED"), (number, trial)
    return True


@pytest.mark.fault("K3")
def test_k3_a_kill_after_a_write_loses_nothing(tmp_path):
    assert check_killed_after_write(tmp_path / "k3", 2)


@pytest.mark.fault("K3")
@pytest.mark.parametrize(
    "every",
    [pytest.param(1, marks=pytest.mark.longest), pytest.param(4, marks=pytest.mark.slow)],
)
def test_k3_a_kill_after_any_write_loses_nothing(tmp_path, every):
    number = every
    while check_killed_after_write(tmp_path / str(number), number):
        number += every
    assert number > 30


@pytest.mark.fault("K4")
def test_k4_a_trial_that_always_kills_its_worker(tmp_path, engine):
    command = Command(tmp_path, DUMMY_FAULT="die-always", DUMMY_SLEEP="0.02")
    arguments = ("--trials", "6", "--pruner", "none", "--max-attempts", "3", *engine)
    code, output = command.run(*arguments)
    assert code == 0, output
    invariants.check(command.folder, command.log, 6)
    failed = [trial for trial in command.study().trials if trial.state.name == "FAIL"]
    assert [trial.number for trial in failed] == [2]
    assert len(failed[0].user_attrs["attempts"]) == 3
    assert "killed" in failed[0].user_attrs["reason"]
    assert "last words" in failed[0].user_attrs["stderr"]


@pytest.mark.fault("K5")
def test_k5_a_stopped_worker_is_replaced_and_its_trial_runs_again(command, engine):
    arguments = ("--trials", "8", "--workers", "2", "--silence", "1s", *engine)
    process = command.start_slowly(*arguments, seconds=0.3)  # ten times that is silence, too
    # In its first trial, a known point, which nothing complete has beaten.
    stopped = psutil.Process(json.loads(command.log.read_text().partition("\n")[0])["process"])
    stopped.suspend()
    command.hurry()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert not stopped.is_running()
    assert re.search(r"worker \d said nothing for \d s and is replaced", output)
    invariants.check(command.folder, command.log, 8)
    attempts = [a for t in command.study().trials for a in t.user_attrs["attempts"]]
    assert sum(attempt["reason"] == "timeout" for attempt in attempts) == 1


@pytest.mark.fault("K6")
@pytest.mark.slow
def test_k6_an_endless_loop_is_ended_and_the_others_go_on(tmp_path):
    command = Command(tmp_path, DUMMY_FAULT="hang", DUMMY_SLEEP="0.02")
    code, output = command.run(
        "--trials", "6", "--pruner", "none", "--trial-timeout", "2s", "--max-attempts", "2"
    )
    assert code == 0, output
    invariants.check(command.folder, command.log, 6)
    (failed,) = [trial for trial in command.study().trials if trial.state.name == "FAIL"]
    assert failed.number == 2
    assert failed.user_attrs["reason"].startswith(
        "timeout: its worker took longer than --trial-timeout=2s, 2 times"
    )
    for attempt in failed.user_attrs["attempts"]:
        assert 2 <= attempt["end"] - attempt["start"] < 7
        assert attempt["reason"] == "timeout"


@pytest.mark.fault("K7")
@pytest.mark.slow
def test_k7_a_signal_to_all_processes_costs_no_attempt(command):
    """As the system sends it, or a cluster's scheduler; the workers hear it first."""
    arguments = ("--trials", "8", "--workers", "2", "--max-attempts", "1")
    process = command.start_slowly(*arguments)
    for worker in invariants.workers_of(command.folder):
        worker.terminate()
    time.sleep(0.3)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 143, output
    command.hurry()
    code, output = command.run(*arguments)
    assert code == 0, output
    invariants.check(command.folder, command.log, 8)
    assert not any(trial.state.name == "FAIL" for trial in command.study().trials)


@pytest.mark.fault("K7")
@pytest.mark.slow
def test_k7_a_second_signal_ends_it_at_once(command):
    process = command.start_slowly("--trials", "12", "--workers", "2")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two at once are one
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - began < 2
    invariants.wait_until_no_worker(command.folder, 2)
    command.hurry()
    assert command.run("--trials", "12", "--workers", "2")[0] == 0
    invariants.check(command.folder, command.log, 12)


@pytest.mark.fault("K7")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_k7_a_signal_leaves_everything_resumable(command, engine, number, code):
    arguments = ("--trials", "12", "--workers", "2", *engine)
    process = command.start_slowly(*arguments)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == code, output
    assert "the same command goes on" in output
    invariants.wait_until_no_worker(command.folder, 2)
    command.hurry()
    assert command.run(*arguments)[0] == 0
    invariants.check(command.folder, command.log, 12)


@pytest.mark.fault("K8")
@pytest.mark.slow
def test_k8_a_second_coordinator_is_refused(command):
    process = command.start_slowly("--trials", "30", "--workers", "1")
    code, output = command.run("--trials", "30")
    assert code == 2
    assert f"process {process.pid}" in output
    command.hurry()
    process.communicate(timeout=120)
    invariants.check(command.folder, command.log, 30)


@pytest.mark.fault("K9")
@pytest.mark.slow
def test_k9_eight_processes_create_the_same_study_at_once(command):
    processes = [command.start("--trials", "2", "--workers", "1") for _ in range(8)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert {process.returncode for process in processes} <= {0, 2}, outputs
    assert 0 in {process.returncode for process in processes}
    assert not any("Traceback" in output for output in outputs)
    invariants.check(command.folder, command.log, 2)


@pytest.mark.slow
@pytest.mark.fault("K10")
def test_k10_the_whole_foreground_group_is_killed(command, engine):
    arguments = ("--trials", "12", "--workers", "2", *engine)
    process = command.start_slowly(*arguments)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    invariants.wait_until_no_worker(command.folder, 5)
    command.hurry()
    assert command.run(*arguments)[0] == 0
    invariants.check(command.folder, command.log, 12)


@pytest.mark.fault("N1")
def test_n1_a_value_that_is_not_finite_is_pruned_and_never_the_best(tmp_path, engine):
    command = Command(tmp_path, DUMMY_FAULT="nan", DUMMY_SLEEP="0.01")
    assert command.run("--trials", "6", "--pruner", "none", *engine)[0] == 0
    trials = command.study().trials
    diverged = [trial for trial in trials if "diverged" in trial.user_attrs.get("reason", "")]
    assert [trial.number for trial in diverged] == [1, 3, 5]
    assert all(trial.state.name == "PRUNED" for trial in diverged)
    assert all(trial.constraints == {"diverged": 1.0} for trial in diverged)


@pytest.mark.fault("N2")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param("raise", "the dummy's own error", marks=pytest.mark.slow),
        ("string", "The objective returns a number"),
    ],
)
def test_first_trials_that_all_fail_alike_stop_the_study(tmp_path, engine, fault, message):
    command = Command(tmp_path, DUMMY_FAULT=fault, DUMMY_SLEEP="0.01")
    code, output = command.run("--trials", "20", "--pruner", "none", *engine)
    assert code == 1
    assert "all failed with the same error" in output.splitlines()[-1]
    assert message in output.splitlines()[-1]
    assert "search/workers/worker.py" not in output  # the user's frames, not ours
    assert sum(trial.state.name == "FAIL" for trial in command.study().trials) >= 3


@pytest.mark.fault("A4")
@pytest.mark.slow
def test_a4_the_same_seed_gives_the_same_points_interrupted_or_not(tmp_path):
    arguments = ("--trials", "10", "--workers", "1", "--sampler", "random", "--seed", "5")
    whole = Command(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    assert whole.run(*arguments)[0] == 0
    broken = Command(tmp_path / "broken")
    (tmp_path / "broken").mkdir()
    for seconds in (1.0, 1.3):
        process = broken.start(*arguments)
        broken.wait_for_worker()
        time.sleep(seconds)
        assert process.poll() is None
        process.kill()
        process.communicate()
    assert broken.run(*arguments)[0] == 0
    invariants.check(broken.folder, broken.log, 10)
    points = [[trial.params for trial in command.study().trials] for command in (whole, broken)]
    assert points[0] == points[1]


@pytest.mark.fault("S8")
@pytest.mark.slow
def test_s8_another_seed_under_the_same_study_is_refused(command):
    command.run("--trials", "2", "--seed", "1")
    before = (command.folder / "study.db").read_bytes()
    code, output = command.run("--trials", "4", "--seed", "2")
    assert code == 2
    assert "seed was 1 and is now 2" in output
    assert (command.folder / "study.db").read_bytes() == before


@pytest.mark.slow
def test_the_time_budget_ends_the_search_and_leaves_it_resumable(command):
    code, output = command.run("--trials", "1000", "--workers", "2", "--time-budget", "2s")
    assert code == 0, output
    finished = sum(trial.state.is_finished() for trial in command.study().trials)
    assert 0 < finished < 1000
    assert command.run("--trials", str(finished + 4), "--workers", "2")[0] == 0
    invariants.check(command.folder, command.log, finished + 4)
