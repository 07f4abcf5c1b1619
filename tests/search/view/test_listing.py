"""`show`: the leaderboard and one trial, as text and for programs; curves in characters."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import yaml
from click.testing import CliRunner
from optuna.trial import TrialState

from search import results, run_record
from search.cli import look
from search.errors import SearchError
from search.journey import Outcome
from search.report import report, source
from search.storage import storage
from search.view import listing
from search.view.textplot import curves, sparkline
from search.winners import export
from search.winners.repeat import Repeated
from tests import made_up_run

ATTEMPTS = [
    {"attempt": 1, "host": "a", "process": 7, "device": "gpu 0", "start": 1.7e9, "end": 1.7e9 + 9,
     "reason": "killed", "detail": "ended by signal 9\nlast words"},
    {"attempt": 2, "host": "b", "process": 8, "device": "gpu 1", "start": 1.7e9 + 10},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    study = storage.at(f"sqlite:///{folder}/study.db").open("quickstart")
    study.set_user_attr("run", {"format": run_record.FORMAT, "num_reports": 3})
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
    done = CliRunner().invoke(
        look.show, ["--study", "quickstart", "--out", str(folder), *arguments]
    )
    if isinstance(done.exception, SearchError):
        assert done.exception.exit_code == code
        return str(done.exception)
    assert done.exit_code == code, done.output
    return done.output


def test_the_leaderboard(folder):
    shown = show(folder)
    assert shown.splitlines()[1].split()[:3] == ["0", "complete", "0.7500"]
    assert "2 trials" in shown
    assert "of a trial that is not complete the value is its last report's" in shown
    assert "not complete" not in show(folder, "--top", "1")


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
    plot = curves({"val": [0.0, 1.0], "train": [None, 0.0]}, [1, 2], width=20, height=3)
    assert plot == [
        "1.0000 ┤          ●",
        "       ┤",
        "0.0000 ┤●         ·",
        "        1 report  2",
        "        ● val   · train",
    ]


def test_reports_are_named_by_their_steps():
    plot = curves({"value": [0.0, 0.5, 1.0]}, [10, 20, 30], width=40)
    assert plot[-2].split() == ["10", "report", "30"]
    assert curves({"value": [0.0, 0.5, 1.0]}, [1000, 2000, 3000], width=40)[-2].split() == [
        "1000", "3000"
    ]  # fmt: skip


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("num_reports", [1, 2, 30, 500])
def test_curves_keep_to_their_width(width, num_reports):
    values = [(step % 7) / 7 for step in range(num_reports)]
    lines = curves(
        {"a": values, "b": [float("nan")] * num_reports}, range(1, num_reports + 1), width=width
    )
    assert max(map(len, lines)) <= width
    assert len(lines) == 12


def test_nothing_to_draw_is_no_plot():
    assert curves({"a": [None], "b": []}, [1], width=40) == []


def test_one_seed_has_no_spread():
    part = {"mean": {"accuracy": 0.91234}, "std": {"accuracy": 0.001}}
    assert results.spread(part, "accuracy", 1) == "0.9123"
    assert results.spread(part, "accuracy", 2) == "0.9123 ± 0.0010"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.1234"),
        (0.98765, "0.9877"),
        (-0.5, "-0.5000"),
        (0, "0.0000"),
        (None, ""),
        # Where four decimals would say nothing, or too much.
        (3e-06, "3e-06"),
        (-0.00012344, "-0.0001234"),
        (0.001, "0.0010"),
        (99_999.0, "99999.0000"),
        (123456.7, "1.235e+05"),
        (float("nan"), "nan"),
    ],
)
def test_a_value_as_it_is_read(value, text):
    assert results.decimal(value) == text


def test_a_tiny_value_is_read_everywhere(capsys):
    study = optuna.create_study(study_name="tiny", direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=3e-06, intermediate_values={1: 2e-06}))
    listing.print_leaderboard(study, Path("runs/tiny"), 20)
    listing.print_trial(study, results.detail(study, 0))
    listing.print_outcome(outcome(best=row(0, 3e-06)), "--study tiny", "--study tiny")
    shown = capsys.readouterr().out
    assert shown.count("3e-06") == 3
    assert "0.0000" not in shown


# What a user may call things, and what an error may say.
ODD = ["a [bold] b", "[/bold]", "[red]x[/red]", r"\[x]", "[1, 2]", ":x: :key:"]


def row(number, value, weights=""):
    return results.Row(number, "complete", value, value, 1, 1.0, 1, "", {}, weights)


def outcome(folder=Path("runs/mine"), kind="space", best=None, metrics=None):
    settings = SimpleNamespace(name="mine", kind=kind, trials=2)
    return Outcome(folder, "", settings, 2, best, metrics)


def winner(**changed):
    part = {"mean": {"accuracy": 0.9, "loss": 0.5}, "std": {"accuracy": 0.0, "loss": 0.0}}
    return {
        "trial": 0,
        "params": {"model": "mlp"},
        "seeds": [{}],
        "diverged": [],
        "epochs": 3.0,
        "parameters": 7,
        "weights": None,
        "published": {},
        **dict.fromkeys(("train", "validation", "test"), part),
        **changed,
    }


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 40 columns."""
    monkeypatch.setattr(listing._console, "width", 40)


