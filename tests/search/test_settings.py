import dataclasses
import re

import pytest

from search.errors import EXIT_USAGE, SearchError
from search.settings import (
    FIXED,
    refuse_another_space,
    refuse_differences,
    refuse_other_points,
    resolve,
)
from studies.study import Study

STUDY = Study(name="mine", space=object(), epochs=5, trials=100)
DESCRIBED = {
    "type": "described",
    "kind": "space",
    **{
        field.name: getattr(STUDY, field.name)
        for field in dataclasses.fields(Study)
        if field.name not in ("space", "objective", "known_points")
    },
}
UNITS = {"name": "units", "kind": "int", "low": 1, "high": 9, "step": 1, "log": False, "when": []}
RATE = {"name": "rate", "kind": "float", "low": 0.0, "high": 1.0, "when": []}


def settings(**options):
    return resolve(DESCRIBED, "mine.py", options)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({}, "epochs", 5),
        ({"epochs": None}, "epochs", 5),  # the option was not given
        ({"epochs": 0.5}, "epochs", 0.5),
        ({"trials": 3}, "trials", 3),
        ({}, "final_epochs", None),
        ({"final_epochs": 30.0}, "final_epochs", 30.0),
        ({}, "seed", 0),
        ({"seed": 0}, "seed", 0),
        ({"seed": 7}, "seed", 7),
        ({"sampler": "qmc"}, "sampler", "qmc"),
        ({"workers": "4", "storage": None}, "file", "mine.py"),  # no setting of a run
        ({}, "kind", "space"),
    ],
)
def test_an_option_that_was_given_comes_before_the_study_s_own(options, name, value):
    assert getattr(settings(**options), name) == value


def test_what_a_study_keeps_is_all_plain():
    assert settings(seed=3).fixed() == {
        "dataset": "fashion_mnist",
        "epochs": 5,
        "images_per_report": 12_800,
        "batch_size": 128,
        "seed": 3,
        "kind": "space",
        "weights": None,
    }


@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"epochs": 6.0}, "epochs was 5 and is now 6.0"),
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
        refuse_differences(settings().fixed(), settings(**options).fixed(), "mine", "runs/mine")
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
    refuse_differences(settings().fixed(), settings(**options).fixed(), "mine", "runs/mine")


def test_a_study_of_an_earlier_version_may_lack_a_field():
    stored = {name: value for name, value in settings().fixed().items() if name != FIXED[-1]}
    refuse_differences(stored, settings().fixed(), "mine", "runs/mine")


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
