"""The report: what its figures show, what it says where something is missing, that it is safe."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from search import results
from search.data.weights import RANDOM
from search.errors import SearchError
from search.report import (
    answer,
    bars,
    course,
    images,
    origin,
    references,
    report,
    source,
    space,
    theme,
    timeline,
    training_figures,
    winner_figures,
    winner_section,
)
from tests import made_up_run
from tests.command import ROOT

EVIL = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the study of a run of 100 trials, with two winners."""
    folder = tmp_path_factory.mktemp("finished")
    study = made_up_run.study_of(100)
    made_up_run.write_metrics(study, folder, top=2)
    return folder, study


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The same of 12 trials, with one winner of one seed."""
    folder = tmp_path_factory.mktemp("small")
    study = made_up_run.study_of(12)
    made_up_run.write_metrics(study, folder, seeds=1)
    return folder, study


@pytest.fixture(scope="module")
def run(finished):
    folder, study = finished
    return source.read(study, folder, "Which is best?")


@pytest.fixture(scope="module")
def page(run):
    return report.html(run)


class Page(HTMLParser):
    """Text, headings and figures of a page, and every attribute that could load something."""

    def __init__(self, content):
        super().__init__()
        self.headings, self.loads, self.figures, self.scripts, self._in = [], [], [], 0, ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self._in = tag
        self.scripts += tag == "script"
        self.loads += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag == "script" and dict(attributes).get("type") == "application/json":
            self._in = "figure"

    def handle_data(self, data):
        if self._in in ("h2", "h3"):
            self.headings.append(data)
        if self._in == "figure":
            self.figures.append(json.loads(data))
        self._in = ""


def trial_of(state=TrialState.COMPLETE, value=0.5, attempts=(), **params):
    return create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        params={name: chosen for name, (chosen, _) in params.items()},
        distributions={name: range_ for name, (_, range_) in params.items()},
        user_attrs={"attempts": list(attempts)},
    )


def attempt(start, end, reason="complete", **where):
    return {"start": start, "end": end, "reason": reason, "host": "vm", "device": "1 cpu", **where}


def test_sections_come_in_order(page):
    shown = Page(page)
    sections = ["The answer", "How the search went", "The winners", "The data"]
    assert [h for h in shown.headings if h in [*sections, "How to do it again"]] == [
        *sections,
        "How to do it again",
    ]
    for heading in (
        *("Test accuracy beside others", "Best so far, by trials", "Best so far, by time"),
        *(
            "Learning curves",
            "What the workers did",
            "Importances",
            "The two most important together",
        ),
        *("Parallel coordinates", "Slices", "Accuracy while it trained", "Loss while it trained"),
        *("Training less validation accuracy", "Confusion matrix", "By class", "ROC curves"),
        *("Calibration", "Misclassified images", "Predictions on sample images"),
        *("First-layer filters", "First-layer activation maps", "Class distribution"),
        *("Samples of each class", "The same run", "The winner alone", "Made with"),
    ):
        assert heading in shown.headings, heading
    assert all(any(trace for trace in figure["data"]) for figure in shown.figures)


def test_nothing_is_loaded_from_elsewhere(page):
    shown = Page(page)
    assert [one for one in shown.loads if not one.startswith(("#", "data:image/png;base64,"))] == []
    assert "default-src 'none'" in page
    assert re.findall(r"@import|url\(", page.partition("<body>")[0]) == []


def test_a_hundred_trials_fit_into_the_limit(page):
    assert len(page.encode()) < 15e6


def test_it_is_dark_where_the_reader_wants_it_dark_and_light_on_paper(page):
    assert "@media screen and (prefers-color-scheme: dark)" in page
    assert 'addEventListener("beforeprint"' in page
    (colors,) = re.findall(r"const COLORS = (.*);\n", page)
    dark = json.loads(colors)["dark"]
    used = {
        found.lower()
        for figure in Page(page).figures
        for found in re.findall(r'"(#[0-9a-fA-F]{6})"', json.dumps(figure))
    }
    # #888 lines and white names on coloured bars serve both.
    assert used - dark.keys() <= {"#ffffff", "#888888"}


def test_what_the_user_wrote_is_text(tmp_path):
    classes = (EVIL, *made_up_run.CLASSES[1:])
    extra = [(EVIL, (EVIL, "<img src=x onerror=y>", "%{y}"))]
    study = made_up_run.study_of(20, classes=classes, extra_params=extra)
    made_up_run.write_metrics(study, tmp_path, classes=classes)
    shown = report.html(source.read(study, tmp_path, EVIL))
    assert "<script>alert" not in shown
    assert "<img src=x" not in shown
    assert html.escape(EVIL) in shown
    assert "&amp;lt;script" not in shown  # escaped once
    own = Page(shown)
    assert own.scripts == len(own.figures) + 2  # plotly.js and ours
    # plotly.js reads some HTML in names: they reach it escaped.
    assert not any("<script" in json.dumps(figure) for figure in own.figures)
    assert any("&lt;script" in json.dumps(figure) for figure in own.figures)


def test_best_so_far_is_in_the_order_of_ends_and_skips_pauses():
    trials = [
        trial_of(value=0.5, attempts=[attempt(0, 3600)]),
        trial_of(value=0.9, attempts=[attempt(100_000, 103_600)]),
        trial_of(value=0.7, attempts=[attempt(0, 1800, "killed"), attempt(1800, 7200)]),
        trial_of(TrialState.PRUNED, attempts=[attempt(103_600, 107_200, "pruned")]),
    ]
    for number, trial in enumerate(trials):
        trial.number = number
    reached = course.reached_by_time(trials)
    assert [(r.number, r.hours, r.value, r.best) for r in reached] == [
        (0, 1.0, 0.5, 0.5), (2, 2.0, 0.7, 0.7), (1, 3.0, 0.9, 0.9)
    ]  # fmt: skip
    assert results.Clock(trials).hours(200_000) == 4.0
    dots, line = course.hours_figure(reached, 4.0, "value").data
    assert list(line.x) == [1.0, 2.0, 3.0, 4.0]  # to the end, though the last trial was pruned
    assert list(line.y) == [0.5, 0.7, 0.9, 0.9]
    assert list(dots.x) == [1.0, 2.0, 3.0]


def ended_at(*values, complete=()):
    """Trials, all pruned but some: what they reported, one hour after the other."""
    trials = []
    for number, value in enumerate(values):
        state = TrialState.COMPLETE if number in complete else TrialState.PRUNED
        trial = trial_of(state, value, attempts=[attempt(3600 * number, 3600 * (number + 1))])
        trial.number = number
        trial.intermediate_values = {1: value, 2: value - 0.1}
        trials.append(trial)
    return trials


def test_pruned_trials_are_shown_by_their_best_report_but_are_never_the_best():
    reached = course.reached_by_time(ended_at(0.95, 0.8, 0.7, 0.9, complete=(1, 3)))
    assert [(r.value, r.best) for r in reached] == [
        (0.95, None), (0.8, 0.8), (0.7, 0.8), (0.9, 0.9)
    ]  # fmt: skip
    circles, dots, line = course.hours_figure(reached, 4.0, "value").data
    assert (list(circles.y), list(dots.y)) == ([0.95, 0.7], [0.8, 0.9])
    assert list(line.x) == [2.0, 3.0, 4.0, 4.0]
    assert (circles.text, dots.text) == (
        ("trial 0, pruned", "trial 2, pruned"), ("trial 1", "trial 3")
    )  # fmt: skip


def test_the_axis_shows_what_lies_near_the_line():
    def shown(*values, complete):
        reached = course.reached_by_trial(ended_at(*values, complete=complete))
        return course.history_figure(reached, "value").layout.yaxis.range

    low, high = shown(0.1, 0.9, 0.89, 0.92, complete=(1, 3))
    assert 0.85 < low < 0.89
    assert 0.92 < high < 0.93
    low, high = shown(0.1, 0.9, complete=(1,))  # a line that is flat says not what is near
    assert 0 < low < 0.1
    assert 0.9 < high < 1
    low, high = shown(0.9, complete=(0,))  # plotly would show -0.1 to 1.9
    assert 0.88 < low < 0.9 < high < 0.92


def test_history_by_trials_is_the_running_maximum(run):
    reached = course.reached_by_trial(run.trials)
    line = next(t for t in course.history_figure(reached, "value").data if t.mode == "lines")
    best, expected = -1.0, []
    for trial in run.trials:
        if trial.state == TrialState.COMPLETE:
            best = max(best, trial.value)
            expected.append((trial.number, best))
    shown = dict(zip(line.x, line.y, strict=True))
    assert [shown[number] for number, _ in expected] == [value for _, value in expected]


def test_each_curve_names_its_trials_params(run):
    drawn = course.curves(run)
    assert len(drawn) == sum(bool(trial.intermediate_values) for trial in run.trials)
    figure = course.curves_figure(drawn, run)
    best = run.complete[0]
    top = figure.data[-1]
    assert top.line.color == theme.RED
    assert list(top.y) == pytest.approx(list(best.intermediate_values.values()), abs=1e-5)
    assert top.x[0] == pytest.approx(12_800 / 50_000, abs=1e-3)
    assert f"trial {best.number}" in top.hovertemplate
    assert f"num_blocks={best.params['num_blocks']}" in top.hovertemplate
    pruned = [t for t in figure.data if "pruned" in t.hovertemplate]
    complete = [t for t in figure.data if "complete" in t.hovertemplate]
    assert max(t.opacity for t in pruned) < min(t.opacity for t in complete)


def test_many_curves_are_thinned_and_the_page_says_so(tmp_path):
    study = made_up_run.study_of(course.MOST_CURVES + 60)
    thick = source.read(study, tmp_path)
    drawn = course.curves(thick)
    assert len(drawn) == course.MOST_CURVES
    best = [trial.number for trial in thick.complete[: len(thick.complete) // 2]]
    assert {*best} <= {curve.trial.number for curve in drawn}
    assert f"Of {len(thick.trials)} curves the best 200 are drawn, and 100 others" in report.html(
        thick
    )


def test_attempts_that_died_are_shown_in_their_workers_lane():
    trials = [
        trial_of(attempts=[attempt(0, 10, "killed", attempt=1), attempt(10, 30, attempt=2)]),
        trial_of(TrialState.PRUNED, attempts=[attempt(0, 20, "diverged")]),
        trial_of(TrialState.PRUNED, attempts=[attempt(21, 31, "coordinator ended")]),
        trial_of(
            TrialState.RUNNING,
            attempts=[{"start": 31, "seen": 36, "host": "vm", "device": "1 cpu"}],
        ),
    ]
    for number, trial in enumerate(trials):
        trial.number = number
    made = timeline.attempts(trials)
    assert [(a.lane[-2], a.end) for a in made] == [
        ("1", "died"), ("2", "failed"), ("1", "complete"), ("2", "interrupted"), ("1", "running")
    ]  # fmt: skip
    assert [round(a.hours * 3600) for a in made] == [10, 20, 20, 10, 5]
    assert timeline.most_at_once(made) == 2
    figure = timeline.timeline_figure(made)
    by_name = {trace.name: trace for trace in figure.data}
    assert by_name["died"].marker.color == theme.RED
    assert "trial 0, attempt 1: killed" in by_name["died"].text


def test_a_run_that_went_on_with_other_devices_has_more_lanes_but_no_more_at_a_time():
    first, second = attempt(0, 10), attempt(10, 20) | {"device": "2 cpu"}
    made = timeline.attempts([trial_of(attempts=[first]), trial_of(attempts=[second])])
    assert len({one.lane for one in made}) == 2
    assert timeline.most_at_once(made) == 1
    assert timeline.most_at_once([]) == 0
    just_begun = timeline.attempts([trial_of(attempts=[{"start": 5}])] * 2)
    assert timeline.most_at_once(just_begun) == 2


@pytest.mark.parametrize(
    ("state", "reasons", "ends"),
    [
        (TrialState.COMPLETE, ("out_of_memory", "complete"), ["died", "complete"]),
        (TrialState.PRUNED, ("out_of_memory", "out_of_memory"), ["died", "failed"]),
        (TrialState.RUNNING, ("out_of_memory",), ["died"]),  # to run again, alone
        (TrialState.PRUNED, ("diverged",), ["failed"]),
        (TrialState.FAIL, ("killed", "timeout"), ["died", "died"]),
        (TrialState.COMPLETE, ("coordinator ended", "complete"), ["interrupted", "complete"]),
    ],
)
def test_an_attempt_after_which_its_trial_ran_again_has_died(state, reasons, ends):
    attempts = [attempt(10 * at, 10 * at + 9, reason) for at, reason in enumerate(reasons)]
    made = timeline.attempts([trial_of(state, attempts=attempts)])
    assert [one.end for one in made] == ends


@pytest.mark.parametrize(
    ("value", "range_", "is_edge"),
    [
        (32, IntDistribution(8, 32, step=8), True),
        (24, IntDistribution(8, 32, step=8), False),
        (8, IntDistribution(8, 32, step=8), True),
        (32, IntDistribution(16, 32, step=8), True),  # of three, as study cnn's filters
        (24, IntDistribution(16, 32, step=8), False),
        (32, IntDistribution(16, 32, step=16), False),  # of two, which are edges both
        (1, IntDistribution(1, 4), False),  # what is counted can't go below
        (4, IntDistribution(1, 4), True),
        (0, IntDistribution(0, 512, step=32), False),  # it can't go below
        (1.05e-4, FloatDistribution(1e-4, 1e-1, log=True), True),
        (1e-3, FloatDistribution(1e-4, 1e-1, log=True), False),
        (0.199, FloatDistribution(0.0, 0.2), True),
        (0.0, FloatDistribution(0.0, 0.2), False),
        (0.3, FloatDistribution(0.3, 0.3), False),
        (1.0, FloatDistribution(0.0, 1.0), False),  # a share
        (1.0, FloatDistribution(1e-3, 1.0, log=True), True),
        ("a", CategoricalDistribution(("a", "b")), False),
        ("b", CategoricalDistribution(("a", "b", "c")), False),
        (2.0, CategoricalDistribution((1.0, 1.5, 2.0)), True),
        (1.5, CategoricalDistribution((1.0, 1.5, 2.0)), False),
        (64, CategoricalDistribution((256, 64, 128)), True),
        (128, CategoricalDistribution((64, 128)), False),
        (0, CategoricalDistribution((0, 1, 2)), False),
        (1, CategoricalDistribution((1, 2, "many")), False),
        (True, CategoricalDistribution((False, True)), False),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_noticed(value, range_, is_edge):
    found = space.at_edges(trial_of(x=(value, range_)))
    assert [(edge.name, edge.value) for edge in found] == ([("x", value)] if is_edge else [])


def test_the_page_warns_of_an_edge(tmp_path):
    study = optuna.create_study(study_name="edge", direction="maximize")
    study.set_user_attr("run", made_up_run.run_attribute())
    study.add_trial(trial_of(value=0.9, filters=(32, IntDistribution(8, 32, step=8))))
    study.add_trial(trial_of(value=0.8, filters=(16, IntDistribution(8, 32, step=8))))
    shown = report.html(source.read(study, tmp_path))
    assert "filters is 32, the largest of 8 to 32" in shown


def test_an_edge_is_named_with_what_there_was_to_choose_from():
    edges = space.at_edges(
        trial_of(
            batch_size=(64, CategoricalDistribution((64, 128, 256))),
            rate=(0.199, FloatDistribution(0.0, 0.2)),
        )
    )
    assert [(edge.where, edge.of) for edge in edges] == [
        ("the smallest of", "64, 128, 256"), ("near the largest of", "0 to 0.2")
    ]  # fmt: skip


def test_importances_need_enough_complete_trials(run):
    study = space.snapshot(run.trials)
    ranked = space.importances(study)
    assert sum(ranked.values()) == pytest.approx(1)
    assert list(ranked.values()) == sorted(ranked.values(), reverse=True)
    few = run.complete[: space.LEAST_COMPLETE - 1]
    assert space.importances(space.snapshot(few)) == {}
    figure = space.importances_figure(ranked)
    assert figure.data[0].y[-1] == next(iter(ranked))


def test_where_most_were_pruned_all_that_came_to_a_report_are_compared():
    def trial(state, *values):
        reports = dict(enumerate(values, 1))
        value = {"value": 0.9} if state == TrialState.COMPLETE else {}
        return create_trial(state=state, intermediate_values=reports, **value)

    pruned, complete = TrialState.PRUNED, TrialState.COMPLETE
    few = [
        trial(complete, 0.3, 0.6, 0.5, 0.8),
        trial(pruned, 0.2),
        trial(pruned, 0.4, 0.1),
        trial(TrialState.FAIL, 0.3, 0.3, 0.3),
        trial(pruned, 0.2, 0.3, 0.7),
        trial(TrialState.RUNNING, 0.2, 0.3, 0.7),
    ]
    made, report = space.compared(few)
    assert report == 3  # half of the four came there
    assert [one.value if one.state == complete else None for one in made] == [
        0.6, None, None, None, 0.7, None
    ]  # fmt: skip
    assert few[0].value == 0.9  # still the study's
    # Half of them complete, or all: by their values.
    for trials in (few[:2], few[:1], []):
        assert space.compared(trials) == (trials, None)


def test_the_page_says_by_what_pruned_trials_are_compared(tmp_path):
    study = made_up_run.study_of(40)
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    fewer = optuna.create_study(study_name="made-up", direction="maximize")
    fewer.set_user_attr("run", study.user_attrs["run"])
    for trial in study.trials:
        if trial in complete[3:]:
            trial.state, trial.value = TrialState.PRUNED, None
        fewer.add_trial(trial)
    made, report_ = space.compared(fewer.trials)
    count = sum(trial.state == TrialState.COMPLETE for trial in made)
    shown = report.html(source.read(fewer, tmp_path))
    assert f"the {count} trials that came to report {report_} stand here" in shown
    assert "Importances need" not in shown


def test_conditional_params_do_not_break_the_space_figures(run):
    study = space.snapshot(run.trials)
    ranked = list(space.importances(study))
    params = space.chosen_params(study, ranked)
    assert 2 <= len(params) <= space.MOST_PARAMS
    in_most = [
        p for p in params if sum(p in t.params for t in run.complete) > len(run.complete) / 2
    ]
    assert in_most == params
    first, second = space.pair(study, ranked)
    both = [trial for trial in run.complete if {first, second} <= trial.params.keys()]
    assert first == ranked[0]
    assert len(both) >= space.LEAST_COMPLETE
    assert space.contour_figure(study, [first, second], "value") is not None
    points = space.slice_figure(study, "adam_learning_rate", "value").data[0]
    there = [t for t in run.complete if "adam_learning_rate" in t.params]
    assert sorted(points.y) == pytest.approx(sorted(trial.value for trial in there))


def test_the_better_a_trial_the_stronger_its_line(run):
    figure = space.parallel_figure(
        space.snapshot(run.trials), ["filters", "batch_size"], "accuracy"
    )
    assert len(figure.data) == len(run.complete)
    values = [float(line.customdata[0][1]) for line in figure.data]
    assert values == sorted(values)
    opacities = [line.opacity for line in figure.data]
    assert opacities == sorted(opacities)


def test_a_thinned_snapshot_keeps_the_best_and_all_numbers(run):
    most = 9
    thinned = space.snapshot(run.trials, most)
    kept = [trial for trial in thinned.trials if trial.state == TrialState.COMPLETE]
    assert len(kept) == most
    assert len(thinned.trials) == len(run.trials)
    assert {trial.number for trial in run.complete[:6]} <= {trial.number for trial in kept}
    by_number = {trial.number: trial.value for trial in run.trials}
    assert all(by_number[trial.number] == trial.value for trial in kept)


def test_winners_stand_beside_published_figures_of_the_same_data(run):
    made = bars.bars(run)
    assert [bar.accuracy for bar in made] == sorted((bar.accuracy for bar in made), reverse=True)
    groups = {group: sum(bar.group == group for bar in made) for group in {b.group for b in made}}
    assert groups == {"this run": 3, "published baselines": 6, "field's references": 12}
    figure = bars.bars_figure(made)
    ours = next(trace for trace in figure.data if trace.name == "this run")
    ends = sorted(ours.base + x for x in ours.x)
    accuracies = [100 * w["test"]["mean"]["accuracy"] for w in run.winners]
    accuracies.append(100 * run.metrics["ensemble"]["test"]["accuracy"])
    assert ends == pytest.approx(sorted(accuracies), abs=1e-3)
    stds = [100 * winner["test"]["std"]["accuracy"] for winner in run.winners]
    assert max(ours.error_x.array) == pytest.approx(max(stds))


def test_other_data_have_no_published_figures(tmp_path):
    study = made_up_run.study_of(30)
    study.set_user_attr("run", study.user_attrs["run"] | {
        "dataset": study.user_attrs["run"]["dataset"] | {"reference": "/data/fashion_mnist"}
    })  # fmt: skip
    made_up_run.write_metrics(study, tmp_path)
    other = source.read(study, tmp_path)
    assert {bar.group for bar in bars.bars(other)} == {"this run"}
    assert "WRN-28-10" not in report.html(other)


def test_the_answer_says_what_it_cost(run):
    shown = "".join(answer.parts(run))
    accuracy = run.winners[0]["test"]["mean"]["accuracy"]
    assert f"{100 * accuracy:.2f}<small> %" in shown
    assert "standard deviation over 2 seeds" in shown
    num_images = np.sum(run.winners[0]["seeds"][0]["test"]["confusion_matrix"])
    assert f"the choice of the {num_images:,} test images makes ± " in shown
    assert f"{run.saved_share:.0%}" in shown
    assert "41 min" in shown  # two winners, two seeds of 612 s


def test_confusion_over_seeds_and_the_commonest_errors():
    names = ("shirt", "coat", "bag")
    seeds = [[[8, 2, 0], [1, 9, 0], [0, 0, 0]], [[6, 3, 1], [1, 9, 0], [0, 0, 0]]]
    shares = winner_figures.confusion_shares(seeds)
    assert shares.tolist() == [[0.7, 0.25, 0.05], [0.1, 0.9, 0], [0, 0, 0]]
    assert winner_figures.most_confused(shares, names) == [
        ("shirt", "coat", 0.25), ("coat", "shirt", 0.1), ("shirt", "bag", 0.05)
    ]  # fmt: skip
    (heatmap,) = winner_figures.confusion_figure(shares, names).data
    assert heatmap.z[0] == [70.0, 25.0, 5.0]
    assert heatmap.text[0] == ["70", "25", "5.0"]
    assert heatmap.customdata[0][1] == "shirt as coat"


def test_training_and_the_gap_by_hand():
    history = {"accuracy": [0.5, 0.8], "val_accuracy": [0.6, 0.7], "loss": [1.0]}
    training = training_figures.training_of(history, "accuracy", 0.25)
    assert training == ([0.25, 0.5], [0.5, 0.8], [0.6, 0.7])
    assert training_figures.gap(training) == [-0.1, 0.1]
    assert list(training_figures.gap_figure(training, "epochs").data[0].y) == [-10.0, 10.0]
    assert training_figures.gap(training_figures.training_of(history, "loss", None)) == []


def test_calibration_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.94, 0.06], [0.55, 0.45], [0.45, 0.55]])
    bins, error = winner_figures.calibration(probabilities, np.array([0, 1, 0, 0]))
    assert [(round(b.confidence, 3), b.accuracy, b.images) for b in bins] == [
        (0.55, 0.5, 2), (0.945, 0.5, 2)
    ]  # fmt: skip
    assert error == pytest.approx((2 * 0.05 + 2 * 0.445) / 4)
    line = winner_figures.calibration_figure(bins).data[1]
    assert list(line.y) == [0.5, 0.5]


def test_roc_curves_are_scikit_learns_thinned_from_end_to_end():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 3000)
    probabilities = rng.dirichlet(np.ones(3), 3000)
    probabilities[np.arange(3000), labels] += 0.3
    false, true = winner_figures.roc(probabilities, labels, 1)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert len(false) <= 152
    from sklearn import metrics

    area = metrics.roc_auc_score(labels == 1, probabilities[:, 1])
    assert np.trapezoid(true, false) == pytest.approx(area, abs=2e-3)


def test_misclassified_images_carry_both_classes_and_the_confidence(run):
    pictures = run.pictures(run.winners[0])
    shown = images.judged(pictures, "misclassified", made_up_run.CLASSES)
    assert shown.count("<img") == len(pictures["misclassified_labels"])
    true, said = (pictures[f"misclassified_{n}"][0] for n in ("labels", "predicted"))
    first = shown.partition("</figure>")[0]
    assert made_up_run.CLASSES[true] in first
    assert made_up_run.CLASSES[said] in first
    assert f"{pictures['misclassified_confidence'][0]:.0%}" in first


def test_values_are_stretched_to_grey():
    assert images.stretched(np.array([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]
    assert images.stretched(np.zeros((2, 2))).tolist() == [[128, 128], [128, 128]]


def test_class_distribution_is_that_of_both_parts(run):
    counts = origin.class_counts(run, run.pictures(run.winners[0]))
    assert counts == {"training": [6_000] * 10, "test": [200] * 10}
    figure = origin.distribution_figure(counts, made_up_run.CLASSES)
    assert [list(trace.x) for trace in figure.data] == [[6_000] * 10, [200] * 10]


def test_the_command_to_do_it_again(run):
    assert origin.command(run) == (
        "fmnist-search --study made-up --epochs 5 --seed 0 --trials 100 --sampler tpe "
        "--pruner asha --precision bfloat16 --top 2 --seeds 3 --workers 2"
    )


def begun(folder, *, measured=False, **changed):
    """A run of 12 trials; its study says 100 of them, and `changed` of how it began."""
    study = made_up_run.study_of(12)
    study.set_user_attr("run", study.user_attrs["run"] | changed)
    if measured:
        made_up_run.write_metrics(study, folder, study_file="/home/me/mine.py")
    return source.read(study, folder)


def told(**changed):
    return made_up_run.run_attribute()["told"] | changed


def test_the_command_says_what_the_search_was_told_before_anything_is_measured(tmp_path):
    run = begun(
        tmp_path,
        file="/home/me/my studies/mine.py",
        told=told(trials=20, sampler="random", pruner="none", precision="float32"),
    )
    assert origin.command(run) == (
        "fmnist-search --study '/home/me/my studies/mine.py' --epochs 5 --seed 0 --trials 20 "
        "--sampler random --pruner none --precision float32 --top 2 --seeds 3 --workers 2"
    )


def test_what_the_search_was_told_comes_before_what_its_winners_were_trained_with(tmp_path):
    # A retraining may have another precision, and its folder's study another place.
    run = begun(tmp_path, measured=True, file="/home/me/now.py", told=told(precision="float32"))
    assert run.metrics["training"]["precision"] == "bfloat16"
    words = origin.command(run).split()
    assert words[words.index("--precision") + 1] == "float32"
    assert words[words.index("--study") + 1] == "/home/me/now.py"


@pytest.mark.parametrize(
    ("own", "began_from", "named"),
    [
        ("imagenet", {"reference": "none", "sha256": "", "label": "random weights"}, "none"),
        ("imagenet", {"reference": "imagenet", "sha256": "ab", "label": "ImageNet weights"}, None),
        (None, None, None),
    ],
)
def test_the_command_names_weights_that_are_not_the_study_s_own(tmp_path, own, began_from, named):
    described = made_up_run.run_attribute()["described"] | {"weights": own}
    command = origin.command(begun(tmp_path, described=described, weights=began_from))
    assert (f"--weights {named}" in command) if named else ("--weights" not in command)


@pytest.mark.parametrize(
    ("own", "given", "words"),
    [
        (None, 30.0, "--final-epochs 30"),
        (10.0, 2.5, "--final-epochs 2.5"),
        (10.0, 10.0, None),
        (None, None, None),
    ],
)
def test_the_command_names_final_epochs_that_are_not_the_study_s_own(tmp_path, own, given, words):
    described = made_up_run.run_attribute()["described"] | {"final_epochs": own}
    changed = {"described": described, "told": told(final_epochs=given)}
    command = origin.command(begun(tmp_path, measured=True, **changed))
    assert (words in command) if words else ("--final-epochs" not in command)


@pytest.mark.parametrize("kind", ["space", "objective"])
def test_versions_commit_and_hardware_are_there_before_anything_is_measured(tmp_path, kind):
    study = made_up_run.study_of(3, kind=kind)
    shown = "".join(origin.again_parts(source.read(study, tmp_path)))
    for words in ("Made with", "3.15.1", "0" * 40, "AMD EPYC", "seed of the study"):
        assert words in shown
    assert ("ab" * 32 in shown) == (kind == "space")  # the data set


def test_a_run_that_went_on_elsewhere_says_what_differs(tmp_path):
    first = made_up_run.MADE_WITH
    second = first | {"commit": "1" * 40}
    run = begun(tmp_path, measured=True, made_with=[first, second])
    assert [name for name, _ in origin.origins(run)] == [
        "Made with", "Gone on with", "The winners were measured with"
    ]  # fmt: skip
    shown = "".join(origin.again_parts(run))
    assert shown.count("AMD EPYC") == 1 + 1  # and in the winner's config
    assert shown.index("0" * 40) < shown.index("1" * 40)
    same = begun(tmp_path, measured=True)
    assert [name for name, _ in origin.origins(same)] == ["Made with"]


def test_of_a_search_from_random_weights_nothing_is_said_of_published_models(tmp_path):
    study = made_up_run.study_of(30)
    figures = made_up_run.write_metrics(study, tmp_path)
    figures["winners"][0]["weights"] = RANDOM
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    content = report.html(source.read(study, tmp_path))
    assert "from random weights." in content
    assert "published model" not in content


def test_a_search_that_still_runs(tmp_path):
    study = made_up_run.study_of(30)
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={
        "attempts": [{"attempt": 1, "host": "vm", "start": made_up_run.BEGAN + 30}]
    }, intermediate_values={1: 0.5}))  # fmt: skip
    shown = report.html(source.read(study, tmp_path))
    assert "No model has been measured on the test set" in shown
    assert "1 had not ended when this page was written" in shown
    assert "Learning curves" in shown
    assert "Nothing has been retrained and measured yet" in shown


@pytest.mark.parametrize("num_trials", [0, 1, 2])
def test_hardly_anything_is_a_report_too(tmp_path, num_trials):
    study = made_up_run.study_of(num_trials)
    assert "How the search went" in report.html(source.read(study, tmp_path))


def test_an_objective_of_ones_own(tmp_path):
    run = source.read(made_up_run.study_of(30, kind="objective"), tmp_path)
    shown = Page(report.html(run))
    assert "Learning curves" in shown.headings
    assert "The winners" not in shown.headings
    assert "The data" not in shown.headings
    assert origin.command(run) == (
        "fmnist-search --study made-up --seed 0 --trials 100 --sampler tpe --pruner asha "
        "--workers 2"
    )


def test_a_comparison_has_no_search_but_all_points(tmp_path):
    study = comparison(tmp_path)
    content = report.html(source.read(study, tmp_path))
    shown = Page(content)
    assert "How the search went" not in shown.headings
    assert "Beside what was published" in shown.headings
    made = bars.bars(source.read(study, tmp_path))
    assert {"mlp", "vgg16 (random weights)"} <= {bar.name for bar in made}
    assert "from random weights, where the published model" in content
    assert "<td>0.9000</td>" in content  # published beside ours
    assert origin.command(source.read(study, tmp_path)) == (
        "fmnist-search --study made-up --epochs 5 --seed 0 --precision bfloat16 --seeds 3 "
        "--workers 2"
    )


def test_a_published_figure_that_is_not_measured_here_is_said_to_be_so(tmp_path):
    study = comparison(tmp_path)
    path = tmp_path / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["winners"][0]["published"] = {"train_top5": 0.98765, "test_accuracy": 0.9}
    path.write_text(json.dumps(metrics))
    content = report.html(source.read(study, tmp_path))
    assert "<td>train top5</td><td>0.9877</td><td>not measured</td>" in content
    assert "<td>test accuracy</td><td>0.9000</td>" in content


def test_a_comparison_that_still_runs_shows_the_points_so_far(tmp_path):
    study = comparison(tmp_path)
    (tmp_path / "metrics.json").unlink()
    content = report.html(source.read(study, tmp_path))
    assert "No model has been measured on the test set" in content
    assert "<th scope=row>mlp</th><td>0.9000</td>" in content


def comparison(folder):
    study = optuna.create_study(study_name="made-up", direction="maximize")
    study.set_user_attr("run", made_up_run.run_attribute("comparison"))
    models = CategoricalDistribution(("mlp", "vgg16"))
    study.add_trial(trial_of(value=0.9, model=("mlp", models), attempts=[attempt(0, 5)]))
    study.add_trial(trial_of(value=0.8, model=("vgg16", models), attempts=[attempt(5, 9)]))
    made_up_run.write_metrics(study, folder, top=2, kind="comparison")
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["winners"][0]["published"] = {"test_accuracy": 0.9, "val_loss": 0.2}
    metrics["winners"][1]["weights"] = "random weights"
    path.write_text(json.dumps(metrics))
    return study


def test_a_run_without_pictures_says_so(small, tmp_path):
    folder, study = small
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run").rglob("*-pictures.npz"):
        path.unlink()
    assert "No images, filters or activations" in report.html(source.read(study, tmp_path / "run"))


def test_each_winner_shows_its_images_and_filters_all_but_the_first_folded(page):
    headings = Page(page).headings
    for heading in ("Misclassified images", "First-layer filters", "First-layer activation maps"):
        assert headings.count(heading) == 2
    folded = page.partition("<details><summary>made-up, trial")[2]
    assert "Misclassified images" in folded.partition("</details>")[0]


def test_of_very_many_winners_only_the_first_show_images(tmp_path, monkeypatch):
    monkeypatch.setattr(winner_section, "_MOST_WITH_IMAGES", 1)
    study = made_up_run.study_of(20)
    made_up_run.write_metrics(study, tmp_path, top=2, seeds=1)
    shown = "".join(winner_section.parts(source.read(study, tmp_path)))
    assert shown.count("Confusion matrix</h3>") == 2
    assert shown.count("Misclassified images</h3>") == 1


def test_a_report_knows_what_it_shows(tmp_path):
    study = made_up_run.study_of(3)
    path = tmp_path / "report.html"
    assert source.mark_of(path) is None
    report.write(study, tmp_path, path, "Which?")
    assert source.mark_of(path) == source.read(study, tmp_path, "Which?").mark
    seen = {source.mark_of(path), source.read(study, tmp_path, "Another?").mark}
    study.add_trial(trial_of(TrialState.RUNNING))
    seen.add(source.read(study, tmp_path, "Which?").mark)
    made_up_run.write_metrics(study, tmp_path)
    seen.add(source.read(study, tmp_path, "Which?").mark)
    assert len(seen) == 4
    path.write_text("<!doctype html>")  # somebody else's
    assert source.mark_of(path) is None


def test_a_changed_file_is_not_shown(small, tmp_path):
    folder, study = small
    shutil.copytree(folder, tmp_path / "run")
    seed = source.read(study, tmp_path / "run").winners[0]["seeds"][0]
    with (tmp_path / "run" / seed["evaluation"]).open("ab") as stream:
        stream.write(b"more")
    assert "No ROC curves and no calibration" in report.html(source.read(study, tmp_path / "run"))


def test_a_damaged_metrics_json_is_one_line(tmp_path):
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(SearchError, match=r"metrics.json can't be read"):
        source.read(made_up_run.study_of(2), tmp_path)


def test_a_run_that_has_not_begun(tmp_path):
    study = optuna.create_study(study_name="mine")
    with pytest.raises(SearchError, match=r"'mine' in .* has not begun"):
        source.read(study, tmp_path)


def test_a_search_that_went_on_after_its_winners_says_so(small):
    folder, _ = small
    more = made_up_run.study_of(15)
    shown = report.html(source.read(more, folder))
    assert "15 trials are finished, the winners are those of 12" in shown


def test_the_file_appears_whole(small, tmp_path, monkeypatch):
    folder, study = small
    path = tmp_path / "report.html"
    path.write_text("of before")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: pytest.fail("killed here"))
        with pytest.raises(pytest.fail.Exception):
            report.write(study, folder, path, "Which?")
    assert path.read_text() == "of before"
    report.write(study, folder, path, "Which?")
    assert path.read_text().startswith("<!doctype html>")
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_the_report_imports_no_keras():
    code = (
        "import sys, search.report.report\n"
        "print({'keras', 'tensorflow', 'keras_tuner', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_references_are_fractions():
    assert all(0.8 < figure < 1 for of in (references.BASELINES, references.FIELD)
               for figure in of.values())  # fmt: skip
