import optuna
import pytest
from optuna.trial import TrialState, create_trial

from search import pruning
from search.pruning import SuccessiveHalvingOfReports


@pytest.fixture(autouse=True)
def _no_log():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_with(*trials, direction="maximize"):
    """A real study of trials given as (state, reports by step) or as reports alone."""
    study = optuna.create_study(direction=direction)
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
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_complete_trial_beats_those_behind_it_at_the_same_report(direction, other, is_beaten):
    sign = 1 if direction == "maximize" else -1
    state, reports = other
    study = study_with(
        (state, {step: sign * value for step, value in reports.items()}), direction=direction
    )
    study.add_trial(
        create_trial(state=TrialState.RUNNING, intermediate_values={1: sign * 0.5, 2: sign * 0.2})
    )
    assert pruning.is_beaten(study, study.trials[-1]) is is_beaten


@pytest.mark.parametrize(
    ("others", "own", "is_pruned"),
    [([0.1, 0.2], 0.05, False), ([0.1, 0.2], 0.15, True), ([0.1, 0.2], 0.1, False)],
)
def test_the_lowest_go_on_when_minimising(others, own, is_pruned):
    study = study_with(*[{1: value} for value in others], direction="minimize")
    assert asked(study, {1: own}, SuccessiveHalvingOfReports(1, 3)) is is_pruned


@pytest.mark.parametrize(
    ("first_rung", "factor", "rungs"),
    [(1, 3, {1, 2, 4, 8, 16}), (2, 3, {2, 4, 8, 16}), (3, 4, {3, 6, 12}), (5, 2, {5, 10})],
)
def test_only_a_rung_prunes(first_rung, factor, rungs):
    pruner = SuccessiveHalvingOfReports(first_rung, factor)
    steps = range(1, 20)
    rest = dict.fromkeys(steps, 0.9)
    pruned_at = {
        last
        for last in steps
        if asked(study_with(*[rest] * factor), dict.fromkeys(range(1, last + 1), 0.1), pruner)
    }
    assert pruned_at == rungs
    assert {step for step in range(30) if pruner.is_rung(step) and step in steps} == rungs


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


def test_the_best_so_far_is_the_lowest_when_minimising():
    study = study_with({1: 0.2, 4: 0.2}, {1: 0.3, 4: 0.3}, direction="minimize")
    assert asked(study, {1: 0.1, 4: 0.9}, SuccessiveHalvingOfReports(1, 3)) is False


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


def test_those_that_never_came_to_the_rung_do_not_count():
    study = study_with({1: 0.9}, {1: 0.9, 2: 0.9}, {1: 0.05, 4: 0.05})
    assert asked(study, {1: 0.1, 4: 0.1}, SuccessiveHalvingOfReports(1, 3)) is False


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
    ("name", "pruned_at"), [("none", []), ("median", [2, 3, 4, 5, 6]), ("asha", [2, 4])]
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
