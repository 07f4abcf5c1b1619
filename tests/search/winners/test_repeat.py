"""One trial once more: the same curve, or what differs."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState

from search.errors import SearchError
from search.view.progress import View
from search.winners import repeat
from search.winners.repeat import TOLERANCE, Repeated
from search.workers import devices
from search.workers.devices import Device
from tests.command import ROOT
from tests.scripted import ScriptedPool


@pytest.mark.parametrize(
    ("now", "is_same", "difference"),
    [
        ({1: 0.5, 2: 0.75}, True, 0.0),
        ({1: 0.5, 2: 0.75 + TOLERANCE / 2}, True, TOLERANCE / 2),
        ({1: 0.5, 2: 0.8}, False, 0.05),
        ({1: 0.5}, False, 0.0),
        ({1: 0.5, 2: 0.75, 3: 0.8}, False, 0.0),
    ],
)
def test_what_the_same_curve_is(now, is_same, difference):
    repeated = Repeated(3, {1: 0.5, 2: 0.75}, now, "complete", "")
    assert repeated.is_same is is_same
    assert repeated.difference == pytest.approx(difference)


@pytest.mark.parametrize(("num_monitored", "is_same"), [(240, True), (2_500, False), (None, False)])
def test_two_images_of_few_are_no_other_curve(num_monitored, is_same):
    repeated = Repeated(3, {1: 0.5}, {1: 0.5 + 2 / 240}, "complete", "")
    assert repeated._replace(num_monitored=num_monitored).is_same is is_same


@pytest.mark.parametrize(
    ("outcome", "ended", "values", "is_same"),
    [
        ("complete", "complete", (0.75, 0.75), True),
        ("error", "complete", (0.75, None), False),
        ("complete", "error", (None, 0.75), False),
        ("pruned", "pruned", (0.75, None), True),  # Optuna's value of it is its last report
        ("diverged", "pruned", (0.75, None), False),
        ("complete", "complete", (0.75, 0.8), False),  # the value need not be a report's
        ("pruned", "", (0.75, None), True),  # its search ended it: a limit of time, a kill
    ],
)
def test_the_same_curve_ends_the_same_way(outcome, ended, values, is_same):
    curve = {1: 0.5, 2: 0.75}
    repeated = Repeated(3, curve, curve, outcome, "", ended, values)
    assert repeated.is_same is is_same


@pytest.mark.parametrize(
    ("now", "is_same", "difference"),
    [(0.5, True, 0.0), (0.5 + TOLERANCE / 2, True, TOLERANCE / 2), (0.75, False, 0.25)],
)
def test_trials_without_reports_are_compared_by_their_values(now, is_same, difference):
    repeated = Repeated(3, {}, {}, "complete", "", "complete", (0.5, now))
    assert repeated.is_same is is_same
    assert repeated.difference == pytest.approx(difference)


@pytest.mark.parametrize(
    ("state", "reason", "ended"),
    [
        (TrialState.COMPLETE, "", "complete"),
        (TrialState.PRUNED, "pruned: behind at report 4", "pruned"),
        (TrialState.PRUNED, "diverged: loss was nan at report 2", "diverged"),
        (TrialState.FAIL, "error: ValueError: shapes", "error"),
        # Not the point's own end: it may train to its end today.
        (TrialState.FAIL, "killed: its worker ended by signal 9, 3 times", ""),
        (TrialState.FAIL, "timeout: no report in 90 s, 3 times", ""),
        (TrialState.PRUNED, "out_of_memory: no memory", ""),
    ],
)
def test_how_a_stored_trial_ended_of_itself(state, reason, ended):
    stored = optuna.trial.create_trial(
        state=state,
        value=0.5 if state == TrialState.COMPLETE else None,
        user_attrs={"reason": reason} if reason else {},
    )
    assert repeat._ended(stored) == ended


def test_a_trial_is_repeated_in_its_search_s_precision(monkeypatch, tmp_path):
    study = optuna.create_study()
    # Its winners have had another.
    told = {"precision": "float32"}
    study.set_user_attr("run", {"described": {}, "precision": "bfloat16", "told": told})
    unit = optuna.distributions.FloatDistribution(0, 1)
    trial = optuna.trial.create_trial(value=0.5, params={"x": 0.5}, distributions={"x": unit})
    study.add_trial(trial)

    class ResolvedError(Exception):
        pass

    def resolved(described, file, options):
        raise ResolvedError(options["precision"])

    monkeypatch.setattr(repeat, "resolve", resolved)
    with pytest.raises(ResolvedError, match=r"^float32$"):
        repeat.repeat(study, 0, tmp_path / "mine.py", tmp_path, {}, View(-1))


def test_a_point_of_a_comparison_is_no_trial_to_repeat(tmp_path):
    study = optuna.create_study(study_name="mine")
    study.set_user_attr("run", {"fixed": {"kind": "comparison"}})
    study.add_trial(optuna.trial.create_trial(value=0.5))
    with pytest.raises(SearchError, match=r"'mine' compares .*train configs/trial-0\.yaml"):
        repeat.repeat(study, 0, tmp_path / "mine.py", tmp_path, {}, View(-1))


@pytest.mark.parametrize(
    ("reason", "outcome", "stopped"),
    [
        ("pruned: behind at report 2", "pruned", True),
        ("out_of_memory: no memory", "pruned", True),  # of the machine of its search
        ("diverged: loss was nan at report 3", "diverged", False),
    ],
)
def test_a_trial_is_stopped_where_its_search_did_not_where_it_ended_of_itself(
    reason, outcome, stopped
):
    answers = []
    trial = optuna.trial.create_trial(
        state=TrialState.PRUNED,
        intermediate_values={1: 0.5, 2: 0.75},
        user_attrs={"reason": reason},
    )

    def script(number, attempt):
        for step, value in trial.intermediate_values.items():
            message = {"type": "report", "step": step, "value": value, "metrics": {}}
            answers.append((yield message)["value"])
        yield {"type": "finished", "outcome": outcome, "reason": ""}

    repeated = repeat._again(ScriptedPool(script), trial, SimpleNamespace(seed=0), View(-1))
    assert answers == [False, stopped]
    assert repeated.is_same


@pytest.mark.parametrize(("label", "threads"), [("2 cpu", 2), ("1 cpu", 1), ("gpu 0", 7), ("", 7)])
def test_a_trial_has_as_many_threads_as_in_its_search(monkeypatch, label, threads):
    monkeypatch.setattr(devices, "share_out", lambda workers: [Device(7)])
    trial = optuna.trial.create_trial(
        state=TrialState.PRUNED, user_attrs={"attempts": [{"device": "gpu 1"}, {"device": label}]}
    )
    assert repeat._device(trial, {"told": {"workers": 3}}) == Device(threads, workers=3)


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "search", *arguments, "--out", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
def test_a_trial_of_a_search_is_repeated_and_a_changed_curve_is_noticed(tmp_path):
    searched = run(
        tmp_path, "--study", "quickstart", "--trials", "2", "--epochs", "3", "--workers", "1",
        "--no-retrain",
    )  # fmt: skip
    assert searched.returncode == 0, searched.stderr
    again = run(tmp_path, "repeat", "--study", "quickstart", "1")
    assert again.returncode == 0, again.stdout
    assert "trial 1: the same curve, largest difference 0.0" in again.stdout
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("update trial_intermediate_values set intermediate_value = 0.5")
    changed = run(tmp_path, "repeat", "--study", "quickstart", "1")
    assert changed.returncode == 1
    assert "trial 1: another curve" in changed.stdout
    missing = run(tmp_path, "repeat", "--study", "quickstart", "7")
    assert missing.returncode == 2
    assert "has no trial 7" in missing.stderr