@pytest.mark.parametrize("odd", ODD)
def test_paths_and_options_are_shown_as_they_are_and_whole(tmp_path, capsys, narrow, odd):
    folder = tmp_path / odd
    folder.mkdir(parents=True)  # one has a / in it
    (folder / "report.html").touch()
    options = f"--study '{odd}.py' --out '{folder}'"
    listing.print_outcome(outcome(folder), options, options)
    lines = capsys.readouterr().out.splitlines()
    assert f"report: {folder}/report.html" in lines
    for command in ("show", "export", "dashboard"):
        assert f"  fmnist-search {command} {options}" in lines


@pytest.mark.parametrize("odd", ODD)
def test_reasons_are_shown_as_they_are(capsys, odd):
    listing.print_repeated(Repeated(3, {1: 0.5}, {1: 0.5}, "error", odd, "complete"))
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"trial 3: another curve, largest difference 0.0000; error ({odd}), stored: complete"
    )
    study = optuna.create_study(study_name="mine", direction="maximize")
    said = {"host": odd, "reason": f"killed {odd}", "detail": f"{odd}\nlast words"}
    attrs = {"reason": f"error: {odd}", "attempts": [ATTEMPTS[0] | said]}
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attrs))
    listing.print_trial(study, results.detail(study, 0))
    shown = capsys.readouterr().out
    assert f"error: {odd}\n" in shown
    assert re.search(
        rf"1 +{re.escape(odd)} +gpu 0 +7 .* killed {re.escape(f'{odd} ({odd})')}", shown
    )


def test_a_trial_without_reports_has_a_value_and_no_curve(capsys):
    listing.print_repeated(Repeated(3, {}, {}, "complete", "", "complete", (0.5, 0.5)))
    assert (
        "trial 3: the same value, largest difference 0.0000; complete\n" in capsys.readouterr().out
    )
    listing.print_repeated(Repeated(3, {}, {}, "complete", "", "complete", (0.5, 0.75)))
    assert "trial 3: another value, largest difference 0.2500; complete\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("odd", ODD)
def test_points_that_are_compared_are_shown_as_they_are(capsys, odd):
    begun = winner(params={"model": odd}, weights=f"weights of {odd}.keras")
    other = winner(params={"model": f"other {odd}"}, published={"val_loss": 0.25})
    figures = {"winners": [begun, other], "search": {"seconds": 5.0}}
    listing.print_outcome(
        outcome(kind="comparison", metrics=figures), "--study mine", "--study mine"
    )
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [f"{odd} (weights of {odd}.keras)", *["0.9000"] * 3, "1", "3.0", "7"] in [
        line[:7] for line in lines
    ]
    assert [f"other {odd}", "validation loss", "0.2500", "0.5000", "+0.2500"] in [
        line[:5] for line in lines
    ]


