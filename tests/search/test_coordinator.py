import csv
import math
from contextlib import closing
from functools import partial

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from search import coordinator, results, sampling
from search.coordinator import Coordinator
from search.errors import Interrupted, SearchError
from search.settings import Settings
from search.storage import storage
from search.view.progress import View
from search.view.trial_logs import open_logs
from search.workers.devices import Device
from tests.scripted import CRASH, LOST, ONE_CORE, ScriptedPool

UNIT = {"low": 0.0, "high": 1.0, "step": None, "log": False}


# What a worker says, word for word; each answer comes back from the `yield`.


def suggest(name, arguments=UNIT, kind="float"):
    return {"type": "suggest", "name": name, "kind": kind, "arguments": arguments}


def report(value, step, **more):
    return {"type": "report", "value": value, "step": step, "metrics": {}, "progress": {}, **more}


def finished(outcome="complete", **more):
    return {"type": "finished", "outcome": outcome, "rss": 1, **more}


def good(number, attempt, value=0.5, steps=5):
    yield suggest("x")
    for step in range(1, steps + 1):
        if (yield report(value, step))["value"]:
            break
    yield finished(value=value)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def search(url, tmp_path, monkeypatch):
    """Searches as a coordinator does that has just been started; returns the pool it used.

    All idle workers get trials before anything is heard, also where starting them takes long.
    """
    monkeypatch.setattr(coordinator, "ASKING", math.inf)

    def search(
        script,
        *,
        name="mine",
        num_slots=1,
        known_points=(),
        at_start=None,
        at_answer=None,
        prepare=None,
        device=ONE_CORE,
        log=None,
        **changed,
    ):
        study = storage.at(url).open(name)
        study.set_user_attr("run", {"num_reports": 5, "fixed": {"kind": "objective"}})
        if prepare:
            prepare(study)
        pool = ScriptedPool(script, num_slots, device)
        pool.at_start = at_start or pool.at_start
        pool.at_answer = at_answer or pool.at_answer
        settings = Settings(
            **{
                "name": "mine",
                "file": "mine.py",
                "kind": "objective",
                "dataset": "digits",
                "epochs": 1,
                "final_epochs": None,
                "images_per_report": 100,
                "batch_size": 10,
                "trials": 4,
                "sampler": "random",
                "pruner": "none",
                "first_rung": 1,
                "reduction_factor": 2,
            }
            | changed
        )
        with closing(open_logs(log, tmp_path)) as logs:
            Coordinator(study, settings, list(known_points), View(-1), logs).search(pool)
        return pool

    return search


@pytest.fixture
def trials(url):
    return lambda name="mine": storage.read_study(url, name).trials


def test_the_log_of_a_trial_that_goes_on_holds_all_its_reports_once(search, trials, tmp_path):
    def script(number, attempt):
        yield suggest("x")
        if attempt > 1:
            yield {"type": "resumed", "step": 2}
        for step in (1, 2, 3) if attempt == 1 else (3, 4):  # what comes behind 2 was not kept
            yield report(step / 8, step)
        yield CRASH if attempt == 1 else finished(value=0.5)

    with pytest.raises(Interrupted):
        search(script, trials=1, log="csv")
    search(script, trials=1, log="csv")
    with open(tmp_path / "csv" / "trial-0.csv") as file:
        rows = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file)]
    assert rows == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5)]
    assert dict(rows) == trials()[0].intermediate_values


def states(found):
    return [trial.state.name for trial in found]


# How many


@pytest.mark.parametrize(("num_trials", "num_slots"), [(1, 1), (1, 4), (5, 2), (7, 3), (4, 4)])
def test_exactly_so_many_trials_are_run(search, trials, num_trials, num_slots):
    pool = search(good, trials=num_trials, num_slots=num_slots)
    assert [trial.number for trial in trials()] == list(range(num_trials))
    assert states(trials()) == ["COMPLETE"] * num_trials
    assert [(trial, attempt) for trial, attempt, _ in pool.given] == [
        (number, 1) for number in range(num_trials)
    ]
    assert search(good, trials=num_trials).given == []


def test_a_higher_number_goes_on_where_it_was(search, trials):
    search(good, trials=2)
    assert [number for number, _, _ in search(good, trials=5).given] == [2, 3, 4]
    assert len(trials()) == 5


