"""What kills cost: a search that is killed every few minutes, beside the same one left alone.

    python -m tests.benchmarks.kills --minutes 30
    python -m tests.benchmarks.kills --dataset digits --study quickstart --trials 4 --every 10

Both run at once, each on half of the cores (Linux), with random points, the study's own pruner and
none of its known points. Each kill is a SIGKILL of a worker or of the coordinator, by chance; a
dead coordinator's command is typed again. Time lost per kill: how much longer it took than the
search left alone, by the kills. With one worker each, both train the same points in the same order.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from search.storage import storage
from tests import invariants
from tests.benchmarks import race

ROOT = Path(__file__).parents[2]


def start(
    folder: Path, cores: list[int], given: argparse.Namespace, *options: str
) -> subprocess.Popen:
    """A search of the study in the folder's parent, on these cores."""
    # --no-retrain: the time of a winner's training is no time of the search.
    file = folder.parent / f"{given.study}.py"
    command = ["--study", str(file), "--trials", str(given.trials), "--out", str(folder)]
    command += ["--dataset", given.dataset, "--sampler", "random", "--no-retrain", "--quiet"]
    command += ["--max-attempts", "100", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "search", *command], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    psutil.Process(process.pid).cpu_affinity(cores)  # its workers', too
    return process


def alone(folder: Path, cores: list[int], given: argparse.Namespace) -> float:
    """Seconds of the search left alone."""
    began = time.monotonic()
    if start(folder, cores, given).wait() != 0:
        raise SystemExit("the search left alone failed")
    seconds = time.monotonic() - began
    print(f"{seconds:6.0f} s: the search left alone has ended", flush=True)
    return seconds


def killed(folder: Path, cores: list[int], given: argparse.Namespace) -> tuple[float, list[str]]:
    """Seconds of the search that is killed, for so many minutes; whom each kill met."""
    rng = random.Random(given.seed)
    began, kills = time.monotonic(), []
    process = start(folder, cores, given)
    next_kill = began + rng.uniform(0.5, 1.5) * given.every
    while (code := process.poll()) != 0:
        if code is not None and code != -9:
            raise SystemExit(f"the killed search ended with exit code {code}")
        if code is not None:
            invariants.wait_until_no_worker(folder, 5)
            process = start(folder, cores, given)
        now = time.monotonic()
        if now >= next_kill and now - began < given.minutes * 60:
            workers = invariants.workers_of(folder)
            victim = rng.choice(["coordinator", "worker"]) if workers else "coordinator"
            process.kill() if victim == "coordinator" else rng.choice(workers).kill()
            kills.append(victim)
            print(f"{now - began:6.0f} s: killed a {victim}", flush=True)
            next_kill = now + rng.uniform(0.5, 1.5) * given.every
        time.sleep(0.1)
    return time.monotonic() - began, kills


def numbers(folder: Path, study: str) -> str:
    """How the trials ended, the best value, and how many attempts they took."""
    opened = storage.read_study(f"sqlite:///{folder}/study.db", study)
    assert opened is not None
    trials = opened.get_trials(deepcopy=False)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.state.is_finished() for trial in trials)
    pruned = sum(trial.state.name == "PRUNED" for trial in trials)
    failed = sum(trial.state.name == "FAIL" for trial in trials)
    attempts = sum(len(trial.user_attrs["attempts"]) for trial in trials)
    return f"{len(trials)} | {pruned} | {failed} | {attempts} | {opened.best_value:.4f}"


def halves_of_cores() -> tuple[list[int], list[int]]:
    cores = sorted(psutil.Process().cpu_affinity())
    return cores[: len(cores) // 2] or cores, cores[len(cores) // 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="for so long there are kills")
    parser.add_argument("--every", type=float, default=180, help="seconds between two, on average")
    parser.add_argument("--study", default="cnn")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    halves = halves_of_cores()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as threads:
        race.study_file(given.study, Path(name))
        paths = Path(name) / "alone", Path(name) / "killed"
        left_alone = threads.submit(alone, paths[0], halves[0], given)
        seconds, kills = killed(paths[1], halves[1], given)
        print("| search | seconds | trials | pruned | failed | attempts | best value |")
        print("|---|---|---|---|---|---|---|")
        print(f"| left alone | {left_alone.result():.0f} | {numbers(paths[0], given.study)} |")
        print(f"| killed {len(kills)} times | {seconds:.0f} | {numbers(paths[1], given.study)} |")
        lost = (seconds - left_alone.result()) / max(1, len(kills))
        print(
            f"\n{lost:.0f} s lost per kill: {kills.count('worker')} of a worker, "
            f"{kills.count('coordinator')} of the coordinator; {len(halves[1])} cores for each"
        )


if __name__ == "__main__":
    main()
