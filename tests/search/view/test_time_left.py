"""The time left, on searches as they are recorded: pruning at rungs, sizes, several workers."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from search.view.time_left import Finished, Running, time_left

NUM_REPORTS = 20


def searched(seed: int, num_trials: int, *, factor=4, num_known=2):
    """Trials as (reports, seconds a report, seconds before it), pruned by successive halving.

    Known points run to their end. Later points are better, as a sampler's are, and larger ones
    slower; curves rise and cross.
    """
    draw = random.Random(seed)
    rungs = [factor**k for k in range(5) if factor**k < NUM_REPORTS] if factor else []
    come: dict[int, list[float]] = {rung: [] for rung in rungs}
    trials = []
    for number in range(num_trials):
        quality = draw.gauss(number / num_trials, 0.7)
        reports = NUM_REPORTS
        for rung in rungs:
            value = quality + draw.gauss(0, 1 / (1 + rung))
            come[rung].append(value)
            places = len(come[rung]) // factor
            ahead = sum(other > value for other in come[rung])
            if number >= num_known and places and ahead >= places:
                reports = rung
                break
        trials.append((reports, draw.lognormvariate(1.5, 0.4), 2 + 6 * draw.random()))
    return trials


def played(trials, num_workers, share):
    """What is known when `share` of the whole time has passed, and the time that is left."""
    free_at, spans = [0.0] * num_workers, []
    for number, (reports, pace, before) in enumerate(trials):
        start = heapq.heappop(free_at)
        end = start + before + reports * pace
        heapq.heappush(free_at, end)
        spans.append((number, start, end, before, pace, reports))
    total = max(free_at)
    now = share * total
    finished = [
        Finished(number, end - start, reports)
        for number, start, end, _, _, reports in spans
        if end <= now
    ]
    running = [
        Running(number, now - start, max(0, int((now - start - before) / pace)), NUM_REPORTS)
        for number, start, end, before, pace, _ in spans
        if start <= now < end
    ]
    return finished, running, sum(span[1] > now for span in spans), total - now


def estimated(trials, num_workers, share):
    finished, running, num_waiting, truth = played(trials, num_workers, share)
    left = time_left(
        finished, running,
        num_waiting=num_waiting, num_workers=num_workers, num_reports=NUM_REPORTS,
    )  # fmt: skip
    return left / truth


def naive(trials, num_workers, share):
    """What has been needed for each that has finished, times those that have not."""
    finished, running, num_waiting, truth = played(trials, num_workers, share)
    passed = truth * share / (1 - share)
    return passed / len(finished) * (len(running) + num_waiting) / truth


# Of 100 trials pruned by successive halving, some eight long ones hold most of the second half's
# time, so that its length is itself uncertain by a quarter: knowing the true mean does no better.
@pytest.mark.parametrize("num_workers", [1, 2, 8])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_at_half_time_of_100_trials_it_is_within_a_quarter(num_workers, factor):
    runs = [searched(seed, 100, factor=factor) for seed in range(60)]
    ratios = sorted(estimated(run, num_workers, 0.5) for run in runs)
    assert 0.75 <= ratios[30] <= 1.25  # the usual run, and leaning to neither side
    assert sum(0.75 <= ratio <= 1.25 for ratio in ratios) >= 0.5 * len(ratios), ratios
    assert sum(0.5 <= ratio <= 2.0 for ratio in ratios) >= 0.9 * len(ratios), ratios
    if num_workers == 8:  # of two, few run at any moment, and the simple answer does as well
        errors = sorted(abs(math.log(ratio)) for ratio in ratios)
        simple = sorted(abs(math.log(naive(run, num_workers, 0.5))) for run in runs)
        assert errors[30] < simple[30]


@pytest.mark.parametrize("num_workers", [1, 2, 8])
def test_without_pruning_every_run_is_within_a_fifth(num_workers):
    runs = [searched(seed, 100, factor=0) for seed in range(20)]
    assert all(0.8 <= estimated(run, num_workers, 0.5) <= 1.2 for run in runs)


@pytest.mark.parametrize("share", [0.25, 0.75, 0.9])
def test_on_the_way(share):
    ratios = sorted(estimated(searched(seed, 100), 2, share) for seed in range(40))
    assert 0.7 <= ratios[20] <= 1.4, ratios


def test_the_mean_of_those_that_finished_first_would_be_too_short():
    """Eight workers, ten minutes in: the short trials have finished, the long ones run."""
    finished = [Finished(0, 10.0, 1)] * 8
    running = [Running(0, 100.0, 10, NUM_REPORTS)] * 8
    left = time_left(finished, running, num_waiting=8, num_workers=8, num_reports=NUM_REPORTS)
    assert left > 10 + 100


@pytest.mark.parametrize(
    ("finished", "running", "waiting", "workers", "seconds"),
    [
        ([], [], 10, 2, None),
        ([], [Running(0, 5.0, 0, 20)], 10, 2, None),  # no report yet
        ([Finished(0, 10.0, 20)] * 4, [], 4, 2, 20.0),
        ([Finished(0, 10.0, 20)] * 4, [], 4, 4, 10.0),
        ([Finished(0, 10.0, 20)] * 4, [Running(0, 5.0, 10, 20)], 0, 1, 5.0),
        ([Finished(0, 10.0, 20)] * 4, [Running(0, 20.0, 10, 20)], 0, 1, 20.0),  # its own pace
        ([Finished(0, 10.0, 20)] * 4, [], 0, 2, 0.0),
        ([], [Running(0, 30.0, 5, 20)], 0, 1, 90.0),  # the first training of a winner
        ([], [Running(0, 30.0, 5, 20)], 1, 1, 210.0),
        ([Finished(0, 8.0, 0)] * 3, [Running(0, 2.0, 0, 0)], 1, 1, 14.0),  # no reports at all
    ],
)  # fmt: skip
def test_plain_cases(finished, running, waiting, workers, seconds):
    left = time_left(
        finished, running, num_waiting=waiting, num_workers=workers, num_reports=20 * bool(
            (running and running[0].of) or (finished and finished[0].reports)
        ),
    )  # fmt: skip
    assert left == (None if seconds is None else pytest.approx(seconds))


def test_the_same_question_has_the_same_answer():
    finished, running, waiting, _ = played(searched(3, 100), 2, 0.4)
    answers = {
        time_left(finished, running, num_waiting=waiting, num_workers=2, num_reports=20)
        for _ in range(3)
    }
    assert len(answers) == 1


def test_a_million_trials_are_no_work():
    finished = [Finished(0, 10.0, 5), Finished(0, 30.0, 20)]
    left = time_left(finished, [], num_waiting=10**6, num_workers=10, num_reports=20)
    assert left == pytest.approx(2 * 10**6, rel=0.2)