def test_a_lower_number_than_a_lost_coordinator_s_is_kept_to(search, trials):
    def script(number, attempt):
        yield suggest("x")
        yield CRASH if number == 2 and attempt == 1 else report(0.5, 1)
        yield finished(value=0.5)

    with pytest.raises(Interrupted):
        search(script, trials=6, num_slots=3)
    assert states(trials()) == ["RUNNING"] * 3
    given = search(script, trials=2, num_slots=3).given
    assert [number for number, _, _ in given] == [0, 1]
    assert states(trials()) == ["COMPLETE", "COMPLETE", "RUNNING"]


def test_pruned_and_failed_trials_count(search, trials):
    def script(number, attempt):
        yield suggest("x")
        if number == 1:
            yield finished("error", reason=f"ValueError: {number}", traceback="its frames")
        if number == 2:
            yield finished("pruned")
        yield finished(value=0.5)

    search(script, trials=4, num_slots=2)
    assert states(trials()) == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE"]
    assert trials()[1].user_attrs["traceback"] == "its frames"
    assert trials()[1].user_attrs["reason"] == "error: ValueError: 1"
    assert trials()[2].user_attrs["reason"] == "pruned: by the objective"


def test_a_spent_time_budget_starts_nothing(search, trials):
    assert search(good, time_budget=0.0).given == []
    assert trials() == []


def test_each_trial_trains_with_a_seed_of_its_own_also_again(search):
    def script(number, attempt):
        yield suggest("x")
        if number == 1 and attempt == 1:
            yield LOST
        yield finished(value=0.5)

    given = search(script, seed=3).given
    seeds = {(number, attempt): content["seed"] for number, attempt, content in given}
    assert all(content["task"] == "trial" for _, _, content in given)
    assert seeds[1, 1] == seeds[1, 2] == sampling.seed_for(3, 1, "training")
    assert len(set(seeds.values())) == 4


# What is stored


def test_a_report_is_stored_with_its_figures(search, trials):
    def script(number, attempt):
        yield suggest("x")
        answer = yield report(0.5, 1, metrics={"loss": 2.0}, progress={"images_per_second": 90.0})
        assert answer == {"value": False}
        assert (yield {"type": "attribute", "key": "parameters", "value": 7}) == {"value": None}
        yield report(0.25, 2, metrics={"loss": 3.0}, progress={"images_per_second": 91.5})
        yield finished(value=0.75)

    search(script, trials=1)
    (trial,) = trials()
    assert (trial.value, trial.intermediate_values) == (0.75, {1: 0.5, 2: 0.25})
    assert trial.user_attrs["history"] == {"1": {"loss": 2.0}, "2": {"loss": 3.0}}
    assert trial.user_attrs["images_per_second"] == 91.5
    assert trial.user_attrs["parameters"] == 7
    assert trial.user_attrs["attempts"][0]["reason"] == "complete"
    assert "reason" not in trial.user_attrs


def test_the_figures_of_a_long_trial_are_stored_in_parts(search, trials, monkeypatch):
    monkeypatch.setattr("search.trial._PART", 3)

    def script(number, attempt):
        yield suggest("x")
        assert "error" in (yield {"type": "attribute", "key": "history:1", "value": 7})
        first = 1 if attempt == 1 else 5
        for step in range(first, 9 if attempt == 1 else 8):
            yield report(step / 10, step, metrics={"loss": step + attempt / 10})
        if attempt == 1:
            yield LOST
        yield finished(value=0.75)

    search(script, trials=1)
    (trial,) = trials()
    assert results.history(trial.user_attrs) == {
        **{str(step): {"loss": step + 0.1} for step in range(1, 5)},
        **{str(step): {"loss": step + 0.2} for step in range(5, 8)},
    }
    sizes = [len(trial.user_attrs[results.history_key(part)]) for part in range(3)]
    assert sizes == [3, 3, 1]


def test_figures_for_the_terminal_take_no_other_s_place(search, trials):
    figures = dict.fromkeys(("attempts", "history", "reason", "seconds", "mine", "speed"), 5.5)

    def script(number, attempt):
        yield suggest("x")
        yield {"type": "attribute", "key": "mine", "value": "my own"}
        yield report(0.5, 1, metrics={"loss": 2.0}, progress=figures)
        yield finished(value=0.75)

    search(script, trials=1)
    (trial,) = trials()
    kept = trial.user_attrs
    assert len(kept["attempts"]) == 1
    assert kept["history"] == {"1": {"loss": 2.0}}
    assert "reason" not in kept
    assert kept["seconds"] != 5.5
    assert (kept["mine"], kept["speed"]) == ("my own", 5.5)


