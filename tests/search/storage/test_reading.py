import gc
import math

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState, create_trial

from search.storage import reading, storage


@pytest.fixture
def url(tmp_path):
    """A study in the second place of its file, with a trial of each kind."""
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(storage=url, study_name="first").ask()
    study = optuna.create_study(storage=url, study_name="mine", direction="maximize")
    for number in range(6):
        params = {"rate": 10.0**-number, "units": 16 + number, "kind": "ab"[number % 2]}
        ranges = {
            "rate": FloatDistribution(1e-9, 1.0, log=True),
            "units": IntDistribution(16, 256, log=True),
            "kind": CategoricalDistribution(["a", "b"]),
        }
        if number % 2:
            params["momentum"], ranges["momentum"] = 0.5, FloatDistribution(0.0, 0.9, step=0.1)
        state = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)[number % 3]
        trial = create_trial(
            state=state,
            value=number / 8 if state == TrialState.COMPLETE else None,
            params=params,
            distributions=ranges,
            intermediate_values={1: 0.5, 2: math.inf, 3: math.nan, 10: -1e30},
            user_attrs={"history": {"1": {"loss": 0.5}}, "none": None},
            system_attrs={"constraints": [1.0]},
        )
        study.add_trial(trial)
    study.enqueue_trial({"rate": 0.5}, user_attrs={"known_point": 0})
    asked = study.ask()
    asked.suggest_float("rate", 1e-9, 1.0, log=True)
    asked.report(0.25, 1)
    study.enqueue_trial({"rate": 0.25})
    return url


def shown(trials):
    """All that a trial has; Optuna's own comparison finds no NaN equal to another."""
    return [repr(sorted(vars(trial).items())) for trial in trials]


@pytest.mark.parametrize(
    ("states", "among", "after", "count"),
    [
        (None, set(), -1, 8),
        ((TrialState.COMPLETE, TrialState.PRUNED), set(), -1, 4),
        (None, {3, 5}, 6, 5),
        ((TrialState.RUNNING,), {3}, 4, 1),
        (None, set(), 100, 0),
    ],
)
def test_trials_are_as_optuna_reads_them(url, states, among, after, count):
    storage = RDBStorage(url)
    study_id = storage.get_study_id_from_name("mine")
    expected = storage._get_trials(study_id, states, among, after)
    assert len(expected) == count
    assert shown(reading.read(storage.engine, study_id, states, among, after)) == shown(expected)
    storage.remove_session()
    storage.engine.dispose()


def test_attributes_of_a_study_are_as_optuna_reads_them(url):
    study = optuna.load_study(study_name="mine", storage=url)
    study.set_user_attr("run", {"trials": 3, "names": ["a", None]})
    study._storage.set_study_system_attr(study._study_id, "note", "é")
    optuna.load_study(study_name="first", storage=url).set_user_attr("run", "another's")
    storage = RDBStorage(url)
    for model, plain in (
        (models.StudyUserAttributeModel, storage.get_study_user_attrs),
        (models.StudySystemAttributeModel, storage.get_study_system_attrs),
    ):
        expected = plain(study._study_id)
        assert expected
        assert reading.study_attributes(storage.engine, model, study._study_id) == expected
    storage.remove_session()
    storage.engine.dispose()


def test_the_collector_runs_again_after_reading(url):
    storage = RDBStorage(url)
    reading.read(storage.engine, 1, None, set(), -1)
    assert gc.isenabled()
    storage.engine.dispose()
    with pytest.raises(sqlalchemy.exc.OperationalError):
        reading.read(sqlalchemy.create_engine("sqlite://"), 1, None, set(), -1)
    assert gc.isenabled()


@pytest.mark.parametrize("number", range(1, 7))  # the tables' SELECTs
@pytest.mark.parametrize("states", [None, (TrialState.RUNNING,)])
def test_a_trial_that_ends_before_a_select_is_running_or_complete(tmp_path, number, states):
    study = storage.at(f"sqlite:///{tmp_path}/study.db").open("mine")
    trial = study.ask()
    trial.suggest_float("rate", 0.0, 1.0)
    engine = storage.at(f"sqlite:///{tmp_path}/study.db").reader().engine
    selects = []

    def end(*event):
        selects.append(event[2])
        if len(selects) == number:
            with storage.together(study):
                trial.report(0.5, 1)
                trial.set_user_attr("seconds", 2.0)
                study._storage.set_trial_system_attr(trial._trial_id, "constraints", [1.0])
                study.tell(trial, 0.75)
            study.add_trial(create_trial(value=0.25))  # unknown to the first SELECT, in the others

    sqlalchemy.event.listen(engine, "before_cursor_execute", end)
    read = reading.read(engine, study._study_id, states, set(), -1)
    assert len(selects) == 6
    told = study.get_trials(deepcopy=False)
    finished = [trial for trial in read if trial.state.is_finished()]
    assert shown(finished) == shown(told[trial.number] for trial in finished)
    assert len(finished) == (2 if number == 1 and not states else 0)
    for running in read[len(finished) :]:
        assert (running.state, running.params) == (TrialState.RUNNING, told[0].params)
        assert running.values is running.datetime_complete is None
    assert len(read) == (len(finished) if number == 1 else 1)
