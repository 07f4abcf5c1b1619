"""Notes as Optuna's own dashboard reads them."""

from __future__ import annotations

import io
import json

import optuna
import optuna_dashboard
import pytest
from optuna.trial import TrialState
from optuna_dashboard import _custom_plot_data as plot_data

from search.pruning import Standing, SuccessiveHalvingOfReports
from search.report import dashboard_plots, source
from search.storage import storage
from search.view import notes
from tests import made_up_run

FIGURES = {
    "dataset": {"class_names": ["cat", "dog|wolf"]},
    "search": {
        "trials": 2, "complete": 1, "pruned": 1, "fail": 0, "seconds": 90.0, "saved_share": 0.25,
    },
    "winners": [
        {
            "trial": 0,
            "weights": None,
            "validation_accuracy": 0.9,
            "epochs": 4.0,
            "parameters": 1234,
            "test": {"mean": {"accuracy": 0.91}, "std": {"accuracy": 0.01}},
            "seeds": [
                {"test": {"confusion_matrix": [[5, 1], [0, 4]]}},
                {"test": {"confusion_matrix": [[6, 0], [2, 2]]}},
            ],
        }
    ],
    "ensemble": None,
}  # fmt: skip


@pytest.fixture
def study(tmp_path):
    study = storage.at(f"sqlite:///{tmp_path}/study.db").open("mine")
    study.set_user_attr("run", {"num_reports": 9, "fixed": {"kind": "search"}})
    return study


def add(study, value=None, *, reports=(0.5, 0.7), reason="", **attrs):
    """One finished trial, as the storage gives it."""
    state = TrialState.PRUNED if value is None else TrialState.COMPLETE
    trial = optuna.trial.create_trial(
        state=state,
        value=value,
        intermediate_values=dict(enumerate(reports, 1)),
        user_attrs=({"reason": reason} if reason else {}) | attrs,
    )
    study.add_trial(trial)
    return study.get_trials(deepcopy=False)[-1]


def shown(study):
    """What the dashboard's own interface answers of the study."""
    statuses = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": f"/api/studies/{study._study_id}",
        "SERVER_PROTOCOL": "HTTP/1.0",
        "wsgi.input": io.BytesIO(),
        "wsgi.url_scheme": "http",
    }
    answer = optuna_dashboard.wsgi(study._storage)(
        environ, lambda status, headers, exc_info=None: statuses.append(status)
    )
    content = json.loads(b"".join(answer))
    assert statuses == ["200 OK"]
    return content


def bodies(study):
    return [trial["note"]["body"] for trial in shown(study)["trials"]]


def test_a_pruned_trials_note_says_where_it_stood_and_how_large_it_was(study):
    trial = add(
        study,
        seconds=31.4,
        parameters=1_234_567,
        flops=59_157_084,
        images_per_second=5230.0,
        reason="pruned: behind at report 2",
    )
    notes.save_of_trial(study, trial, Standing(4, 5, 1, rung=2))
    (body,) = bodies(study)
    assert body.startswith(
        "**pruned** after 2 of 9 reports, 31 s: place 4 of 5 at report 2, where the best 1 went on"
    )
    for words in ("1,234,567", "59.2 MFLOP", "5,230 images/s", "0.7000, report 2"):
        assert words in body


def test_the_users_text_is_shown_as_it_is(study):
    notes.save_of_trial(study, add(study, reason="error: a|b `c`\n<script>"))
    assert "`error: a¦b 'c' <script>`" in bodies(study)[0]


def test_attempts_are_listed_where_there_were_several(study):
    attempts = [
        {"attempt": 1, "host": "a", "device": "gpu 0", "start": 0, "end": 5, "reason": "killed"},
        {"attempt": 2, "host": "b", "device": "gpu 1", "start": 5, "end": 15, "reason": "complete"},
    ]
    notes.save_of_trial(study, add(study, 0.7, attempts=attempts))
    assert "| 2 | `b`, gpu 1 | 10 | complete |" in bodies(study)[0]


def test_the_best_so_far_is_the_studys_note(study):
    for value in (0.6, 0.8, 0.7):
        notes.save_of_trial(study, add(study, value))
    note = shown(study)["note"]
    assert note["body"].startswith("## Best so far: trial 1, validation accuracy 0.8000")
    assert note["version"] == 2  # not written again by the third


def test_the_value_has_a_name(study):
    add(study, 0.5)
    for _ in range(2):
        notes.name_metric(study)
    assert shown(study)["objective_names"] == ["validation accuracy"]
    study.set_user_attr("run", {"fixed": {"kind": "objective"}})
    notes.name_metric(study)
    assert shown(study)["objective_names"] == ["value"]


def test_a_winners_note_holds_its_test_figures_and_confusion_matrix(study):
    notes.save_of_trial(study, add(study, 0.9))
    add(study)  # its note was cut off
    for _ in range(2):  # measured again: the note is replaced
        notes.save_answer(study, FIGURES)
    winner, pruned = bodies(study)
    assert winner.startswith("## Winner 1: test accuracy 0.9100 ± 0.0100")
    assert "| `cat` | 11 | 1 |\n| `dog¦wolf` | 2 | 6 |" in winner
    assert winner.count("Winner") == 1
    assert pruned.startswith("**pruned**")
    assert shown(study)["note"]["body"].startswith("## Trial 0: test accuracy 0.9100 ± 0.0100")


def test_one_that_is_no_winner_any_more_has_a_trials_note_again(study):
    for value in (0.9, 0.95):
        notes.save_of_trial(study, add(study, value))
    notes.save_answer(study, FIGURES)
    assert bodies(study)[0].startswith("## Winner 1")
    winner = FIGURES["winners"][0] | {"trial": 1}
    notes.save_answer(study, FIGURES | {"winners": [winner]})
    before, now = bodies(study)
    assert before.startswith("**complete**")
    assert now.startswith("## Winner 1")


