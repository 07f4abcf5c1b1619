"""One trial once more: the same curve, or what differs."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest

from search.winners.repeat import TOLERANCE, Repeated
from tests.command import ROOT


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