def test_reports_from_step_0_are_counted(search, url, caplog):
    def script(number, attempt):
        yield suggest("x")
        for step in (0, 10, 20):
            yield report(0.5, step)
        yield finished(value=0.5)

    caplog.set_level("INFO", "search")
    search(script, trials=1)
    assert "after 3 reports" in caplog.text
    (row,) = results.rows(storage.read_study(url, "mine"))
    assert row.reports == 3


def test_a_checkpoint_that_can_t_be_removed_ends_no_search(search, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "trial-0.npz"
    (checkpoint / "in the way").mkdir(parents=True)
    other = checkpoint.with_name("trial-1.npz")
    other.touch()
    search(good, trials=2, checkpoints=str(checkpoint.parent))
    assert checkpoint.exists()
    assert not other.exists()


def test_a_bad_question_is_answered_with_an_error(search):
    answers = []

    def script(number, attempt):
        answers.append((yield suggest("x", kind="loguniform")))
        answers.append((yield suggest("y", UNIT | {"high": -1.0})))
        answers.append((yield suggest("w", UNIT | {"high": 1e30, "step": 1.0})))
        answers.append((yield suggest("z")))
        yield finished(value=0.5)

    search(script, trials=1)
    assert answers[0]["error"].startswith("A suggestion is one of ('float', 'int'")
    assert answers[0]["error"].endswith("Received: 'loguniform'")
    assert answers[1]["error"].startswith("'y': ")
    assert "low <= high" in answers[1]["error"]
    assert answers[2]["error"].startswith("'w': ")  # of decimal's, not a ValueError
    assert 0 <= answers[3]["value"] <= 1


def test_an_attribute_of_the_coordinator_s_own_is_refused(search, trials):
    answers = []

    def script(number, attempt):
        yield suggest("x")
        answers.append((yield {"type": "attribute", "key": "attempts", "value": []}))
        yield finished(value=0.5)

    search(script, trials=1)
    assert answers == [
        {"error": "The attribute 'attempts' is the coordinator's own; take another name"}
    ]
    assert len(trials()[0].user_attrs["attempts"]) == 1


def test_that_activations_have_no_room_is_said_once(search, caplog):
    def script(number, attempt):
        yield suggest("x")
        why = "activations in float16" if number == 0 else "images, for want of room: 2 GB"
        yield {"type": "attribute", "key": "trained_on", "value": why}
        yield finished(value=0.5)

    search(script, trials=4)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["trial 1 is trained on images, for want of room: 2 GB"]


def test_a_decision_to_stop_is_told_before_it_is_answered(search, trials):
    at_answer = []

    def script(number, attempt):
        yield suggest("x")
        value = (0.9, 0.1, 0.95)[number]
        for step in (1, 2, 3):
            if (yield report(value, step))["value"]:
                at_answer.append((number, step, trials()[number].state))
                # It may still say a word or two, which changes nothing.
                assert (yield report(1.0, step + 1)) == {"value": True}
                late = {"type": "attribute", "key": "late", "value": 1}
                assert (yield late) == (yield suggest("late")) == {"ended": True}
                break
        yield finished(value=value)

    search(script, trials=3, pruner="asha")
    assert at_answer == [(1, 1, TrialState.PRUNED)]
    assert states(trials()) == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert trials()[1].intermediate_values == {1: 0.1}
    assert trials()[1].user_attrs["reason"] == "pruned: behind at report 1"
    assert "late" not in trials()[1].user_attrs


@pytest.mark.parametrize(("steps", "state"), [(4, "PRUNED"), (5, "COMPLETE")])
def test_the_last_report_prunes_nothing(search, trials, steps, state):
    """A trial that is trained whole is complete: five reports here, the last of them a rung."""

    def script(number, attempt):
        yield from good(number, attempt, value=(0.9, 0.1)[number], steps=steps)

    search(script, trials=2, pruner="asha", first_rung=steps)
    assert states(trials()) == ["COMPLETE", state]
    assert trials()[1].last_step == steps


def test_a_trial_too_large_for_a_gpu_of_its_own_ends_at_once(search, trials):
    def script(number, attempt):
        yield suggest("x")
        yield finished("out_of_memory", reason="no memory")

    pool = search(script, trials=1, device=Device(1, gpu="0"))
    assert len(pool.given) == 1
    (trial,) = trials()
    assert (trial.state.name, trial.user_attrs["reason"]) == ("PRUNED", "out_of_memory: no memory")


def test_what_an_objective_says_beside_its_values_may_be_anything(search, trials):
    def script(number, attempt):
        yield {"type": "progress", "epoch": 3}
        yield report(0.5, 1) | {"progress": {"note": "deep", "images_per_second": 2.0}}
        yield finished(value=0.5)

    search(script, trials=1)
    assert states(trials()) == ["COMPLETE"]
    assert trials()[0].user_attrs["images_per_second"] == 2.0
    assert "note" not in trials()[0].user_attrs


@pytest.mark.parametrize("kind", ["diverged", "out_of_memory"])
def test_an_infeasible_trial_is_pruned_with_constraint_and_reason(search, trials, kind):
    def script(number, attempt):
        yield suggest("x")
        yield report(0.99, 1)
        yield finished(kind, reason="loss was nan at report 2")

    search(script, trials=1)
    (trial,) = trials()
    assert trial.state == TrialState.PRUNED
    assert trial.constraints == {kind: 1.0}
    assert trial.user_attrs["reason"] == f"{kind}: loss was nan at report 2"
    assert trial.user_attrs["attempts"][0]["reason"] == kind


@pytest.mark.fault("N3")
@pytest.mark.parametrize("fits_alone", [True, False])
def test_a_trial_out_of_memory_runs_once_more_alone(search, trials, fits_alone):
    running = set()

    def script(number, attempt):
        running.add(number)
        yield suggest("x")
        for step in range(1, 6):
            if number == 1 and attempt == 2:
                assert running == {1}
            yield report(0.5, step)
            if number == 1 and step == 3 and not (attempt == 2 and fits_alone):
                running.remove(number)
                yield finished("out_of_memory", reason="no memory")
        running.remove(number)
        yield finished(value=0.5)

    given = search(script, trials=6, num_slots=3).given
    assert [attempt for number, attempt, _ in given if number == 1] == [1, 2]
    expected = ["COMPLETE"] * 6
    expected[1] = "COMPLETE" if fits_alone else "PRUNED"
    assert states(trials()) == expected
    reasons = [attempt["reason"] for attempt in trials()[1].user_attrs["attempts"]]
    assert reasons == ["out_of_memory", "complete" if fits_alone else "out_of_memory"]


def test_a_trial_killed_for_memory_after_a_crash_is_still_alone(search, trials):
    running = set()

    def script(number, attempt):
        running.add(number)
        yield suggest("x")
        yield report(0.5, 1)
        if number == 1 and attempt == 1:
            yield finished("out_of_memory", reason="no memory")
        if number == 0 and attempt == 1:
            yield report(0.5, 2)
            yield CRASH
        if number == 1:
            assert running == {1}
        running.discard(number)
        yield finished(value=0.5)

    with pytest.raises(Interrupted):
        search(script, trials=4, num_slots=2)
    running.clear()
    search(script, trials=4, num_slots=2)
    assert states(trials()) == ["COMPLETE"] * 4


def test_tpe_stays_away_from_what_diverged(search, trials):
    """What diverged late, with high reports before, is worse than anything that did not."""

    def script(number, attempt):
        x = (yield suggest("x"))["value"]
        for step in (1, 2, 3):
            yield report(5.0 if x > 0.5 else 1 - abs(x - 0.2), step)
        yield finished("diverged", reason="at 4") if x > 0.5 else finished("pruned")

    search(script, trials=40, sampler="tpe")
    drawn = [trial.params["x"] for trial in trials()[24:]]
    assert sum(x <= 0.5 for x in drawn) >= 14, drawn


# Failures


def failing(reasons):
    def script(number, attempt):
        yield suggest("x")
        if (reason := reasons[number]) is not None:
            yield finished("error", reason=reason, traceback=f"frames of {number}")
        yield finished(value=0.5)

    return script


@pytest.mark.parametrize(
    ("reasons", "is_stopped"),
    [
        (["a", "a", "a", "a"], True),
        (["bad 1", "bad -2.5e-3", "bad 0x7f", "x"], True),  # a point's own values
        (["a", "b", "a", "a"], False),
        (["a", "a", None, "a"], False),
        ([None, "a", "a", "a"], False),
    ],
)
def test_first_trials_that_all_fail_alike_stop_the_search(search, trials, reasons, is_stopped):
    if not is_stopped:
        search(failing(reasons))
        assert len(trials()) == 4
        return
    rule = (
        f"first 3 trials to end all failed with the same error: {reasons[2]}. Mend the study's file"
    )
    with pytest.raises(SearchError, match=rule) as caught:
        search(failing(reasons))
    assert caught.value.detail == "frames of 2"
    assert states(trials()) == ["FAIL"] * 3


def test_a_single_trial_that_fails_stops_the_search(search):
    with pytest.raises(SearchError, match="the first 1 trials to end all failed"):
        search(failing(["a"]), trials=1)


@pytest.mark.parametrize(("asking", "given"), [(0.0, [1, 2, 3]), (9.0, [3, 3, 3])])
def test_workers_are_heard_between_two_draws_that_take_long(
    search, trials, monkeypatch, asking, given
):
    monkeypatch.setattr(coordinator, "ASKING", asking)
    found, poll = [], ScriptedPool.poll

    def noted(pool, timeout):
        found.append(len(pool.given))
        return poll(pool, timeout)

    monkeypatch.setattr(ScriptedPool, "poll", noted)
    search(good, trials=3, num_slots=3)
    assert found[:3] == given
    assert states(trials()) == ["COMPLETE"] * 3


# Known points

POINTS = ({"x": 0.125, "y": 0.25}, {"x": 0.5, "y": 0.75}, {"x": 0.875, "y": 0.0})


def poor(number, attempt, values=(0.3, 0.1, 0.2)):
    yield suggest("x")
    yield suggest("y")
    for step in (1, 2, 3, 4):
        if (yield report(values[number] if number < 3 else 0.9, step))["value"]:
            break
    yield finished(value=0.1)


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc"])
def test_known_points_are_tried_first_and_whole(search, trials, sampler):
    search(poor, trials=5, known_points=POINTS, sampler=sampler, pruner="asha")
    assert [trial.params for trial in trials()[:3]] == list(POINTS)
    assert [trial.user_attrs.get("known_point") for trial in trials()] == [0, 1, 2, None, None]
    assert all(trial.params["x"] not in (0.125, 0.5, 0.875) for trial in trials()[3:])


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.3, 0.1, 0.2), ["COMPLETE", "PRUNED", "PRUNED"]), ((0.1, 0.2, 0.3), ["COMPLETE"] * 3)],
)
def test_a_known_point_ends_early_only_where_something_better_is_complete(
    search, trials, values, expected
):
    search(partial(poor, values=values), trials=3, known_points=POINTS, pruner="asha")
    assert states(trials()) == expected


