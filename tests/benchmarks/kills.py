"""What kills cost: a search that is killed every few minutes, against the same one left alone.

    python -m tests.benchmarks.kills --minutes 30
    python -m tests.benchmarks.kills --dataset digits --study quickstart --trials 4 --every 10

Each kill is a SIGKILL of a worker or of the coordinator, by chance; a dead coordinator's command is
typed again. Time lost per kill: how much longer it took than the search left alone, by the kills.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from search.storage import storage
from tests import invariants

ROOT = Path(__file__).parents[2]


def start(folder: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    # --no-retrain: the time of a winner's training is no time of the search.
    command = ["--study", arguments.study, "--trials", str(arguments.trials), "--out", str(folder)]
    command += ["--dataset", arguments.dataset, "--sampler", "random", "--no-retrain", "--quiet"]
    command += ["--max-attempts", "100"]
    if arguments.workers:
        command += ["--workers", str(arguments.workers)]
    return subprocess.Popen(
        [sys.executable, "-m", "search", *command], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def alone(folder: Path, arguments: argparse.Namespace) -> float:
    """Seconds of the search left alone."""
    began = time.monotonic()
    if start(folder, arguments).wait() != 0:
        raise SystemExit("the search left alone failed")
    return time.monotonic() - began


def killed(folder: Path, arguments: argparse.Namespace) -> tuple[float, list[str]]:
    """Seconds of the search that is killed, for so many minutes; whom each kill met."""
    rng = random.Random(arguments.seed)
    began, kills = time.monotonic(), []
    process = start(folder, arguments)
    next_kill = began + rng.uniform(0.5, 1.5) * arguments.every
    while (code := process.poll()) != 0:
        if code is not None and code != -9:
            raise SystemExit(f"the killed search ended with exit code {code}")
        if code is not None:
            invariants.wait_until_no_worker(folder, 5)
            process = start(folder, arguments)
        now = time.monotonic()
        if now >= next_kill and now - began < arguments.minutes * 60:
            workers = invariants.workers_of(folder)
            victim = rng.choice(["coordinator", "worker"]) if workers else "coordinator"
            process.kill() if victim == "coordinator" else rng.choice(workers).kill()
            kills.append(victim)
            print(f"{now - began:6.0f} s: killed a {victim}", flush=True)
            next_kill = now + rng.uniform(0.5, 1.5) * arguments.every
        time.sleep(0.1)
    return time.monotonic() - began, kills


def numbers(folder: Path, study: str) -> str:
    """How the trials ended, and how many attempts they took."""
    opened = storage.read_study(f"sqlite:///{folder}/study.db", study)
    assert opened is not None
    trials = opened.get_trials(deepcopy=False)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.state.is_finished() for trial in trials)
    failed = sum(trial.state.name == "FAIL" for trial in trials)
    attempts = sum(len(trial.user_attrs["attempts"]) for trial in trials)
    return f"{len(trials)} | {failed} | {attempts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="for so long there are kills")
    parser.add_argument("--every", type=float, default=180, help="seconds between two, on average")
    parser.add_argument("--study", default="cnn")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "alone", Path(folder) / "killed"
        left_alone = alone(paths[0], arguments)
        print(f"left alone: {left_alone:.0f} s", flush=True)
        seconds, kills = killed(paths[1], arguments)
        print("| search | seconds | trials | failed | attempts |\n|---|---|---|---|---|")
        print(f"| left alone | {left_alone:.0f} | {numbers(paths[0], arguments.study)} |")
        print(
            f"| killed {len(kills)} times | {seconds:.0f} | {numbers(paths[1], arguments.study)} |"
        )
        lost = (seconds - left_alone) / max(1, len(kills))
        print(f"\n{lost:.0f} s lost per kill, on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
