"""How long a run will still take: honest about pruning, about what has begun, and about workers.

    seconds = time_left(finished, running, num_waiting=40, num_workers=2, num_reports=20)

The mean of the trials that have finished would be wrong: those that were pruned finish first, so
that at any moment the long ones are still running. Hence survival curves (Kaplan and Meier, 1958),
in which a running trial counts as one that lasts at least as long as it has: one over seconds for
the trials to come, one over reports, times its own pace, for those that run.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

# The first trials are not usual ones: a quarter of those so far, at most so many. A guess.
_FIRST = 6
_ENOUGH = 4  # finished trials to go by
_MAX_DRAWN = 400  # trials that are laid out one by one; of more, each stands for several


class Finished(NamedTuple):
    """A trial that has ended."""

    number: int
    seconds: float
    reports: int


class Running(NamedTuple):
    """A trial that runs."""

    number: int
    seconds: float  # since it began
    reports: int  # so far
    of: int  # as many as it makes unless it is pruned; 0: unknown


class _Curve:
    """Survival: the share of trials that last longer than x, as steps.

    Args:
        ended: lengths of those that ended.
        running: lengths so far of the others.
        greatest: where those end whose end nothing else tells.
    """

    def __init__(self, ended: Sequence[float], running: Sequence[float], greatest: float):
        # An end before what still runs at the same length: that one has outlasted it.
        events = sorted([(x, False) for x in ended] + [(x, True) for x in running])
        share, self.steps = 1.0, [(0.0, 1.0)]
        for passed, (x, still_runs) in enumerate(events):
            if not still_runs:
                share *= 1 - 1 / (len(events) - passed)
                self.steps.append((x, share))
        self.end = max([greatest, *(x for x, _ in events)])

    def beyond(self, start: float) -> float:
        """The mean length beyond `start` of those that last longer than it."""
        share = next(share for x, share in reversed(self.steps) if x <= start)
        if share <= 1e-9:
            return 0.0
        corners = [(start, share), *(step for step in self.steps if step[0] > start)]
        corners.append((max(self.end, corners[-1][0]), 0.0))
        area = sum(s * (b - a) for (a, s), (b, _) in itertools.pairwise(corners))
        return area / share

    def at(self, quantile: float) -> float:
        """The length that a share of 1 - quantile outlast."""
        return next((x for x, share in self.steps if share <= 1 - quantile), self.end)


def time_left(
    finished: Sequence[Finished],
    running: Sequence[Running],
    *,
    num_waiting: int,
    num_workers: int,
    num_reports: int = 0,
) -> float | None:
    """Seconds until all have finished, or None where nothing can be said yet.

    Args:
        finished: those of an earlier start of the same run too.
        running: at this moment.
        num_waiting: trials that have not begun.
        num_workers: that run trials side by side.
        num_reports: of a trial that is not pruned; 0 where it is unknown.
    """
    paced = [trial.seconds / trial.reports for trial in running if trial.reports]
    paced += [trial.seconds / trial.reports for trial in finished if trial.reports]
    if not paced and not finished:
        return None
    pace = sorted(paced)[len(paced) // 2] if paced else 0.0  # seconds a report, the median
    whole = max([num_reports, *(trial.of for trial in running)])
    ended, begun = _usual(finished, running)
    seconds = _Curve(
        [trial.seconds for trial in ended], [trial.seconds for trial in begun], whole * pace
    )
    reports = _Curve([trial.reports for trial in ended], [trial.reports for trial in begun], whole)
    free_at = [_remaining(trial, seconds, reports) for trial in running]
    free_at += [0.0] * max(0, num_workers - len(running))
    return _laid_out(free_at, seconds, num_waiting)


def _usual(
    finished: Sequence[Finished], running: Sequence[Running]
) -> tuple[list[Finished], list[Running]]:
    """Less the first trials, which had few to be pruned by: none like them will come."""
    first = min((len(finished) + len(running)) // 4, _FIRST)
    ended = [trial for trial in finished if trial.number >= first]
    if len(ended) < _ENOUGH:
        return list(finished), list(running)
    return ended, [trial for trial in running if trial.number >= first]


def _remaining(trial: Running, seconds: _Curve, reports: _Curve) -> float:
    if not trial.reports:
        return seconds.beyond(trial.seconds)
    left = reports.beyond(trial.reports)
    if trial.of:
        left = min(left, trial.of - trial.reports)
    return left * trial.seconds / trial.reports


def _laid_out(free_at: list[float], seconds: _Curve, num_waiting: int) -> float:
    """When the last worker is done: each that becomes free takes the next trial."""
    if not free_at:
        return 0.0
    drawn = min(num_waiting, _MAX_DRAWN)
    scale = num_waiting / drawn if drawn else 1.0
    lengths = [seconds.at((i + 0.5) / drawn) * scale for i in range(drawn)]
    random.Random(0).shuffle(lengths)  # the same at each call: the answer must not flicker
    heapq.heapify(free_at)
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)
