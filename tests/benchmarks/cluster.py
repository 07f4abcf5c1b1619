"""What the coordinator does with many workers on a Ray cluster of one machine, and with more.

    python -m tests.benchmarks.cluster --workers 8 32 96
    python -m tests.benchmarks.cluster --overhead 3

Dummy actors with fractional CPUs draw a point of about as many hyperparameters as study `cnn` has,
sleep and report; nothing is pruned. With each number of workers some kinds of load are measured
(`LOADS`), when all workers have begun: reports and trials a second, the time from a report to its
answer, the coordinator's CPU and memory. Workers are processes of 40 MB and more: 96 need 6 GB.

The coordinator is one process, so that its CPU is what its growth ends at. It is modelled as
seconds for each worker and second, each report and each trial, fitted to what was measured with all
but the most workers; what it predicts for these stands beside what they took. The times until an
answer are simulated: a queue with one server that has these costs, and workers that wait for their
answers. A machine whose cores all those workers share answers later than that.

The second command trains random points of study `cnn` for an epoch each, the same ones with either
engine, one after the other on all cores, so many times, the order exchanged between two. Compared
are the seconds of all workers, the time between their trials included; the start stands beside.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.study import Study

ROOT = Path(__file__).parents[2]
# Seconds between two reports on average, reports of a trial.
LOADS = ((4.0, 10), (0.5, 100), (1.0, 10))
SETTLE = 10.0  # seconds after a change of load
GPU_LOAD = 3.0, 20  # of a real worker on a GPU: a trial of a minute
GPU_WORKERS = (10, 30, 100, 300, 1_000)


class Measured(NamedTuple):
    """Of one load: workers, reports/s, trials/s that begin, seconds from report to answer, cores,
    bytes."""

    workers: int
    reports: float
    trials: float
    latencies: Sequence[float]
    cpu: float
    memory: int


class Costs(NamedTuple):
    """Seconds of the coordinator's core."""

    worker: float  # for each second of each
    report: float
    trial: float

    def cpu(self, workers: float, reports: float, trials: float) -> float:
        """Cores, of reports and trials a second."""
        return self.worker * workers + self.report * reports + self.trial * trials


def objective(trial: Any) -> float:
    """A point, then reports, as the file beside the log says at the time."""
    from tests.benchmarks import overheads

    folder = Path(os.environ["CLUSTER_FOLDER"])
    value = overheads.draw(trial)
    rng = random.Random(trial.number)
    with (folder / f"{os.getpid()}.log").open("a", buffering=1) as log:
        log.write(f"{time.monotonic()}\n")
        for step in itertools.count(1):
            seconds, num_reports = json.loads((folder / "load.json").read_text())
            time.sleep(seconds * rng.uniform(0.5, 1.5))
            began = time.monotonic()
            trial.report(value, step)
            log.write(f"{began} {time.monotonic() - began}\n")
            if step >= num_reports:
                break
    return value


# Its workers load this file as that of a study.
study = Study(name="cluster", objective=objective, pruner="none")


def measure(num_workers: int, seconds: float, engine: str) -> list[Measured]:
    """All loads, each for so many seconds."""
    import psutil

    with tempfile.TemporaryDirectory(prefix="fmnist-search-") as name:
        folder = Path(name)
        _write_load(folder, LOADS[0])
        command = [sys.executable, "-m", "search", "--study", __file__, "--out", folder / "run"]
        command += ["--engine", engine, "--workers", str(num_workers), "--trials", "1000000"]
        environment = {**os.environ, "CLUSTER_FOLDER": name}
        with (folder / "output").open("w") as output:
            process = subprocess.Popen(
                [*command, "--quiet"], cwd=ROOT, env=environment, stdout=output, stderr=output
            )
        try:
            coordinator = psutil.Process(process.pid)
            while len(list(folder.glob("*.log"))) < num_workers:
                if process.poll() is not None:
                    raise SystemExit((folder / "output").read_text())
                time.sleep(0.2)
            return [_window(folder, coordinator, num_workers, load, seconds) for load in LOADS]
        finally:
            for _ in range(2):  # the second ends it at once
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            process.wait()


def _write_load(folder: Path, load: tuple[float, int]) -> None:
    partial = folder / "load.partial"
    partial.write_text(json.dumps(load))
    partial.replace(folder / "load.json")


def _window(
    folder: Path, coordinator: Any, num_workers: int, load: tuple[float, int], seconds: float
) -> Measured:
    _write_load(folder, load)
    time.sleep(SETTLE)
    began, used = time.monotonic(), sum(coordinator.cpu_times()[:2])
    time.sleep(seconds)
    took, used = time.monotonic() - began, sum(coordinator.cpu_times()[:2]) - used
    rows = [line.split() for log in folder.glob("*.log") for line in log.read_text().splitlines()]
    said = [row for row in rows if began <= float(row[0]) < began + took]
    latencies = [float(row[1]) for row in said if len(row) == 2]  # else a trial begins
    return Measured(
        workers=num_workers,
        reports=len(latencies) / took,
        trials=(len(said) - len(latencies)) / took,
        latencies=latencies,
        cpu=used / took,
        memory=coordinator.memory_info().rss,
    )


def fit(measured: Sequence[Measured]) -> Costs:
    """The costs that explain best what was measured, none of them below zero."""
    from scipy.optimize import nnls

    rates = np.array([(one.workers, one.reports, one.trials) for one in measured])
    return Costs(*nnls(rates, np.array([one.cpu for one in measured]))[0])