def test_a_known_point_goes_on_while_nothing_better_is_complete(search, trials):
    """Those that are ahead of it run beside it, or were pruned themselves."""

    def script(number, attempt):
        yield from poor(number, attempt, values=(0.3, 0.1, 0.2))

    search(script, trials=3, num_slots=3, known_points=POINTS, pruner="asha")
    assert trials()[1].last_step == 4


def test_as_many_are_drawn_at_random_whatever_is_known(search, trials, monkeypatch):
    asked = []
    plain = sampling.TrialSampling

    def noted(*arguments):
        asked.append(arguments[-1])
        return plain(*arguments)

    monkeypatch.setattr(sampling, "TrialSampling", noted)
    search(poor, known_points=POINTS)
    assert asked == [sampling.STARTUP_TRIALS + len(POINTS)] * 4


def test_a_point_like_a_known_one_is_pruned_when_it_is_not_known(search, trials):
    def script(number, attempt):
        yield from good(number, attempt, value=(0.9, 0.1)[number])

    search(script, trials=2, known_points=({"x": 0.5},), pruner="asha")
    assert states(trials()) == ["COMPLETE", "PRUNED"]


def test_a_known_point_waits_until_its_turn(search, trials):
    waiting = []
    search(
        poor,
        num_slots=2,
        known_points=POINTS,
        at_start=lambda: waiting.append(states(trials()).count("WAITING")),
    )
    assert waiting == [0, 0, 0, 0]


