import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from search import pruning
from search.pruning import Standing, SuccessiveHalvingOfReports


@pytest.fixture(autouse=True)
def _no_log():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_with(*trials):
    """A real study of trials given as (state, reports by step) or as reports alone."""
    study = optuna.create_study(direction="maximize")
    for given in trials:
        state, reports = given if isinstance(given, tuple) else (TrialState.PRUNED, given)
        value = {"value": 0.5} if state == TrialState.COMPLETE else {}
        study.add_trial(create_trial(state=state, intermediate_values=reports, **value))
    return study


def asked(study, reports, pruner):
    """The answer for one more trial, which has come as far as its last report."""
    study.add_trial(create_trial(state=TrialState.RUNNING, intermediate_values=reports))
    return pruner.prune(study, study.trials[-1])


@pytest.mark.parametrize(
    ("factor", "others", "own", "is_pruned"),
    [
        # The first to arrive goes on, and of those before there are `factor` the best so far.
        (3, [], 0.1, False),
        (3, [0.9], 0.1, True),
        (3, [0.9], 0.95, False),
        (3, [0.9], 0.9, False),
        (2, [], 0.1, False),
        # From `factor` on, the best 1/factor, rounded down.
        (3, [0.9, 0.8], 0.95, False),
        (3, [0.9, 0.8], 0.85, True),
        (3, [0.9, 0.8], 0.1, True),
        (3, [0.9, 0.8, 0.7, 0.6], 0.85, True),
        (3, [0.9, 0.8, 0.7, 0.6, 0.5], 0.85, False),
        (3, [0.9, 0.8, 0.7, 0.6, 0.5], 0.75, True),
        (2, [0.9], 0.8, True),
        (2, [0.9], 0.95, False),
        (2, [0.9, 0.8, 0.7], 0.85, False),
        (4, [0.9, 0.8], 0.85, True),
        (4, [0.9, 0.8], 0.95, False),
        (4, [0.9, 0.8, 0.7], 0.85, True),
        # Who is as good as the last that goes on goes on as well.
        (3, [0.9, 0.8], 0.9, False),
        (3, [0.9, 0.9], 0.9, False),
        (3, [0.9, 0.8, 0.8, 0.8, 0.8], 0.8, False),
        (3, [0.9, 0.85, 0.8, 0.8, 0.8], 0.8, True),
    ],
)
def test_one_in_factor_goes_on(factor, others, own, is_pruned):
    study = study_with(*[{1: value} for value in others])
    pruner = SuccessiveHalvingOfReports(1, factor)
    assert asked(study, {1: own}, pruner) is is_pruned


@pytest.mark.parametrize(
    ("other", "is_beaten"),
    [
        ((TrialState.COMPLETE, {1: 0.3, 2: 0.6, 3: 0.4}), True),
        ((TrialState.COMPLETE, {1: 0.6, 2: 0.1}), True),  # its best until then
        ((TrialState.COMPLETE, {1: 0.3, 2: 0.5, 3: 0.9}), False),  # ahead only later
        ((TrialState.COMPLETE, {1: 0.9}), False),  # it never came as far
        ((TrialState.PRUNED, {1: 0.9, 2: 0.9}), False),
    ],
)
def test_a_complete_trial_beats_those_behind_it_at_the_same_report(other, is_beaten):
    study = study_with(other)
    study.add_trial(create_trial(state=TrialState.RUNNING, intermediate_values={1: 0.5, 2: 0.2}))
    assert pruning.is_beaten(study, study.trials[-1]) is is_beaten


@pytest.mark.parametrize(
    ("first_rung", "factor", "rungs"),
    [(1, 3, [1, 2, 4, 8, 16]), (2, 3, [2, 4, 8, 16]), (3, 4, [3, 6, 12]), (5, 2, [5, 10])],
)
def test_rungs_double(first_rung, factor, rungs):
    pruner = SuccessiveHalvingOfReports(first_rung, factor)
    steps = [pruner.rung(step) for step in range(20)]
    assert steps[:first_rung] == [None] * first_rung
    assert sorted(set(steps[first_rung:])) == rungs
    assert all(steps[rung] == rung for rung in rungs)


@pytest.mark.parametrize("last", range(1, 20))
def test_from_the_first_rung_on_every_report_may_end_it(last):
    study = study_with(*[dict.fromkeys(range(1, 20), 0.9)] * 3)
    own = dict.fromkeys(range(1, last + 1), 0.1)
    assert asked(study, own, SuccessiveHalvingOfReports(3, 3)) is (last >= 3)