def test_a_published_figure_that_is_not_measured_here_is_said_to_be_so(capsys):
    published = {"train_top5": 0.98765, "test_accuracy": 0.8}
    figures = {"winners": [winner(published=published)], "search": {"seconds": 5.0}}
    assert list(results.published(figures["winners"][0])) == [
        ("train top5", "0.9877", "not measured", ""),
        ("test accuracy", "0.8000", "0.9000", "+0.1000"),
    ]
    listing.print_outcome(
        outcome(kind="comparison", metrics=figures), "--study mine", "--study mine"
    )
    assert re.search(r"mlp +train top5 +0.9877 +not measured", capsys.readouterr().out)


def test_published_figures_stand_beside_those_of_several_seeds_with_their_spread():
    part = {"mean": {"loss": 0.5}, "std": {"loss": 0.125}}
    made = winner(seeds=[{}, {}], validation=part, published={"val_loss": 0.75})
    assert list(results.published(made)) == [
        ("validation loss", "0.7500", "0.5000 ± 0.1250", "-0.2500")
    ]


COMPLETE, BEHIND = (TrialState.COMPLETE, ""), (TrialState.PRUNED, "pruned: behind at report 2")
DIVERGED = TrialState.PRUNED, "diverged: loss was nan"
FAILED = TrialState.FAIL, "error: ValueError"


@pytest.mark.parametrize(
    ("ends", "share"),
    [
        ([(COMPLETE, 10), (COMPLETE, 10)], 0.0),
        ([(COMPLETE, 10), (BEHIND, 2)], 8 / 20),
        ([(COMPLETE, 10), (BEHIND, 2), (BEHIND, 5), (BEHIND, 10)], 13 / 40),
        ([(COMPLETE, 4)], 0.0),  # it stopped itself: no pruner saved that
        ([(COMPLETE, 4), (BEHIND, 2)], 8 / 14),
        ([(COMPLETE, 10), (DIVERGED, 2), (FAILED, 1)], 0.0),
        ([(BEHIND, 2), (DIVERGED, 2), (FAILED, 1)], 8 / 10),
        # A HyperModel's own fit may report more often than its space says.
        ([(COMPLETE, 25)], 0.0),
        ([(COMPLETE, 25), (BEHIND, 12)], 0.0),
        ([(COMPLETE, 20), (BEHIND, 12), (BEHIND, 2)], 8 / 42),
        ([], 0.0),
    ],
)
def test_pruning_saves_what_the_pruned_trials_would_have_trained(ends, share):
    study = optuna.create_study(study_name="mine", direction="maximize")
    study.set_user_attr("run", {"num_reports": 10})
    for (state, reason), reports in ends:
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=0.5 if state == TrialState.COMPLETE else None,
                intermediate_values=dict.fromkeys(range(1, reports + 1), 0.5),
                user_attrs={"reason": reason} if reason else {},
            )
        )
    assert results.saved_share(study) == pytest.approx(share)


def exported(format_, kind="space", **params):
    """The leaderboard of a study with one trial of these params, read again."""
    study = optuna.create_study(study_name="mine", direction="maximize")
    study.set_user_attr("run", {"fixed": {"kind": kind}})
    ranges = dict.fromkeys(params, optuna.distributions.IntDistribution(0, 99))
    study.add_trial(optuna.trial.create_trial(value=0.5, params=params, distributions=ranges))
    text = export.leaderboard(study, study.trials, format_)
    if format_ == "csv":
        return list(csv.DictReader(text.splitlines()))
    return json.loads(text) if format_ == "json" else yaml.safe_load(text)


