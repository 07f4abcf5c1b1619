"""What the live view said of the time left of a search that has ended, against what it took.

    python -m tests.benchmarks.time_left --study cnn --out runs/cnn

Made again from when each attempt began and ended, without the time in which none ran; reports in
between are taken to come evenly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from optuna.trial import FrozenTrial

from search.storage import storage
from search.view.time_left import Finished, Running, time_left

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


Spans = list[tuple[FrozenTrial, float, float]]  # begin and end, in seconds of the search


def said(spans: Spans, num_reports: int, num_workers: int, now: float) -> float | None:
    """Seconds left as estimated at that moment."""
    finished = [
        Finished(trial.number, end - start, len(trial.intermediate_values))
        for trial, start, end in spans
        if end <= now
    ]
    running = [
        Running(trial.number, now - start, _reports(trial, start, end, now), num_reports)
        for trial, start, end in spans
        if start <= now < end
    ]
    return time_left(
        finished,
        running,
        num_waiting=len(spans) - len(finished) - len(running),
        num_workers=num_workers,
        num_reports=num_reports,
    )


def spans_of(trials: list[FrozenTrial]) -> Spans:
    attempts = sorted((a["start"], a["end"]) for t in trials for a in t.user_attrs["attempts"])
    runs: list[tuple[float, float]] = []  # times in which at least one ran
    for start, end in attempts:
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(end, runs[-1][1])
        else:
            runs.append((start, end))

    def passed(now: float) -> float:
        return sum(min(now, end) - start for start, end in runs if start < now)

    found = []
    for trial in trials:
        mine = trial.user_attrs["attempts"]
        found.append((trial, passed(mine[0]["start"]), passed(mine[-1]["end"])))
    return found


def _reports(trial: FrozenTrial, start: float, end: float, now: float) -> int:
    return int(len(trial.intermediate_values) * (now - start) / (end - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--study", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    study = storage.read_study(storage.url_in(given.out, None), given.study)
    if study is None:
        parser.error(f"{given.out} holds no study {given.study}")
    trials = study.trials
    if not all(trial.state.is_finished() for trial in trials):
        parser.error(f"the search in {given.out} has not ended")
    spans = spans_of(trials)
    whole = max(end for _, _, end in spans)
    num_workers = max(sum(start <= at < end for _, start, end in spans) for _, at, _ in spans)
    num_reports = study.user_attrs["run"]["num_reports"]
    print(f"{len(trials)} trials, {num_workers} workers")
    print(f"{'passed':>8}{'left, s':>10}{'said, s':>10}{'said/left':>11}")
    for share in SHARES:
        left = (1 - share) * whole
        estimate = said(spans, num_reports, num_workers, share * whole)
        text = f"{share:>8.0%}{left:>10.0f}"
        if estimate is not None:
            text += f"{estimate:>10.0f}{estimate / left:>11.2f}"
        print(text)


if __name__ == "__main__":
    main()