@pytest.mark.fault("K3")
@pytest.mark.parametrize("num_words", [1, 2, 4])
def test_each_known_point_is_tried_once_whatever_dies(search, trials, num_words):
    def dying(number, attempt):
        words = poor(number, attempt)
        answer = None
        for _ in range(num_words if number == 1 and attempt == 1 else 99):
            try:
                answer = yield words.send(answer)
            except StopIteration:
                return
        yield CRASH

    with pytest.raises(Interrupted):
        search(dying, known_points=POINTS)
    search(dying, known_points=POINTS)
    assert [trial.user_attrs.get("known_point") for trial in trials()] == [0, 1, 2, None]
    assert [trial.params for trial in trials()[:3]] == list(POINTS)


def test_a_known_point_whose_coordinator_died_before_asking_is_tried_once(search, trials):
    def die():
        raise Interrupted(9)

    with pytest.raises(Interrupted):
        search(poor, known_points=POINTS, prepare=lambda study: setattr(study, "ask", die))
    assert states(trials()) == ["WAITING"]
    waiting = []
    search(
        poor,
        known_points=POINTS,
        at_start=lambda: waiting.append(states(trials()).count("WAITING")),
    )
    assert waiting == [0, 0, 0, 0]
    assert [trial.user_attrs.get("known_point") for trial in trials()] == [0, 1, 2, None]
    assert [trial.params for trial in trials()[:3]] == list(POINTS)