def test_a_run_in_a_folder_of_another_name_is_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = storage.at("sqlite:///runs/flowers/study.db").open("cnn")
    study.set_user_attr("run", {"format": run_record.FORMAT, "num_reports": 0})
    study.add_trial(optuna.trial.create_trial(value=0.25))
    Path("runs/broken").mkdir()
    Path("runs/broken/study.db").write_bytes(b"")
    entry = SimpleNamespace(name="cnn", summary="A question.")
    listing.print_studies([entry], Path("runs"))
    _, known, broken, flowers = capsys.readouterr().out.splitlines()
    assert known.split() == ["cnn", "A", "question."]
    assert broken.split() == ["broken", "damaged"]
    assert " ".join(flowers.split()) == "cnn 1 trials, best 0.2500, in runs/flowers"


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ({}, "value"),
        ({"fixed": {"kind": "objective"}}, "value"),
        ({"fixed": {"kind": "space"}}, "validation accuracy"),
        ({"fixed": {"kind": "space"}, "own_fit": True}, "value"),
        ({"fixed": {"kind": "comparison"}, "own_fit": True}, "validation accuracy"),
    ],
)
def test_a_value_is_called_what_is_known_of_it(run, name):
    assert results.value_name(run) == name


@pytest.mark.parametrize(
    ("kind", "name"), [("space", "validation_accuracy"), ("objective", "value")]
)
def test_what_is_exported_is_named_what_it_is(kind, name):
    for format_ in ("json", "yaml"):
        assert exported(format_, kind, units=8) == [{"trial": 0, name: 0.5, "params": {"units": 8}}]
    assert exported("csv", kind, units=8) == [{"trial": "0", name: "0.5", "units": "8"}]


def test_a_hyperparameter_named_as_a_column_does_not_take_its_place():
    assert exported("csv", trial=7, units=8) == [
        {"trial": "0", "validation_accuracy": "0.5", "params_trial": "7", "units": "8"}
    ]
    assert exported("csv", "objective", value=7, params=8, validation_accuracy=9) == [
        {"trial": "0", "value": "0.5", "params_value": "7", "params": "8",
         "validation_accuracy": "9"}
    ]  # fmt: skip
    assert exported("json", trial=7) == [
        {"trial": 0, "validation_accuracy": 0.5, "params": {"trial": 7}}
    ]


def test_random_weights_are_said_wherever_a_figure_of_theirs_stands(tmp_path, capsys):
    study = made_up_run.study_of(12)
    run = study.user_attrs["run"] | {"weights": {"reference": "none", "label": "random weights"}}
    study.set_user_attr("run", run)
    listing.print_leaderboard(study, tmp_path, 3)
    assert "begun from random weights" in capsys.readouterr().out
    listing.print_trial(study, results.detail(study, 0))
    assert "from random weights" in capsys.readouterr().out.splitlines()[0]
    listing.print_outcome(
        outcome(best=row(3, 0.5, "random weights")), "--study mine", "--study mine"
    )
    assert "best: trial 3 with 0.5000, begun from random weights" in capsys.readouterr().out
    assert {row.weights for row in results.rows(study)} == {"random weights"}
    (best,) = results.winners(study, 1)
    for format_ in ("yaml", "json", "csv"):
        assert "random weights" in export.leaderboard(study, [best], format_)
    page = report.html(source.read(study, tmp_path))
    assert "so far the best, begun from random weights" in page


def test_of_a_comparison_only_points_that_begin_from_weights_say_so():
    run = {
        "fixed": {"kind": "comparison"},
        "weights": {"label": "random weights"},
        "pretrained": [False, True],
    }
    assert [results.begun_from(run, number, {}) for number in (0, 1)] == ["", "random weights"]


@pytest.mark.parametrize(
    ("attrs", "label"),
    [({"pretrained": True}, "ImageNet"), ({"pretrained": False}, ""), ({}, "")],
)
def test_of_a_search_trials_that_begin_from_no_weights_say_so(attrs, label):
    run = {"fixed": {"kind": "space"}, "weights": {"label": "ImageNet"}, "pretrained": []}
    assert results.begun_from(run, 7, attrs) == label