@pytest.mark.parametrize(
    ("other", "own", "is_pruned"),
    [
        # It was the first at rung 2, and is held against who came there later.
        ({1: 0.2, 2: 0.9}, {1: 0.5, 2: 0.6, 3: 0.7}, True),
        ({1: 0.2, 2: 0.5}, {1: 0.5, 2: 0.6, 3: 0.4}, False),
        # Only at the last rung that it has come to: who was ahead before it is not now.
        ({1: 0.9, 2: 0.9, 4: 0.9}, {1: 0.1, 2: 0.1, 4: 0.95}, False),
        ({1: 0.9, 2: 0.9}, {1: 0.1, 2: 0.1, 4: 0.95}, False),
        # What the other reached behind the rung is for the next one.
        ({1: 0.5, 2: 0.5, 3: 0.9}, {1: 0.4, 2: 0.6, 3: 0.6}, False),
        # Its own counts: the best of all never ends.
        ({1: 0.5, 2: 0.7}, {1: 0.4, 2: 0.6, 3: 0.8}, False),
    ],
)
def test_between_two_rungs_it_is_held_against_others_at_the_last_one(other, own, is_pruned):
    running = (TrialState.RUNNING, other)
    assert asked(study_with(running), own, SuccessiveHalvingOfReports(1, 3)) is is_pruned


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE])
@pytest.mark.parametrize(
    ("other", "is_pruned"),
    [
        ({1: 0.6}, True),  # better already
        ({1: 0.5}, False),
        ({1: 0.4}, False),
        ({}, False),
    ],
)
def test_who_has_not_come_as_far_and_is_better_is_ahead(state, other, is_pruned):
    study = study_with((state, other))
    assert asked(study, {1: 0.3, 4: 0.5}, SuccessiveHalvingOfReports(1, 3)) is is_pruned


def test_who_broke_a_constraint_sets_no_bar():
    """One that was good until it diverged would end all after it, and none would be complete."""
    study = study_with()
    trial = study.ask()
    trial.report(0.9, 1)
    trial.set_constraint("diverged", 1.0)
    study.tell(trial, state=TrialState.PRUNED)
    assert asked(study, {1: 0.1, 4: 0.1}, SuccessiveHalvingOfReports(1, 3)) is False


def test_who_has_not_come_as_far_and_is_worse_lets_nobody_else_go_on():
    """One in two of those that are compared: two of these have come as far."""
    study = study_with(*[{1: 0.1}] * 8, {1: 0.3, 4: 0.9}, {1: 0.3, 4: 0.8})
    assert asked(study, {1: 0.3, 4: 0.7}, SuccessiveHalvingOfReports(1, 2)) is True


@pytest.mark.parametrize(("step", "is_pruned"), [(5, False), (10, True), (15, True)])
def test_reports_need_not_come_at_the_rungs(step, is_pruned):
    """An objective may report every tenth step: what was reached until the rung counts."""
    study = study_with(dict.fromkeys((5, 10, 15), 0.9))
    own = dict.fromkeys(range(5, step + 1, 5), 0.1)
    assert asked(study, own, SuccessiveHalvingOfReports(1, 3)) is is_pruned


