"""`show`: the leaderboard and one trial, as text and for programs; curves in characters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from search import results
from search.errors import SearchError
from search.storage import storage
from search.view import listing
from search.view.textplot import curves, sparkline
from tests.command import ROOT

ATTEMPTS = [
    {"attempt": 1, "host": "a", "process": 7, "device": "gpu 0", "start": 1.7e9, "end": 1.7e9 + 9,
     "reason": "killed", "detail": "ended by signal 9\nlast words"},
    {"attempt": 2, "host": "b", "process": 8, "device": "gpu 1", "start": 1.7e9 + 10},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    study = storage.open_study(f"sqlite:///{folder}/study.db", "quickstart")
    study.set_user_attr("run", {"num_reports": 3})
    history = {"1": {"accuracy": 0.25, "loss": float("inf")}, "2": {"accuracy": 0.5, "loss": 1.0}}
    for value in (0.75, None):
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
                value=value,
                params={"units": 8},
                distributions={"units": optuna.distributions.IntDistribution(1, 9)},
                intermediate_values={1: 0.5, 2: 0.625},
                user_attrs={
                    "attempts": ATTEMPTS,
                    "history": history,
                    "seconds": 9.5,
                    "parameters": 12_345,
                    "reason": "" if value else "pruned: behind [/bold] at report 2",
                },
            )
        )
    study.set_user_attr("retrained:trial-0-seed-0", {"trained_epochs": 4.0, "model": "a.keras"})
    study._storage._backend.engine.dispose()
    return folder


def show(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "search", "show", "--study", "quickstart", "--out", str(folder),
         *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_leaderboard(folder):
    shown = show(folder)
    assert shown.splitlines()[1].split()[:3] == ["0", "complete", "0.7500"]
    assert "2 trials" in shown


def test_rows_for_programs(folder):
    rows = json.loads(show(folder, "--json"))
    assert [(row["number"], row["state"], row["value"]) for row in rows] == [
        (0, "complete", 0.75),
        (1, "pruned", None),
    ]
    assert rows[0]["params"] == {"units": 8}
    assert len(json.loads(show(folder, "--json", "--top", "1"))) == 1


def test_one_trial_in_full(folder):
    shown = show(folder, "--trial", "0")
    for words in ("complete, 0.7500, 2 of 3 reports", "12,345", "ended by signal 9", "gpu 1"):
        assert words in shown
    assert "trial-0-seed-0: 4.0 epochs a.keras" in shown
    assert "● validation   · training" in shown
    assert "pruned: behind [/bold] at report 2" in show(folder, "--trial", "1")


def test_one_trial_for_programs(folder):
    trial = json.loads(show(folder, "--trial", "1", "--json"))
    assert (trial["state"], trial["params"]) == ("pruned", {"units": 8})
    assert [report["value"] for report in trial["reports"]] == [0.5, 0.625]
    assert trial["reports"][0]["loss"] is None  # it was infinite, which JSON does not know
    assert [attempt["host"] for attempt in trial["attempts"]] == ["a", "b"]
    assert trial["figures"] == {"parameters": 12_345}


def test_a_trial_that_is_not_there_is_one_line(folder):
    assert "has no trial 7; it has 2 trials" in show(folder, "--trial", "7", code=2)
    assert "exclude each other" in show(folder, "--trial", "1", "--top", "3", code=2)
    with pytest.raises(SearchError, match="has no trial 2"):
        results.detail(storage.read_study(f"sqlite:///{folder}/study.db", "quickstart"), 2)


def test_a_trial_that_has_only_begun(capsys):
    study = optuna.create_study(study_name="new", direction="maximize")
    study.ask()
    listing.print_trial(study, results.detail(study, 0))
    assert capsys.readouterr().out.startswith("trial 0 of new: running, 0 reports")


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 10, ""),
        ([0.5], 10, "█"),
        ([1, 1, 1], 10, "███"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        (list(range(100)), 4, "▁▃▆█"),
        ([0, 0, 1], 1, "█"),
        ([0, 1], 0, ""),
    ],
)
def test_a_sparkline(values, width, line):
    assert sparkline(values, width) == line


def test_curves():
    plot = curves({"val": [0.0, 1.0], "train": [None, 0.0]}, width=20, height=3)
    assert plot == [
        "1.0000 ┤          ●",
        "       ┤",
        "0.0000 ┤●         ·",
        "        1 report  2",
        "        ● val   · train",
    ]


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("num_reports", [1, 2, 30, 500])
def test_curves_keep_to_their_width(width, num_reports):
    values = [(step % 7) / 7 for step in range(num_reports)]
    lines = curves({"a": values, "b": [float("nan")] * num_reports}, width=width)
    assert max(map(len, lines)) <= width
    assert len(lines) == 12


def test_nothing_to_draw_is_no_plot():
    assert curves({"a": [None], "b": []}, width=40) == []


def test_one_seed_has_no_spread():
    part = {"mean": {"accuracy": 0.91234}, "std": {"accuracy": 0.001}}
    assert results.spread(part, "accuracy", 1) == "0.9123"
    assert results.spread(part, "accuracy", 2) == "0.9123 ± 0.0010"