def test_a_figure_that_a_fit_of_its_own_did_not_measure_is_left_out(capsys):
    mlp = winner(published={"train_accuracy": 0.9})
    del mlp["train"]
    figures = {"winners": [mlp], "search": {"seconds": 5.0}}
    listing.print_outcome(
        outcome(kind="comparison", metrics=figures), "--study mine", "--study mine"
    )
    assert re.search(r"train accuracy +0.9000 +not measured", capsys.readouterr().out)


def test_seeds_that_diverged_are_counted(capsys):
    figures = {"winners": [winner(seeds=[{}, {}], diverged=[1])], "search": {"seconds": 5.0}}
    listing.print_outcome(outcome(kind="comparison", metrics=figures), "--study mine", "")
    assert (
        "trial 0 (mlp): 1 of 3 trainings diverged and are in none of the figures\n"
        in capsys.readouterr().out
    )


def test_images_are_classified_without_the_study_s_storage(capsys):
    figures = {"winners": [winner()], "search": {"seconds": 5.0}}
    same_run, same_folder = "--study mine --storage postgresql://h/d", "--study mine"
    listing.print_outcome(outcome(kind="comparison", metrics=figures), same_run, same_folder)
    shown = capsys.readouterr().out.splitlines()
    assert f"  fmnist-search show {same_run}" in shown
    assert f"  fmnist-search predict {same_folder} IMAGE.png" in shown


def test_a_winner_without_a_sound_training_is_named(capsys):
    lost = {"trial": 41, "params": {"units": 3, "rate": 0.1}, "reason": "loss was nan at report 2"}
    figures = {"winners": [winner()], "search": {"seconds": 5.0}, "diverged": [lost]}
    listing.print_outcome(
        outcome(kind="comparison", metrics=figures), "--study mine", "--study mine"
    )
    said = "trial 41 has no figures: it diverged with every seed (loss was nan at report 2)"
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_pruned_trial_has_no_validation_accuracy():
    study = optuna.create_study(study_name="mine", direction="maximize")
    study.set_user_attr("run", {"fixed": {"kind": "space"}})
    study.tell(study.ask(), 0.5)
    pruned = study.ask()
    pruned.report(0.4, 1)
    study.tell(pruned, state=TrialState.PRUNED)
    assert study.trials[1].value == 0.4  # Optuna's
    rows = json.loads(export.leaderboard(study, study.trials, "json"))
    assert [row["validation_accuracy"] for row in rows] == [0.5, None]


def test_a_column_that_the_first_row_lacks_is_kept():
    study = optuna.create_study(study_name="mine", direction="maximize")
    run = {"fixed": {"kind": "comparison"}, "pretrained": [False, True]}
    study.set_user_attr("run", run | {"weights": {"label": "random weights"}})
    for value in (0.6, 0.5):
        study.tell(study.ask(), value)
    rows = list(csv.DictReader(export.leaderboard(study, study.trials, "csv").splitlines()))
    assert [row["weights"] for row in rows] == ["", "random weights"]


def test_a_search_took_until_a_trial_that_was_cut_off_was_last_seen():
    study = optuna.create_study()
    for attempt in ({"start": 0, "end": 10}, {"start": 20, "seen": 50}, {"start": 60}):
        study.add_trial(
            optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"attempts": [attempt]})
        )
    assert results.Clock(study.trials).seconds == 40


def test_a_trial_of_a_fixed_model_can_be_chosen():
    study = optuna.create_study(direction="maximize")
    study.tell(study.ask(), 0.5)
    study.ask()
    assert results.chosen(study, 1, 0)[0].number == 0
    with pytest.raises(SearchError, match=r"has no trial 1 that has begun; it has 2 trials"):
        results.chosen(study, 1, 1)