def test_many_classes_are_the_most_frequent_confusions(study):
    add(study, 0.9)
    size = 30
    matrix = [[10 * (i == j) + 3 * (i == 2 and j == 7) for j in range(size)] for i in range(size)]
    winner = FIGURES["winners"][0] | {"seeds": [{"test": {"confusion_matrix": matrix}}]}
    names = {"class_names": [f"class {i}" for i in range(size)]}
    notes.save_answer(study, FIGURES | {"winners": [winner], "dataset": names})
    assert "| `class 2` | `class 7` | 3 |" in bodies(study)[0]
    assert "true / predicted" not in bodies(study)[0]


def test_a_long_note_and_a_shorter_one_after_it(study):
    trial = add(study, 0.9)
    before = notes._attrs(study)
    notes._save(study, trial._trial_id, ["x" * 5000], before)
    assert bodies(study) == ["x" * 5000]
    notes._save(study, trial._trial_id, ["short"], notes._attrs(study))
    assert bodies(study) == ["short"]
    assert optuna_dashboard.get_note(study) == ""


def test_missing_notes_are_added_once(study):
    add(study)
    add(study, 0.9)
    notes.save_missing(study)
    first = notes._attrs(study)
    assert all(bodies(study))
    notes.save_missing(study)
    assert notes._attrs(study) == first


def test_a_kill_before_the_note_loses_no_trial(study, monkeypatch):
    """The trial has been told: whatever happens to its note, its end is stored."""
    trial = add(study, 0.9)

    def die(*arguments):
        raise KeyboardInterrupt

    for cut_off in range(2):
        with monkeypatch.context() as patch:
            writes = [study._storage.set_study_system_attr] * cut_off + [die]
            patch.setattr(
                study._storage, "set_study_system_attr", lambda *a, w=writes: w.pop(0)(*a)
            )
            with pytest.raises(KeyboardInterrupt):
                notes.save_of_trial(study, trial)
        assert [t.value for t in study.trials] == [0.9]
        assert bodies(study) == [""]  # half a note is none
    notes.save_missing(study)
    assert bodies(study)[0].startswith("**complete**")


def test_the_standing_is_what_the_pruner_decided_by(study):
    pruner = SuccessiveHalvingOfReports(1, 2)
    add(study, 0.9, reports=(0.8,))
    last = add(study, reports=(0.5,))
    assert pruner.standing(study, last) == Standing(2, 2, 1, rung=1)
    assert pruner.prune(study, last)
    later = add(study, reports=(0.5, 0.5, 0.5))
    assert pruner.standing(study, later) == Standing(2, 2, 1, rung=2)


def drawn(study):
    """The plots that the dashboard's pages get, by name."""
    plots = {one["id"]: one["graph_object"] for one in shown(study)["plotly_graph_objects"]}
    assert plots == plot_data.get_plotly_graph_objects(notes._attrs(study))
    return plots


def test_the_dashboard_draws_the_winners_figures(study, tmp_path):
    made_up = made_up_run.study_of(20)
    made_up_run.write_metrics(made_up, tmp_path, top=2, seeds=1)
    plots = dashboard_plots.of(source.read(made_up, tmp_path))
    names = [
        f"winner-{rank}-{name}" for rank in (1, 2) for name in ("accuracy", "loss", "confusion")
    ]
    assert list(plots) == names
    assert all(map(plot_data.is_valid_graph_object_id, names))
    assert max(map(len, plots.values())) < 12_000
    add(study, 0.9)
    notes.save_plots(study, plots)
    assert drawn(study) == plots
    best = source.read(made_up, tmp_path).complete[0]
    curve, matrix = (json.loads(plots[f"winner-1-{name}"]) for name in ("accuracy", "confusion"))
    assert curve["layout"]["title"]["text"].startswith(f"Winner 1, trial {best.number}: accuracy")
    assert [trace["name"] for trace in curve["data"]] == ["training", "validation"]
    reported = [round(value, 5) for value in best.intermediate_values.values()]
    assert curve["data"][1]["y"] == pytest.approx(reported)
    assert len(matrix["data"][0]["z"]) == len(made_up_run.CLASSES)
    assert "template" not in matrix["layout"]


def test_of_very_many_classes_no_matrix_is_drawn(tmp_path):
    for num_classes, is_drawn in ((30, True), (101, False)):
        classes = [f"class {number}" for number in range(num_classes)]
        made_up = made_up_run.study_of(20, classes=classes)
        made_up_run.write_metrics(made_up, tmp_path, classes=classes, seeds=1)
        plots = dashboard_plots.of(source.read(made_up, tmp_path))
        assert ("winner-1-confusion" in plots) == is_drawn
        assert max(map(len, plots.values())) < 12_000


def test_a_plot_is_written_when_it_has_changed_and_only_then(study, monkeypatch):
    plots = {"winner-1": json.dumps({"data": ["x" * 5000]}), "winner-2": '{"data": []}'}
    notes.save_plots(study, plots)
    written = []
    save = notes._set
    monkeypatch.setattr(notes, "_set", lambda *a: (written.append(a[1]), save(*a)))
    notes.save_plots(study, plots)
    assert written == []
    shorter = {"winner-1": '{"data": [1]}'}  # and there is one winner only
    notes.save_plots(study, shorter)
    assert drawn(study) == shorter | {"winner-2": notes._NO_PLOT}
    assert json.loads(notes._NO_PLOT)["data"] == []
    written.clear()
    notes.save_plots(study, shorter)
    assert written == []
