import functools
import json
import math

import numpy as np
import optuna
import pytest

from search.pruning import SuccessiveHalvingOfReports, is_beaten
from tests.benchmarks import replay
from tests.benchmarks.replay import Outcome, Policy

NUM_REPORTS = 8
SGD = [{"name": "optimizer", "values": ["sgd"]}]
SPACE = [
    {"name": "rate", "kind": "float", "low": 1e-4, "high": 1.0, "step": None, "log": True},
    {"name": "units", "kind": "int", "low": 16, "high": 256, "step": 16, "log": False},
    {"name": "optimizer", "kind": "categorical", "choices": ["adam", "sgd"]},
    {"name": "momentum", "kind": "float", "low": 0.0, "high": 0.9, "step": None, "log": False},
]
SPACE = [hp | {"when": SGD if hp["name"] == "momentum" else []} for hp in SPACE]


def stored(points, *, known=()):
    """A table of made-up curves: rate 0.01 is best, many units are good and slow; each report
    takes units / 16 seconds, and 1 to measure."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, NUM_REPORTS + 1)
    ends = np.array(
        [0.9 - 0.03 * abs(math.log10(p["rate"]) + 2) - 0.2 / p["units"] for p in points]
    ) + rng.normal(0, 0.001, len(points))
    monitor = ends[:, np.newaxis] - 0.3 / steps + rng.normal(0, 0.003, (len(points), NUM_REPORTS))
    units = np.array([p["units"] for p in points])
    return {
        "space": json.dumps(SPACE),
        "params": [json.dumps(point) for point in points],
        "known": [at in known for at in range(len(points))],
        "flops": units * 1e6,
        "start": np.full(len(points), 3.0),
        "final": np.full(len(points), 4.0),
        "train": np.repeat(units[:, np.newaxis] / 16, NUM_REPORTS, 1),
        "measure": np.ones_like(monitor),
        "loss": np.ones_like(monitor),
        "monitor": monitor,
        "val": ends[:, np.newaxis] - 0.3 / steps[3::4],
    }


def drawn(num_points):
    rng = np.random.default_rng(1)
    points = []
    for _ in range(num_points):
        point = {
            "rate": float(10 ** rng.uniform(-4, 0)),
            "units": int(rng.integers(1, 17)) * 16,
            "optimizer": str(rng.choice(["adam", "sgd"])),
        }
        if point["optimizer"] == "sgd":
            point["momentum"] = float(rng.uniform(0, 0.9))
        points.append(point)
    return points


@pytest.fixture(scope="module")
def table():
    return replay.Table(stored(drawn(60)))


def test_targets_are_the_best_and_those_as_good_as_it(table):
    best = table.final.max()
    assert table.goal == pytest.approx(best - replay.CLOSE)
    assert set(table.targets()) == set(np.flatnonzero(table.final >= best - 0.003))


def test_of_many_close_points_the_best_hundredth_are_targets():
    made = stored(drawn(400))
    made["val"] = np.linspace(0.5, 0.9, 400)[:, np.newaxis] * [1, 1]  # 0.1 points apart
    assert list(replay.Table(made).targets()) == [396, 397, 398, 399]


def test_known_points_are_no_targets_and_beside_the_table():
    points = drawn(10)
    table = replay.Table(stored(points, known=(3,)))
    assert 3 not in table.drawn
    assert 3 not in table.targets()


def test_nearest_counts_shares_of_ranges_and_missing_conditions():
    points = [
        {"rate": 0.01, "units": 64, "optimizer": "adam"},
        {"rate": 0.01, "units": 64, "optimizer": "sgd", "momentum": 0.5},
        {"rate": 0.01, "units": 256, "optimizer": "adam"},
        {"rate": 1.0, "units": 64, "optimizer": "adam"},
    ]
    table = replay.Table(stored(points))
    every = np.arange(4)
    asked = {"rate": 0.02, "units": 80, "optimizer": "adam"}
    assert table.nearest(asked, every) == 0
    assert table.nearest(asked, every[1:]) == 3  # half the range of the logarithm: 1 / 6
    assert table.nearest(asked, every[1:3]) == 2  # 0.73 / 3; no momentum is 1, another optimizer 1
    assert table.nearest(asked | {"optimizer": "sgd", "momentum": 0.1}, every) == 1


def test_time_is_that_of_the_trials_shared_among_the_workers():
    sizes = zip((1e-4, 3e-3, 0.1, 1.0), (16, 16, 16, 32), strict=True)
    points = [{"rate": rate, "units": units, "optimizer": "adam"} for rate, units in sizes]
    made = stored(points)
    made["val"] = [[0.1, 0.1], [0.1, 0.1], [0.1, 0.1], [0.9, 0.9]]
    table = replay.Table(made)
    short, long_ = 3 + NUM_REPORTS * 2 + 4, 3 + NUM_REPORTS * 3 + 4
    one = {replay.search(table, Policy("random"), 1, seed).seconds for seed in range(20)}
    assert one == {count * short + long_ for count in range(4)}
    two = {replay.search(table, Policy("random"), 2, seed).seconds for seed in range(20)}
    assert two == {long_, short + long_}


def test_a_report_of_so_much_is_reached_before_its_trial_ends():
    made = stored([{"rate": 0.01, "units": 16, "optimizer": "adam"}] * 2)
    made["monitor"] = [[0.1, 0.9, *[0.2] * 6]] * 2
    table = replay.Table(made)
    assert replay.search(table, Policy("random"), 1, 0, reach=0.9).seconds == 3 + 2 * 2
    assert math.isinf(replay.search(table, Policy("random"), 1, 0, reach=0.91).seconds)


def halving(factor):
    return functools.partial(replay._halving, first=1, factor=factor)


@pytest.mark.parametrize(
    "policy",
    [
        Policy("random"),
        Policy(pruner=halving(3)),
        Policy(pruner=replay._hyperband),
        Policy(pruner=replay._median),
        Policy(resumes=(1, 2)),
        Policy(pruner=halving(2), waits=6),
        Policy(pruner=functools.partial(replay._of_seconds, 5.0, 3)),
        Policy(pruner=functools.partial(replay._extrapolated, "power")),
        Policy(pruner=functools.partial(replay._extrapolated, "gains", first=1)),
        Policy(every=2),
    ],
)
def test_the_same_seed_is_the_same_search(table, policy):
    once = replay.search(table, policy, 2, seed=1)
    assert once == replay.search(table, policy, 2, seed=1)
    assert once.trials <= 60
    assert math.isinf(once.seconds) == (once.best < table.goal)


def test_a_pruner_that_waits_finds_the_target_sooner_than_none(table):
    def median(policy):
        return replay.summary([replay.search(table, policy, 2, seed) for seed in range(12)]).median

    assert median(Policy("random", halving(3))) < median(Policy("random"))


def test_a_point_that_diverges_is_never_complete():
    made = stored(drawn(6))
    made["loss"][:, 3:] = np.nan
    outcome = replay.search(replay.Table(made), Policy("random"), 1, 0)
    assert outcome == Outcome(math.inf, 6, 0.0)


def test_known_points_come_first_and_are_pruned_where_they_are_beaten():
    table = replay.Table(stored(drawn(30), known=(3, 4)))
    made = replay.Replay(table, Policy(pruner=halving(2), known=True), 0, 1)
    made.run()
    first, second = made._study.trials[:2]
    assert [first.params, second.params] == table.params[3:5]
    assert first.last_step == NUM_REPORTS
    assert second.last_step < NUM_REPORTS
    assert is_beaten(made._study, second)


def test_a_known_point_is_no_target():
    table = replay.Table(stored(drawn(30), known=(3, 4)))
    table.final[3] = table.goal + 0.1
    made = replay.Replay(table, Policy(known=True), 0, 1)
    assert made.run().trials > 1
    assert len(made._study.trials) > 2


def test_the_first_wait_until_all_are_there_and_the_best_of_them_go_on():
    table = replay.Table(stored(drawn(30)))
    made = replay.Replay(table, Policy("random", halving(2), waits=6), 0, 1)
    made.run()
    first = made._study.trials[:6]
    went_on = {trial.number for trial in first if trial.last_step > 1}
    ranked = sorted(first, key=lambda trial: -trial.intermediate_values[1])
    assert went_on == {trial.number for trial in ranked[:3]}  # half of them


def test_a_promotion_goes_on_where_its_trial_paused():
    table = replay.Table(stored(drawn(30)))
    made, promoted = replay.Replay(table, Policy(resumes=(1, 2)), 0, 1), []
    promote = made._rungs.promoted

    def watched():
        if run := promote():
            trial = made._study.trials[run.trial_id]
            assert trial.state == optuna.trial.TrialState.PRUNED
            promoted.append(trial)
        return run

    made._rungs.promoted = watched
    made.run()
    assert promoted
    for before in promoted:
        after = made._study.trials[before.number]
        assert before.intermediate_values.items() < after.intermediate_values.items()
        assert after.last_step == len(after.intermediate_values)
    points = [json.dumps(trial.params) for trial in made._study.trials]
    assert len(set(points)) == len(points)


@pytest.mark.parametrize(("clock", "stops"), [([1.0, 4.0], False), ([2.0, 6.0], True)])
def test_rungs_of_seconds_are_reached_after_seconds(clock, stops):
    pruner = replay.HalvingOfSeconds(5.0, 2)
    study = optuna.create_study(direction="maximize")
    for value, seconds in ((0.9, [5.0]), (0.5, clock)):
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                intermediate_values={step + 1: value for step in range(len(seconds))},
                user_attrs={"clock": seconds},
            )
        )
    assert pruner.prune(study, study.trials[-1]) is stops


@pytest.mark.parametrize("kind", ["power", "gains"])
@pytest.mark.parametrize(("top", "stops"), [(0.95, False), (0.7, True)])
def test_curves_that_end_below_the_best_are_stopped(kind, top, stops):
    study = optuna.create_study(direction="maximize")
    for end, length in ((0.9, 8), (0.85, 8), (0.88, 8), (top, 4)):
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[("COMPLETE" if length == 8 else "RUNNING")],
                value=end if length == 8 else None,
                intermediate_values={step: end - 0.3 / step for step in range(1, length + 1)},
            )
        )
    pruner = replay.Extrapolated(kind, 8, optuna.pruners.NopPruner())
    assert pruner.prune(study, study.trials[-1]) is stops


def test_default_is_the_studys_own(table):
    own = replay.defaults()
    assert own["sampler"] == "tpe"  # the dataclass's
    assert own["name"] == "cnn"
    made = replay.policies(table)["default"].pruner(NUM_REPORTS)
    assert isinstance(made, SuccessiveHalvingOfReports)
    assert made._reduction_factor == own["reduction_factor"]


def test_a_halving_that_differs_in_one_thing(table):
    policies = replay.policies(table)
    differing = {
        "default": SuccessiveHalvingOfReports,
        "default, lenient": replay.Lenient,
        "default, published rungs": replay.Published,
        "default, once at a rung": replay.Once,
        "default, once, as far": replay.AsFar,
    }
    assert {name: type(policies[name].pruner(9)) for name in differing} == differing
    made = [halving(first_rung=1, reduction_factor=3) for halving in differing.values()]
    rungs = [{of.rung(step) for step in range(1, 30)} for of in made]
    assert rungs == [{1, 2, 4, 8, 16}] * 2 + [{1, 3, 9, 27}] + [{1, 2, 4, 8, 16}] * 2

    def stops(first, own):
        study = optuna.create_study(direction="maximize")
        for values in (first, own):
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING,
                    intermediate_values=dict(enumerate(values, 1)),
                )
            )
        return [of.prune(study, study.trials[1]) for of in made]

    assert stops([0.9], [0.5]) == [True, False, True, True, True]
    # At report 3 it can be behind at 2, or, as published, at 3.
    assert stops([0.1, 0.9, 0.9], [0.5, 0.5, 0.5]) == [True, False, True, False, False]
    # Against one that has not come as far.
    assert stops([0.9], [0.5, 0.5]) == [True, False, True, True, False]


def test_medians_over_searches_that_may_never_end(capsys):
    never = Outcome(math.inf, 9, 0.5)
    found = replay.summary([Outcome(10.0, 3, 0.9), Outcome(30.0, 5, 0.9), never])
    assert found == replay.Summary(30.0, 30.0, math.inf, pytest.approx(2 / 3), 5)
    replay.print_table({"default": found, "tpe": replay.summary([never])})
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split() == ["default", "30", "30-never", "67%", "5", "1.00"]
    assert rows[2].split() == ["tpe", "never", "never-never", "0%", "9", "nan"]