# Deaths


def dies(deaths, steps=5):
    """Each attempt ends as `deaths` says, after its second report; what comes after, well."""

    def script(number, attempt):
        yield suggest("x")
        for step in range(1, steps + 1):
            yield report(attempt + step / 10, step)
            if step == 2 and attempt <= len(deaths):
                yield deaths[attempt - 1]
        yield finished(value=float(attempt))

    return script


def run_until_done(search, script, **changed):
    """Starts a coordinator again as often as one dies."""
    given = []
    while True:
        try:
            return given + search(script, **changed).given
        except Interrupted:
            given.append("crash")


def test_a_lost_worker_s_trial_runs_again_and_its_reports_are_replaced(search, trials):
    given = run_until_done(search, dies([LOST]), trials=1)
    assert [(number, attempt) for number, attempt, _ in given] == [(0, 1), (0, 2)]
    (trial,) = trials()
    assert trial.value == 2.0
    assert trial.intermediate_values == {1: 2.1, 2: 2.2, 3: 2.3, 4: 2.4, 5: 2.5}
    assert [attempt["reason"] for attempt in trial.user_attrs["attempts"]] == ["killed", "complete"]


def test_a_retry_that_ends_sooner_leaves_no_report_of_the_lost_attempt(search, trials):
    def script(number, attempt):
        yield suggest("x")
        for step in (1, 2, 3, 4) if attempt == 1 else (1, 2):
            yield report(float(attempt), step)
        yield LOST if attempt == 1 else finished(value=0.5)

    search(script, trials=1)
    assert trials()[0].intermediate_values == {1: 2.0, 2: 2.0}


def test_the_seconds_of_a_trial_are_those_of_all_its_attempts(search, trials):
    with pytest.raises(Interrupted):
        search(dies([CRASH]), trials=1)

    def as_if_it_had_run_for_a_minute_an_hour_ago(study):
        (trial,) = study.trials
        (attempt,) = trial.user_attrs["attempts"]
        attempt |= {"start": attempt["start"] - 3600, "seen": attempt["start"] - 3540}
        study._storage.set_trial_user_attr(trial._trial_id, "attempts", [attempt])

    search(dies([CRASH, LOST]), trials=1, prepare=as_if_it_had_run_for_a_minute_an_hour_ago)
    (trial,) = trials()
    reasons = [attempt["reason"] for attempt in trial.user_attrs["attempts"]]
    assert reasons == ["coordinator ended", "killed", "complete"]
    assert 60 <= trial.user_attrs["seconds"] < 90  # the hour in which nothing ran is not counted


