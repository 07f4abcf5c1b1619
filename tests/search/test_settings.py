import dataclasses

import pytest

from search.errors import EXIT_USAGE, SearchError
from search.settings import resolve
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
        "average_weights": True,
        "seed": 3,
        "kind": "space",
        "weights": None,
    }


@pytest.mark.parametrize(
    ("changed", "option", "rule"),
    [
        ({"kind": "comparison"}, {"trial_timeout": 60.0}, "compares 100 named.*--trial-timeout"),
        ({"kind": "objective"}, {"dataset": "digits"}, "objective of its own.*--dataset can't"),
        ({"kind": "objective"}, {"final_epochs": 3.0}, "--final-epochs can't apply. Leave it out"),
        ({}, {"weights": "none"}, "begins from no pretrained weights"),
    ],
)
def test_an_option_of_no_use_is_refused(changed, option, rule):
    with pytest.raises(SearchError, match=rule) as caught:
        resolve(DESCRIBED | changed, "mine.py", option)
    assert caught.value.exit_code == EXIT_USAGE
    resolve(DESCRIBED | changed, "mine.py", {"seed": 3, "workers": "2", "max_attempts": 3})
