"""What the live view said of the time left of a search that has ended, against what it took.

    python -m tests.benchmarks.time_left --study cnn --out runs/cnn

Made again from when each attempt began and ended; reports in between are taken to come evenly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from optuna.trial import FrozenTrial

from search.storage import storage
from search.view.time_left import Finished, Running, time_left

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def said(trials: list[FrozenTrial], num_reports: int, num_workers: int, now: float) -> float | None:
    """Seconds left as estimated at that moment."""
    spans = [(trial, *_span(trial)) for trial in trials]
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
        num_waiting=len(trials) - len(finished) - len(running),
        num_workers=num_workers,
        num_reports=num_reports,
    )


def _span(trial: FrozenTrial) -> tuple[float, float]:
    attempts = trial.user_attrs["attempts"]
    return attempts[0]["start"], attempts[-1]["end"]


def _reports(trial: FrozenTrial, start: float, end: float, now: float) -> int:
    return int(len(trial.intermediate_values) * (now - start) / (end - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--study", required=True)
    parser.add_argument("--out", type=Path, required=True, help="of a search without a pause")
    given = parser.parse_args()
    study = storage.read_study(storage.url_in(given.out, None), given.study)
    if study is None:
        parser.error(f"{given.out} holds no study {given.study}")
    trials = study.trials
    spans = [_span(trial) for trial in trials]
    begin, end = min(start for start, _ in spans), max(end for _, end in spans)
    num_workers = max(sum(start <= at < end for start, end in spans) for at, _ in spans)
    print(f"{len(trials)} trials, {num_workers} workers")
    print(f"{'passed':>8}{'left, s':>10}{'said, s':>10}{'said/left':>11}")
    for share in SHARES:
        now = begin + share * (end - begin)
        estimate = said(trials, study.user_attrs["run"]["num_reports"], num_workers, now)
        text = f"{share:>8.0%}{end - now:>10.0f}"
        if estimate is not None:
            text += f"{estimate:>10.0f}{estimate / (end - now):>11.2f}"
        print(text)


if __name__ == "__main__":
    main()
