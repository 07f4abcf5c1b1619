import dataclasses
import re

import pytest

from search.errors import EXIT_USAGE, SearchError
from search.settings import FIXED, refuse_another_space, refuse_differences, resolve
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