@pytest.mark.parametrize(("resumed", "before"), [(0, 0), (3, 3)])
def test_the_reports_before_a_trial_that_goes_on_are_none_of_this_attempt_s(
    search, resumed, before
):
    def script(number, attempt):
        yield suggest("x")
        yield {"type": "resumed", "step": resumed}
        yield {"type": "progress", "note": "activations: 1 of 2"}
        for step in range(resumed + 1, 6):
            yield report(0.5, step)
        yield finished(value=0.5)

    (slot,) = search(script, trials=1).slots
    assert (slot.status["step"], slot.status["before"]) == (5, before)


def test_a_trial_that_is_lost_too_often_fails_with_its_last_words(search, trials):
    def script(number, attempt):
        return dies([LOST] * 9)(number, attempt) if number else good(number, attempt)

    assert len(search(script, trials=2, max_attempts=3).given) == 1 + 3
    trial = trials()[1]
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["reason"] == "killed: its worker ended by signal 9, 3 times"
    assert trial.user_attrs["stderr"] == "last words"
    assert [attempt["reason"] for attempt in trial.user_attrs["attempts"]] == ["killed"] * 3


def test_what_the_workers_say_at_once_is_one_transaction_and_answered_after_it(search, trials):
    commits, at_answer = [], []

    def prepare(study):
        sqlalchemy.event.listen(study._storage._backend.engine, "commit", commits.append)

    def say_what_is_stored():
        at_answer.append((len(commits), sum(len(t.intermediate_values) for t in trials())))

    def script(number, attempt):
        for step in (1, 2, 3):
            yield report(0.5, step, metrics={"loss": 1.0})
        yield finished(value=0.5)

    search(script, num_slots=4, prepare=prepare, at_answer=say_what_is_stored)
    first = at_answer[0][0]
    assert at_answer == [(first + step, 4 * (step + 1)) for step in (0, 1, 2) for _ in range(4)]


def test_a_trial_takes_one_of_its_drafts_whatever_dies(search, trials):
    said, sampler = [], {"sampler": "tpe", "trials": 1}

    def drawn(draft=None):
        message = suggest("x") if draft is None else {**suggest("x"), "draft": draft}
        said.append((draft, (yield message)["value"]))

    def chooses(number, attempt):
        for draft in (0, 1, 2, 0):
            yield from drawn(draft)
        if attempt == 1:
            yield CRASH
        yield {"type": "take", "draft": 1}
        yield from drawn()
        yield CRASH if attempt == 2 else finished(value=0.5)

    for _ in range(2):
        with pytest.raises(Interrupted):
            search(chooses, **sampler)
    (first, second, third, again), (_, kept) = said[:4], said[-1]
    assert said[4:8] == said[:4]  # what nothing was taken of is drawn alike
    assert len({value for _, value in (first, second, third)}) == 3
    assert (again, kept) == (first, second[1])
    given = search(good, **sampler).given  # adopts it
    assert [task["drafts"] for _, _, task in given] == [1]
    assert trials()[0].params == {"x": kept}


@pytest.mark.parametrize(
    ("deaths", "state", "reasons"),
    [
        ([CRASH] * 5, "COMPLETE", ["coordinator ended"] * 5 + ["complete"]),
        (
            [CRASH, LOST, CRASH, CRASH],
            "COMPLETE",
            ["coordinator ended", "killed", *["coordinator ended"] * 2, "complete"],
        ),
        (
            [CRASH, LOST, CRASH, LOST],
            "FAIL",
            ["coordinator ended", "killed", "coordinator ended", "killed"],
        ),
    ],
)
def test_a_coordinator_s_deaths_are_no_attempts(search, trials, deaths, state, reasons):
    search(good, trials=1)
    run_until_done(search, dies(deaths), trials=2, max_attempts=2)
    trial = trials()[1]
    assert trial.state.name == state
    attempts = trial.user_attrs["attempts"]
    assert [attempt["reason"] for attempt in attempts] == reasons
    assert [attempt["attempt"] for attempt in attempts] == list(range(1, len(reasons) + 1))
    assert all(attempt["start"] <= attempt["end"] for attempt in attempts)


def test_running_trials_are_adopted_before_new_ones_are_asked(search, trials):
    def script(number, attempt):
        yield suggest("x")
        yield report(0.5, 1)
        yield CRASH if number == 2 and attempt == 1 else report(0.5, 2)
        yield finished(value=0.5)

    with pytest.raises(Interrupted):
        search(script, trials=5, num_slots=3)
    before = [trial.params for trial in trials()]
    assert states(trials()) == ["RUNNING"] * 3
    given = search(script, trials=5, num_slots=3).given
    assert [(number, attempt) for number, attempt, _ in given] == [
        (0, 2), (1, 2), (2, 2), (3, 1), (4, 1)
    ]  # fmt: skip
    assert [trial.params for trial in trials()[:3]] == before
    assert states(trials()) == ["COMPLETE"] * 5


