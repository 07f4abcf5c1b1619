"""How long a report takes and how large it is, by the number of trials.

    python -m tests.benchmarks.report [--trials 100 500 2000]

Seconds are those of `report.write` by the clock, of the process beside them; the study is kept in
SQLite, as a run keeps it. Reading a study of 2 000 trials is part of it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from search.report import report
from search.storage import storage
from tests import made_up_run

BARS = {100: (10, 15), 2_000: (40, None)}  # trials -> seconds, MB at most


def measure(num_trials: int) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of the process, MB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = made_up_run.study_of(num_trials)
        made_up_run.write_metrics(made, folder, top=2)
        url = storage.url_in(folder, None)
        stored = storage.at(url).open(made.study_name)
        stored.add_trials(made.trials)
        stored.set_user_attr("run", made.user_attrs["run"])
        began, began_cpu = time.perf_counter(), time.process_time()
        study = storage.read_study(url, made.study_name)
        assert study is not None
        report.write(study, folder, folder / report.NAME, "Which is best?")
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        return seconds, cpu, (folder / report.NAME).stat().st_size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 500, 2_000])
    given = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}")
    print(f"{'trials':>8}{'seconds':>10}{'(CPU)':>10}{'MB':>8}")
    for num_trials in given.trials:
        seconds, cpu, size = measure(num_trials)
        print(f"{num_trials:>8,}{seconds:>10.1f}{cpu:>10.1f}{size:>8.1f}", flush=True)
        most_seconds, most_size = BARS.get(num_trials, (None, None))
        if most_seconds and seconds > most_seconds:
            print(f"  above the bar of {most_seconds} s")
        if most_size and size > most_size:
            print(f"  above the bar of {most_size} MB")


if __name__ == "__main__":
    main()