def simulate(
    costs: Costs, num_workers: int, load: tuple[float, int], seconds: float
) -> list[float]:
    """Seconds from each report to its answer: workers that think, report and wait, one server.

    A worker's own share of the server, which belongs to no report, slows it down as a whole.
    """
    between, num_reports = load
    speed = 1.0 - costs.worker * num_workers
    rng = random.Random(0)
    # The time at which a worker reports next, and that report's step.
    queue = [(rng.uniform(0.0, between), rng.randrange(num_reports)) for _ in range(num_workers)]
    heapq.heapify(queue)
    free_at, latencies = 0.0, []
    while queue[0][0] < seconds:
        at, step = heapq.heappop(queue)
        free_at = max(free_at, at) + costs.report / speed
        latencies.append(free_at - at)
        if step + 1 == num_reports:  # the next trial is asked for
            free_at += costs.trial / speed
        answered = free_at + between * rng.uniform(0.5, 1.5)
        heapq.heappush(queue, (answered, (step + 1) % num_reports))
    return latencies[len(latencies) // 4 :]  # the beginning has no queue yet


def _milliseconds(latencies: Sequence[float]) -> str:
    return "/".join(f"{1000 * np.percentile(latencies, p):,.0f}" for p in (50, 95) if latencies)


def show_overhead(given: argparse.Namespace) -> None:
    from tests.benchmarks import kills, race

    cores = sorted(cores for half in kills.halves_of_cores() for cores in half)
    ratios = []
    print("| local: start, workers, s | Ray: start, workers, s | workers, ratio |\n|---|---|---|")
    for number in range(given.overhead):
        took = {}
        for engine in ("local", "ray") if number % 2 else ("ray", "local"):
            with tempfile.TemporaryDirectory(prefix="fmnist-search-") as name:
                file = race.study_file(given.study, Path(name))
                began = time.time()
                options = ("--engine", engine, "--pruner", "none", "--epochs", "1")
                if kills.start(Path(name) / engine, cores, given, *options).wait():
                    raise SystemExit("a search failed")
                took[engine] = _of_workers(Path(name) / engine, file.stem, began)
        ratios.append(took["ray"][1] / took["local"][1])
        cells = ("{:.0f}, {:.0f}".format(*took[engine]) for engine in ("local", "ray"))
        print(f"| {' | '.join(cells)} | {ratios[-1]:.3f} |", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}, n = {len(ratios)}")


def _of_workers(folder: Path, name: str, began: float) -> tuple[float, float]:
    """Seconds until the first trial began, and of all workers from their first trial's begin to
    their last one's end: when the others have ended, says chance."""
    from search.storage import storage

    study = storage.read_study(storage.url_in(folder, None), name)
    spans: dict[int, list[float]] = {}
    for trial in study.trials:
        for attempt in trial.user_attrs["attempts"]:
            spans.setdefault(attempt["process"], []).extend((attempt["start"], attempt["end"]))
    first = min(min(times) for times in spans.values())
    return first - began, sum(max(times) - min(times) for times in spans.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32, 96])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--engine", choices=["ray", "local"], default="ray")
    parser.add_argument("--overhead", type=int, default=0, help="pairs of searches")
    parser.add_argument("--study", default="cnn", help="of --overhead, as --dataset and --trials")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--trials", type=int, default=20)
    given = parser.parse_args()
    if given.overhead:
        show_overhead(given)
        return
    print(f"{os.cpu_count()} cores, engine {given.engine}; times to an answer in ms, p50/p95")
    print("| workers | reports/s | trials/s | answer | CPU | MB |\n" + "|---" * 6 + "|")
    measured = []
    for num_workers in sorted(given.workers):
        for one in measure(num_workers, given.seconds, given.engine):
            measured.append(one)
            print(
                f"| {one.workers} | {one.reports:.1f} | {one.trials:.2f} "
                f"| {_milliseconds(one.latencies)} | {one.cpu:.0%} | {one.memory / 1e6:.0f} |",
                flush=True,
            )
    most = max(given.workers)
    known = [one for one in measured if one.workers < most] or measured
    show_model(fit(known), [one for one in measured if one.workers == most])


def show_model(costs: Costs, checked: Sequence[Measured]) -> None:
    print(
        f"\nmilliseconds of a core: {1000 * costs.worker:.2f} for each worker and second, "
        f"{1000 * costs.report:.2f} a report, {1000 * costs.trial:.1f} a trial"
    )
    for one in checked:
        predicted = costs.cpu(one.workers, one.reports, one.trials)
        print(
            f"{one.workers} workers, {one.reports:.0f} reports/s, {one.trials:.1f} trials/s: "
            f"CPU {predicted:.0%} predicted, {one.cpu:.0%} measured"
        )
    between, num_reports = GPU_LOAD
    print(f"\nsimulated: a report every {between:g} s, a trial of {num_reports} reports")
    print("| workers | CPU | answer |\n|---|---|---|")
    for workers in GPU_WORKERS:
        cpu = costs.cpu(workers, workers / between, workers / between / num_reports)
        # Beyond that the queue only grows.
        latencies = simulate(costs, workers, GPU_LOAD, 600.0) if cpu < 1 else []
        print(f"| {workers} | {cpu:.0%} | {_milliseconds(latencies)} |")
    one = costs.cpu(1, 1 / between, 1 / between / num_reports)
    print(f"\none core is full with {1 / one:,.0f} such workers")


if __name__ == "__main__":
    main()
