import math
from contextlib import suppress

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from search.storage import storage


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def study(url):
    opened = storage.at(url).open("mine")
    opened.sampler = optuna.samplers.RandomSampler(seed=1)
    return opened


@pytest.fixture
def commits(study):
    """Grows by one with each transaction."""
    counted = []
    sqlalchemy.event.listen(study._storage._backend.engine, "commit", counted.append)
    return counted


def known(study):
    attrs = study._storage.get_study_system_attrs(study._study_id)
    return study.trials, study.user_attrs, attrs, study.directions


def check_stored(study, url):
    """Another process reads what this one has in memory."""
    assert known(storage.read_study(url, "mine")) == known(study)
    assert known(storage.at(url).open("mine")) == known(study)


def ask(study):
    trial = study.ask()
    trial.suggest_float("rate", 1e-4, 1e-1, log=True)
    trial.suggest_int("units", 16, 64, step=16)
    trial.suggest_categorical("kind", ["a", None, True, 1.5])
    return trial


def report(study, trial, step, value):
    study._storage.set_trial_intermediate_value(trial._trial_id, step, value)


def complete(study):
    trial = ask(study)
    for step in (1, 2, 3):
        report(study, trial, step, step / 4)
    trial.set_user_attr("history", {"1": {"loss": math.inf}})
    study.tell(trial.number, 0.75)


def pruned(study):
    trial = ask(study)
    report(study, trial, 1, math.inf)
    trial.set_constraint("diverged", 1.0)
    study.tell(trial.number, None, TrialState.PRUNED)


def failed(study):
    study.tell(ask(study).number, None, TrialState.FAIL)


def infinite(study):
    study.tell(ask(study).number, -math.inf)


def running(study):
    trial = ask(study)
    report(study, trial, 1, 0.5)
    report(study, trial, 1, 0.25)


def shortened(study):
    trial = ask(study)
    for step in range(1, 6):
        report(study, trial, step, 0.5)
    storage.drop_reports_after(study, trial._trial_id, 2)
    report(study, trial, 4, 0.25)


def enqueued(study):
    study.enqueue_trial({"rate": 0.01, "units": 32, "kind": None}, user_attrs={"known_point": 0})


def asked_for(study):
    enqueued(study)
    complete(study)


def added(study):
    made = optuna.trial.create_trial(
        state=TrialState.COMPLETE, value=1.0, intermediate_values={1: 0.5}, user_attrs={"a": [1]}
    )
    study.add_trial(made)


def attributed(study):
    study.set_user_attr("run", {"sizes": (1, 2), 3: "a key that JSON makes a text"})
    study.set_user_attr("run", {"sizes": (1, 2), 4: "again"})
    study._storage.set_study_system_attr(study._study_id, "dashboard:note_ver", 1)


ACTS = (complete, pruned, failed, infinite, running, shortened, enqueued, asked_for, added)


@pytest.mark.parametrize("act", [*ACTS, attributed])
@pytest.mark.parametrize("is_together", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_is_written_is_what_optuna_reads(study, url, act, is_together):
    complete(study)
    storage.at(url).open("another").ask()  # its trials are others of the same table
    for _ in range(2):
        if is_together:
            with storage.together(study):
                act(study)
        else:
            act(study)
        check_stored(study, url)


def test_together_is_one_transaction_at_its_end(study, url, commits):
    trials = [ask(study), ask(study)]
    before = len(commits)
    with storage.together(study):
        for trial in trials:
            report(study, trial, 1, 0.5)
            with storage.together(study):  # no end of its own
                trial.set_user_attr("history", {"1": {}})
            trial.suggest_float("late", 0.0, 1.0)
        study.tell(trials[0].number, 0.5)
        study.set_user_attr("run", {})
        assert study.trials[0].state == TrialState.COMPLETE
        assert len(commits) == before
        assert storage.read_study(url, "mine").trials[0].intermediate_values == {}
    assert len(commits) == before + 1
    check_stored(study, url)


def test_nothing_to_write_is_no_transaction(study, commits):
    with storage.together(study):
        assert study.trials == []
    assert commits == []


def test_what_was_written_before_an_error_is_stored(study, url):
    trial = ask(study)
    with suppress(ZeroDivisionError), storage.together(study):
        report(study, trial, 1, 0.5)
        raise ZeroDivisionError
    check_stored(study, url)
    assert study.trials[0].intermediate_values == {1: 0.5}


def test_what_is_known_is_not_read_again(study, url):
    complete(study)
    running(study)
    statements = []
    engine = study._storage._backend.engine
    sqlalchemy.event.listen(engine, "before_execute", lambda *of: statements.append(of[1]))
    with storage.together(study):
        report(study, study.trials[1], 2, 0.5)
        assert len(study.get_trials(deepcopy=False)) == 2
        assert study.best_trial.value == 0.75
        assert study.user_attrs == {}
    assert len(statements) == 1


def test_what_can_t_be_stored_is_not_kept(study, url):
    trial = ask(study)
    with pytest.raises(TypeError):
        trial.set_user_attr("a", object())
    check_stored(study, url)


def test_a_finished_trial_is_not_written_again(study):
    complete(study)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        report(study, study.trials[0], 4, 0.5)
    with pytest.raises(ValueError, match="dynamic value space"):
        study.ask().suggest_categorical("kind", ["another"])


def test_it_is_the_storage_of_one_study(study):
    with pytest.raises(NotImplementedError, match="of one study"):
        optuna.create_study(storage=study._storage)
    with pytest.raises(NotImplementedError, match="of one study"):
        optuna.delete_study(study_name="mine", storage=study._storage)