def test_a_trial_that_was_asked_and_never_started_is_adopted(url, search, trials):
    study = storage.at(url).open("mine")
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    study.ask()
    given = search(good, trials=1).given
    assert [(number, attempt) for number, attempt, _ in given] == [(0, 1)]
    assert states(trials()) == ["COMPLETE"]


@pytest.mark.parametrize("death", [LOST, CRASH])
def test_a_retry_is_not_pruned_where_the_lost_attempt_had_passed(search, trials, death):
    def script(number, attempt):
        yield suggest("x")
        values = [0.5] * 9
        if number == 1:
            # Good until the second report, and the retry poor from the first.
            values = [0.9, 0.9] if attempt == 1 else [0.1] * 9
        for step, value in enumerate(values, 1):
            if (yield report(value, step))["value"]:
                break
        yield death if number == 1 and attempt == 1 else finished(value=values[-1])

    for _ in range(2):
        try:
            search(script, trials=2, pruner="asha", reduction_factor=2)
            break
        except Interrupted:
            continue
    trial = trials()[1]
    # The rungs are 1, 2, 4 and 8; it had passed the first two.
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == dict.fromkeys((1, 2, 3), 0.1)


class Mortal:
    """Kills the coordinator after so many words to the storage since it decided on an end."""

    def __init__(self, num_writes):
        self._left = num_writes
        self._decided = False

    def __call__(self, study):
        for name in (
            "set_trial_user_attr",
            "set_trial_system_attr",
            "set_trial_intermediate_value",
            "set_trial_state_values",
        ):
            setattr(study._storage, name, self._wrapped(getattr(study._storage, name)))

    def _wrapped(self, write):
        def count(trial_id, *arguments, **named):
            if self._decided:
                self._left -= 1
                if self._left < 0:
                    raise Interrupted(9)
            written = write(trial_id, *arguments, **named)
            self._decided = self._decided or "ending" in arguments or named.get("key") == "ending"
            return written

        return count


@pytest.mark.fault("K3")
@pytest.mark.parametrize(
    ("last", "state"),
    [
        (finished(value=0.75), "COMPLETE"),
        pytest.param(finished("diverged", reason="nan"), "PRUNED", marks=pytest.mark.slow),
        (report(0.1, 2, progress={"images_per_second": 90.0}), "PRUNED"),
        pytest.param(
            finished("error", reason="ValueError", traceback="frames"),
            "FAIL",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["complete", "diverged", "behind", "error"],
)
def test_an_end_that_a_kill_cuts_off_is_finished_by_the_next(search, trials, last, state):
    def script(number, attempt):
        yield suggest("x")
        yield report(0.9, 1)
        if number == 1:
            yield last
        yield report(0.95, 2)
        yield finished(value=0.9)

    stored = []
    while True:  # killed after 0, 1, 2 ... writes, each in a study of its own
        run = {"name": f"study-{len(stored)}", "pruner": "asha"}
        search(script, trials=1, **run)
        try:
            search(script, trials=2, prepare=Mortal(len(stored)), **run)
        except Interrupted:
            assert states(trials(run["name"])) == ["COMPLETE", "RUNNING"]
            assert search(script, trials=2, **run).given == []
            stored.append(told(trials(run["name"])[1]))
        else:
            break
    undisturbed = told(trials(run["name"])[1])
    assert undisturbed[0] == state
    assert len(stored) >= 3
    assert stored == [undisturbed] * len(stored)


def told(trial):
    """All that is stored of a trial, less the clock's part."""
    attrs = {name: value for name, value in trial.user_attrs.items() if name != "seconds"}
    ending = {n: v for n, v in attrs.pop("ending").items() if n not in ("seconds", "time")}
    attempts = [(a["attempt"], a["reason"]) for a in attrs.pop("attempts")]
    state, reports = trial.state.name, trial.intermediate_values
    return state, trial.value, reports, trial.constraints, attrs, ending, attempts