def counted(study, trial):
    """Its standing where one in three goes on, from the rule alone."""
    rung = max(rung for rung in (1, 2, 4, 8, 16, 32, 64, 128, 256) if rung <= trial.last_step)
    value, of, ahead = max(trial.intermediate_values.values()), 0, 0
    for other in study.get_trials(deepcopy=False):
        reports = [value for step, value in other.intermediate_values.items() if step <= rung]
        if other.number == trial.number or other.state == TrialState.FAIL or not reports:
            continue
        is_better = max(reports) > value
        of += is_better or other.last_step >= rung
        ahead += is_better
    return Standing(ahead + 1, of + 1, max(1, (of + 1) // 3), rung)


def test_trials_that_begin_and_end_meanwhile_are_seen():
    """What it keeps of finished trials is what anybody finds who counts all of them."""
    rng, kept = np.random.default_rng(0), SuccessiveHalvingOfReports(1, 3)
    study = optuna.create_study(direction="maximize")
    running, ended = [], [TrialState.FAIL, TrialState.COMPLETE, TrialState.PRUNED]
    answers = []
    for _ in range(150):
        if len(running) < 5:
            running.append(study.ask())
        trial = running[rng.integers(len(running))]
        stored = study.get_trials(deepcopy=False)[trial.number]
        trial.report(rng.uniform(0.1, 1), (stored.last_step or 0) + int(rng.integers(1, 3)))
        asked_of = study.get_trials(deepcopy=False)[trial.number]
        answers.append(kept.standing(study, asked_of))
        assert answers[-1] == counted(study, asked_of)
        if kept.prune(study, asked_of) or rng.uniform() < 0.1:
            state = ended[rng.integers(3)]
            study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state=state)
            running.remove(trial)
            told = study.get_trials(deepcopy=False)[trial.number]
            assert kept.standing(study, told) == answers[-1]
    assert {answer.place > answer.going_on for answer in answers} == {True, False}


def test_a_trial_without_a_report_goes_on():
    study = study_with(*[{1: 0.9}] * 5)
    assert asked(study, {}, SuccessiveHalvingOfReports(1, 3)) is False


@pytest.mark.parametrize(
    ("others", "own", "is_pruned"),
    [
        # Own best so far, not the last.
        ([{1: 0.8, 4: 0.8}, {1: 0.7, 4: 0.7}], {1: 0.9, 2: 0.5, 4: 0.1}, False),
        # The others' best until the rung, wherever it was before.
        ([{1: 0.8, 2: 0.95, 4: 0.1}, {1: 0.7, 4: 0.7}], {1: 0.5, 2: 0.5, 4: 0.9}, True),
        # What came after the rung does not count.
        ([{1: 0.5, 2: 0.99}, {1: 0.4, 2: 0.99}], {1: 0.6}, False),
    ],
)
def test_the_best_so_far_counts(others, own, is_pruned):
    assert asked(study_with(*others), own, SuccessiveHalvingOfReports(1, 3)) is is_pruned


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        (TrialState.COMPLETE, True),
        (TrialState.PRUNED, True),
        (TrialState.RUNNING, True),
        (TrialState.FAIL, False),
        (TrialState.WAITING, False),
    ],
)
def test_whose_reports_count(state, counts):
    study = study_with((state, {1: 0.9}), (state, {1: 0.8}))
    assert asked(study, {1: 0.1}, SuccessiveHalvingOfReports(1, 3)) is counts


@pytest.mark.parametrize(("own", "is_pruned"), [(0.1, True), (0.95, False)])
def test_asked_again_it_says_the_same_and_writes_nothing(own, is_pruned):
    study = study_with({1: 0.9}, {1: 0.8})
    pruner = SuccessiveHalvingOfReports(1, 3)
    first = asked(study, {1: own}, pruner)
    before = (study.trials, study.user_attrs, study._storage.get_study_system_attrs(0))
    # A new one has no memory: so it is after a crash.
    again = [pruner.prune(study, study.trials[-1]) for _ in range(3)]
    again.append(SuccessiveHalvingOfReports(1, 3).prune(study, study.trials[-1]))
    assert [first, *again] == [is_pruned] * 5
    assert (study.trials, study.user_attrs, study._storage.get_study_system_attrs(0)) == before
    assert study.trials[-1].system_attrs == study.trials[-1].user_attrs == {}


def test_it_prunes_through_optuna():
    study = optuna.create_study(direction="maximize", pruner=SuccessiveHalvingOfReports(1, 2))
    answers = []
    for value in (0.9, 0.1, 0.95):
        trial = study.ask()
        trial.report(value, 1)
        answers.append(trial.should_prune())
    assert answers == [False, True, False]


@pytest.mark.parametrize(("first_rung", "factor"), [(0, 3), (-1, 3), (1, 1), (2, 0)])
def test_bad_arguments_are_refused_with_their_values(first_rung, factor):
    message = (
        f"`first_rung >= 1` and `reduction_factor >= 2` must hold. Received: "
        f"first_rung={first_rung}, reduction_factor={factor}$"
    )
    with pytest.raises(ValueError, match=message):
        SuccessiveHalvingOfReports(first_rung, factor)


@pytest.mark.parametrize(
    ("name", "pruned_at"), [("none", []), ("median", [2, 3, 4, 5, 6]), ("asha", [2, 3, 4, 5, 6])]
)
def test_the_table_of_pruners(name, pruned_at):
    pruner = pruning.pruner(name, first_rung=2, reduction_factor=3)
    curve = dict.fromkeys(range(1, 7), 0.9)
    answers = {
        step: asked(
            study_with(*[(TrialState.COMPLETE, curve)] * 6),
            dict.fromkeys(range(1, step + 1), 0.1),
            pruner,
        )
        for step in range(1, 7)
    }
    assert [step for step, is_pruned in answers.items() if is_pruned] == pruned_at
