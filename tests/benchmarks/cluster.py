"""What the coordinator does with many workers on a Ray cluster of one machine.

    python -m tests.benchmarks.cluster --workers 8 32 96

Dummy actors with fractional CPUs: reports a second, the time from a report to its answer,
the coordinator's CPU and memory. Workers are processes of 40 MB and more: 96 need 6 GB.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

from tests.command import Command


def measure(num_workers: int, seconds_between: float) -> list[str]:
    """One row: workers, reports/s, latencies in ms, coordinator's CPU share and MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = Command(Path(folder), DUMMY_SLEEP=str(seconds_between))
        process = command.start(
            *("--trials", str(6 * num_workers), "--workers", str(num_workers)),
            *("--engine", "ray", "--pruner", "none"),
        )
        coordinator = psutil.Process(process.pid)
        command._wait(lambda: command.log.exists() or process.poll() is not None, 600)
        began, used = time.monotonic(), sum(coordinator.cpu_times()[:2])
        memory = cpu = 0.0
        while process.poll() is None:
            try:
                memory = max(memory, coordinator.memory_info().rss / 1e6)
                cpu = (sum(coordinator.cpu_times()[:2]) - used) / (time.monotonic() - began)
            except psutil.Error:
                break
            time.sleep(0.5)
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(output)
        latencies, rate = of_log(command.log)
    p50, p95 = (1000 * np.percentile(latencies, p) for p in (50, 95))
    row = (num_workers, f"{rate:.0f}", f"{p50:.1f}", f"{p95:.1f}", f"{cpu:.0%}", f"{memory:.0f}")
    return [str(figure) for figure in row]


def of_log(log: Path) -> tuple[list[float], float]:
    """Seconds from each report to its answer, and reports a second."""
    by_trial = defaultdict(list)
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] in ("report", "answer"):
            by_trial[entry["trial"], entry["attempt"]].append(entry)
    latencies = [
        answer["time"] - report["time"]
        for entries in by_trial.values()
        for report, answer in zip(entries[::2], entries[1::2], strict=False)
    ]
    times = [entry["time"] for entries in by_trial.values() for entry in entries]
    return latencies, len(latencies) / (max(times) - min(times))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cluster", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32, 96])
    parser.add_argument("--seconds", type=float, default=1.0, help="between two reports, at most")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores; {given.seconds} s between reports at most")
    print("| workers | reports/s | p50 ms | p95 ms | coordinator CPU | MB |\n" + "|---" * 6 + "|")
    for num_workers in given.workers:
        print("|", " | ".join(measure(num_workers, given.seconds)), "|", flush=True)


if __name__ == "__main__":
    main()
