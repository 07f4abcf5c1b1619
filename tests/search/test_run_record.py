"""What a study keeps of the run it began as: a later call may not ask another question."""

import re
from types import SimpleNamespace

import pytest

from search import provenance, run_record
from search.errors import EXIT_USAGE, SearchError
from search.run_record import refuse_another_space, refuse_differences, refuse_other_points
from tests import made_up_run
from tests.search.test_settings import settings

UNITS = {"name": "units", "kind": "int", "low": 1, "high": 9, "step": 1, "log": False, "when": []}
RATE = {"name": "rate", "kind": "float", "low": 0.0, "high": 1.0, "when": []}


def fixed(**options):
    return settings(**options).fixed()


@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"epochs": 6.0}, "epochs was 5 and is now 6.0"),
        ({"average_weights": False}, "average_weights was True and is now False"),
        ({"dataset": "digits"}, "dataset was 'fashion_mnist' and is now 'digits'"),
        (
            {"seed": 1, "dataset": "digits"},
            "dataset was 'fashion_mnist' and is now 'digits'; seed was 0 and is now 1",
        ),
    ],
)
def test_another_question_is_refused_and_the_differences_are_named(options, said):
    rule = rf"runs/mine holds a study 'mine' of another kind: {re.escape(said)}\. Give the values"
    with pytest.raises(SearchError, match=rule) as caught:
        refuse_differences(fixed(), fixed(**options), "mine", "runs/mine")
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epochs": 5.0},
        {"trials": 500},
        {"sampler": "random", "pruner": "none"},
        {"max_attempts": 9, "precision": "float32", "time_budget": 1.0, "top": 2, "seeds": 1},
    ],
)
def test_what_may_change_between_two_starts(options):
    refuse_differences(fixed(), fixed(**options), "mine", "runs/mine")


@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    ("kept", "said"),
    [({"dataset": {}}, 0), ({"format": run_record.FORMAT + 1}, run_record.FORMAT + 1)],
)
def test_a_run_that_another_version_keeps_otherwise_is_refused(tmp_path, kept, said):
    study = SimpleNamespace(user_attrs={"run": kept})
    with pytest.raises(
        SearchError, match=rf"format {said}, this one's is \d.*take another --out"
    ) as caught:
        run_record.of(study, tmp_path)
    assert caught.value.exit_code == EXIT_USAGE
    now = {"format": run_record.FORMAT}
    assert run_record.of(SimpleNamespace(user_attrs={"run": now}), tmp_path) == now
    assert run_record.of(SimpleNamespace(user_attrs={}), tmp_path) is None  # killed before it


@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    ("now", "said"),
    [
        ([RATE], "units is gone"),
        ([UNITS], "rate is gone"),
        ([RATE, UNITS, RATE | {"name": "more"}], "more is new"),
        ([RATE, UNITS | {"high": 10}], "units was {.*'high': 9.*} and is now {.*'high': 10"),
        ([RATE | {"kind": "int"}, UNITS], "rate was {'kind': 'float'.* now {'kind': 'int'"),
        (
            [RATE | {"when": [{"name": "kind", "values": ["a"]}]}, UNITS],
            r"rate was .*'when': \[\]} and is now .*'values': \['a'\]",
        ),
        ([RATE, UNITS, UNITS | {"low": 2}], "units was {.*} and is now {.*} or {.*'low': 2"),
        ([], "rate is gone; units is gone"),
    ],
)
def test_another_space_is_refused_and_the_differences_are_named(now, said):
    rule = rf"holds a study 'mine' with another space: {said}.*Put the space back"
    with pytest.raises(SearchError, match=rule) as caught:
        refuse_another_space([RATE, UNITS], now, "mine", "runs/mine")
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("now", [[RATE, UNITS], [UNITS, RATE]])
def test_the_order_of_a_space_is_free(now):
    refuse_another_space([RATE, UNITS], now, "mine", "runs/mine")


POINTS = [{"units": 1}, {"units": 2, "rate": 0.5}]


@pytest.mark.fault("S8")
@pytest.mark.parametrize("may_grow", [True, False])
@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            [{"units": 1}, {"units": 3, "rate": 0.5}],
            "1 was {'units': 2, .*} and is now {'units': 3",
        ),
        ([{"units": 1}], "1 was {'units': 2, .*} and is now none"),
        ([], "0 was {'units': 1} and is now none"),
        (POINTS[::-1], "0 was {'units': 1} and is now {'units': 2,"),
        # In front it takes another's place, and that one's figures.
        ([{"units": 9}, *POINTS], "0 was {'units': 1} and is now {'units': 9}"),
        ([{"units": 9}, POINTS[1], {"units": 8}], "0 was {'units': 1} and is now {'units': 9}"),
    ],
)
def test_other_known_points_are_refused_and_the_first_is_named(now, said, may_grow):
    rule = rf"runs/mine holds a study 'mine' with other known_points: number {said}.*Put them back"
    with pytest.raises(SearchError, match=rule) as caught:
        refuse_other_points(POINTS, now, "mine", "runs/mine", may_grow=may_grow)
    assert caught.value.exit_code == EXIT_USAGE


def test_a_search_tries_a_known_point_that_was_added_and_a_comparison_refuses_it():
    now = [*POINTS, {"units": 3}]
    refuse_other_points(POINTS, now, "mine", "runs/mine", may_grow=True)
    refuse_other_points([], POINTS, "mine", "runs/mine", may_grow=True)
    for may_grow in (True, False):
        refuse_other_points(POINTS, POINTS, "mine", "runs/mine", may_grow=may_grow)
    rule = "number 2 was none and is now {'units': 3}"
    with pytest.raises(SearchError, match=rule) as caught:
        refuse_other_points(POINTS, now, "mine", "runs/mine", may_grow=False)
    assert caught.value.exit_code == EXIT_USAGE


def test_a_comparison_that_is_trained_again_was_told_its_precision_of_now():
    # All its trials are finished, but a search's would still be those of the precision before.
    before = {"told": {"precision": "bfloat16", "sampler": "random"}}
    fields = {"trials": 2, "sampler": "tpe", "pruner": "asha", "final_epochs": None}
    fields |= {"top": 1, "seeds": 3}
    for kind, precision in (("comparison", "float32"), ("space", "bfloat16")):
        settings = SimpleNamespace(kind=kind, **fields)
        told = run_record.told(before, settings, "float32", 2, searches=False)
        assert told["precision"] == precision


def test_what_later_trials_have_otherwise_is_said():
    told = {"sampler": "tpe", "pruner": "asha", "precision": "bfloat16"}
    now = {"told": told | {"sampler": "random", "precision": "float32"}}
    sampler, precision = run_record.changed({"told": told}, now)
    assert sampler.startswith("sampler was tpe until now: trials from here on have random")
    assert precision.startswith(
        "precision was bfloat16 until now: trials from here on have float32"
    )
    assert run_record.changed(None, now) == run_record.changed(now, now) == []


def test_what_a_run_is_made_with_is_kept_of_each_machine_once(monkeypatch):
    begun = made_up_run.study_of(3).user_attrs["run"]
    first = run_record.made_with(begun)
    assert first[0] == made_up_run.MADE_WITH
    now = first[-1]
    assert now["versions"]["optuna"]
    assert now["hardware"]["cores"] >= 1
    assert run_record.made_with(begun | {"made_with": first}) == first
    assert run_record.made_with(None) == [now]
    other = now | {"commit": "2" * 40}
    monkeypatch.setattr(provenance, "collect", lambda: other)
    assert run_record.made_with(begun | {"made_with": first}) == [*first, other]
