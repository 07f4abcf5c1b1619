"""What everything but training costs: the coordinator, the start of a command, between two trials.

    python -m tests.benchmarks.overheads [--workers 1 8 64] [--trials 100 1000 10000]
    python -m tests.benchmarks.overheads --start
    python -m tests.benchmarks.overheads --run runs/cnn

The first runs the real coordinator and pool, with a study that has so many finished trials in
SQLite, and real worker processes whose objective only draws a point and reports, ten times a second
if it is answered in time. `ask` is all that the coordinator does to start a trial, without the
suggestions, which are a message each; `report` is from its reading to its answer, which it shares
with what else was said at the same time; `idle` is what a worker waits from the end of a trial to
the start of the next, `trial` its length in seconds, of which its hundred reports take ten. With
`--reports 2000` trials outlast the measurement, and no draw of TPE's keeps a report waiting; the
reports/s are those of its second half, when all have begun. Seconds are those of the clock, CPU
that of the coordinator alone.

The second measures the command line, the third the workers of a finished run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection, connect
from typing import Any

from studies.study import Study

NUM_FLOATS, NUM_INTS, NUM_CATEGORIES = 12, 8, 8  # about as many as study cnn draws
NUM_REPORTS = 100  # of a trial that is not pruned: ten seconds
REPORTS = "OVERHEADS_REPORTS"  # how many it is where another number is asked for; workers read it
PERIOD = 0.1  # seconds between two reports
MADE = 100  # trials, before they are copied
RUNGS = (1, 4, 16, 64)  # where made-up trials end
BARS = {"cpu": 1.0, "ask": 0.2}  # cores, seconds at the 95th percentile


def objective(trial: Any) -> float:
    """Draw a point, report on time or as soon as possible after it."""
    x = draw(trial)
    due = time.monotonic()
    for step in range(1, int(os.environ.get(REPORTS, NUM_REPORTS)) + 1):
        due = max(due + PERIOD, time.monotonic())
        time.sleep(due - time.monotonic() if due > time.monotonic() else 0.0)
        value = curve(x, step)
        trial.report(value, step, metrics={"val_accuracy": value, "val_loss": 1 - value})
    return value


def draw(trial: Any) -> float:
    """A point; its first number."""
    floats = [trial.suggest_float(f"float_{k}", 0.0, 1.0) for k in range(NUM_FLOATS)]
    for k in range(NUM_INTS):
        trial.suggest_int(f"int_{k}", 16, 256, log=True)
    for k in range(NUM_CATEGORIES):
        trial.suggest_categorical(f"category_{k}", ["a", "b", "c"])
    return floats[0]


def curve(x: float, step: int) -> float:
    return 0.9 - (x - 0.3) ** 2 - 0.3 / (step + 1)


# Its workers load this file as that of a study.
study = Study(name="overheads", objective=objective, pruner="none")


def main() -> None:
    given = options()
    os.environ[REPORTS] = str(given.reports)
    if given.case:
        print(json.dumps(measure(Path(given.case), given)))
    elif given.start:
        print_starts()
    elif given.run:
        print_run(given.run)
    else:
        print_coordinator(given)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--pruner", choices=["none", "asha"], default="none")
    parser.add_argument("--reports", type=int, default=NUM_REPORTS, help="of a trial")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--profile", type=Path, help="file for cProfile's CPU seconds")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def print_coordinator(given: argparse.Namespace) -> None:
    print(
        f"load {os.getloadavg()[0]:.1f}; {given.seconds:g} s each; {given.reports} reports a "
        f"trial; pruner {given.pruner}; "
        "milliseconds p50/p95"
    )
    columns = ("workers", "trials", "reports/s", "offered", "ended", "ask", "report", "suggest",
               "idle", "trial", "CPU", "MB", "open s")  # fmt: skip
    print("".join(f"{column:>13}" for column in columns))
    with tempfile.TemporaryDirectory(prefix="fmnist-search-") as name:
        filled = fill(Path(name), sorted(given.trials))
        for num_workers in given.workers:
            for num_trials, database in filled.items():
                folder = Path(name) / f"{num_workers}-{num_trials}"
                folder.mkdir()
                shutil.copy(database, folder / "study.db")
                found = case(folder, num_workers, given)
                print_case(num_workers, num_trials, found)


def print_case(num_workers: int, num_trials: int, found: dict[str, Any]) -> None:
    times = [_milliseconds(found[what]) for what in ("ask", "report", "suggest", "idle")]
    cells = [num_workers, num_trials, f"{found['reports']:,.0f}", f"{num_workers / PERIOD:,.0f}",
             found["ended"], *times, _seconds(found["trial"]), f"{found['cpu']:.0%}",
             f"{found['rss'] / 1e6:,.0f}", f"{found['open']:.1f}"]  # fmt: skip
    print("".join(f"{cell:>13}" for cell in cells), flush=True)
    if found["cpu"] >= BARS["cpu"] or found["reports"] < 0.95 * num_workers / PERIOD:
        print("  the coordinator does not keep up within one core")
    if found["ask"] and percentile(found["ask"], 95) > BARS["ask"]:
        print(f"  ask is above the bar of {BARS['ask']:g} s")


def case(folder: Path, num_workers: int, given: argparse.Namespace) -> dict[str, Any]:
    """Measured in a process of its own, whose memory is nothing else's."""
    command = [sys.executable, "-m", "tests.benchmarks.overheads", "--case", str(folder)]
    command += ["--workers", str(num_workers), "--seconds", str(given.seconds)]
    command += ["--pruner", given.pruner, "--reports", str(given.reports)]
    if given.profile:
        command += ["--profile", str(given.profile)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def fill(folder: Path, counts: Sequence[int]) -> dict[int, Path]:
    """Databases with so many made-up finished trials."""
    import optuna

    from search.storage import storage
    from search.view import notes

    folder.mkdir(exist_ok=True)
    database = folder / "filled.db"
    made = storage.at(storage.url_in(folder, f"sqlite:///{database}")).open(study.name)
    made.set_user_attr("run", {"num_reports": NUM_REPORTS, "fixed": {"kind": "objective"}})
    sampler = optuna.samplers.RandomSampler(seed=0)
    one = optuna.distributions
    space: dict[str, optuna.distributions.BaseDistribution] = {
        **{f"float_{k}": one.FloatDistribution(0.0, 1.0) for k in range(NUM_FLOATS)},
        **{f"int_{k}": one.IntDistribution(16, 256, log=True) for k in range(NUM_INTS)},
        **{f"category_{k}": one.CategoricalDistribution("abc") for k in range(NUM_CATEGORIES)},
    }
    filled, number, block = {}, 0, 0
    for count in counts:
        while number < min(count, MADE):
            trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
            params = {
                name: sampler.sample_independent(made, trial, name, drawn)
                for name, drawn in space.items()
            }
            made.add_trial(_finished(number, params, space))
            number += 1
        notes.save_missing(made)
        with closing(connect(database)) as source:
            while number < count:
                block += 1
                _copy(source, block * MADE, min(MADE, count - number))
                number += min(MADE, count - number)
            filled[count] = folder / f"filled-{count}.db"
            with closing(connect(filled[count])) as target:
                source.backup(target)
    return filled


def _copy(database: Connection, offset: int, count: int) -> None:
    """The first trials once more, with numbers that are higher by an offset, at other points.

    Through Optuna, ten thousand would take a quarter of an hour.
    """
    tables = [
        row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
    ]
    for table in tables:
        described = database.execute(f"PRAGMA table_info({table})").fetchall()
        names = {name: is_key for _, name, _, _, _, is_key in described}
        if "trial_id" not in names:
            continue
        # A table's own key is counted on; that of the trials is what the others refer to.
        kept = [name for name, is_key in names.items() if name == "trial_id" or not is_key]
        copied = {name: name for name in kept} | {"trial_id": f"trial_id + {offset}"}
        if "number" in copied:
            copied["number"] = f"number + {offset}"
        if table == "trial_params":
            uniform = "abs(random() % 1000000) / 1e6"
            copied["param_value"] = (
                f"CASE WHEN param_name LIKE 'float%' THEN {uniform} ELSE param_value END"
            )
        database.execute(
            f"INSERT INTO {table} ({', '.join(copied)}) SELECT {', '.join(copied.values())} "
            f"FROM {table} WHERE trial_id <= {count}"
        )
    number = "CAST(substr(key, 11) AS INTEGER)"  # behind "dashboard:"
    rest = "substr(substr(key, 11), instr(substr(key, 11), ':'))"
    database.execute(
        "INSERT INTO study_system_attributes (study_id, key, value_json) "
        f"SELECT study_id, 'dashboard:' || ({number} + {offset}) || {rest}, value_json "
        f"FROM study_system_attributes WHERE key GLOB 'dashboard:[0-9]*' AND {number} <= {count}"
    )
    database.commit()


def _finished(number: int, params: dict[str, Any], space: dict[str, Any]) -> Any:
    """One in four goes on at each rung."""
    import optuna

    rung = next((rung for k, rung in enumerate(RUNGS) if number % 4 ** (k + 1)), NUM_REPORTS)
    is_complete = rung == NUM_REPORTS
    reports = {step: curve(params["float_0"], step) for step in range(1, rung + 1)}
    states = optuna.trial.TrialState
    history = {str(step): {"val_accuracy": v, "val_loss": 1 - v} for step, v in reports.items()}
    attempt = {"attempt": 1, "process": 0, "start": 0.0, "end": 1.0, "reason": "complete"}
    reason = {} if is_complete else {"reason": f"pruned: behind at report {rung}"}
    return optuna.trial.create_trial(
        state=states.COMPLETE if is_complete else states.PRUNED,
        value=reports[rung] if is_complete else None,
        params=params,
        distributions=space,
        intermediate_values=reports,
        user_attrs={"history": history, "attempts": [attempt], "seconds": 1.0, **reason},
    )


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One coordinator for some time; what it did and what it cost."""
    import cProfile
    import logging

    import psutil

    from search import settings as settings_module
    from search.coordinator import Coordinator
    from search.storage import storage
    from search.storage.snapshots import Snapshots
    from search.view.progress import View
    from search.view.trial_logs import open_logs
    from search.workers.devices import Device
    from search.workers.local import LocalEngine
    from search.workers.pool import Pool

    logging.getLogger("search").setLevel(logging.ERROR)
    took: dict[str, list[float]] = defaultdict(list)

    class Timed(Coordinator):
        def _next(self):
            self._asked, self._asked_cpu = time.perf_counter(), time.process_time()
            return super()._next()

        def _start(self, pool, slot, trial):
            super()._start(pool, slot, trial)
            took["ask"].append(time.perf_counter() - self._asked)
            took["ask_cpu"].append(time.process_time() - self._asked_cpu)

        def _handle(self, pool, event):
            type_, began = event.message["type"], time.perf_counter()
            super()._handle(pool, event)
            # Behind its answer, which waits for what others have said at the same time.
            self._when_stored.append(lambda: took[type_].append(time.perf_counter() - began))
            took[f"{type_} at"].append(began)

    (num_workers,) = given.workers
    opening = {"type": "open", "file": str(Path(__file__).resolve())}
    url = storage.url_in(folder, None)
    with Pool(LocalEngine(folder / "logs"), [Device(1)] * num_workers, opening) as pool:
        settings = settings_module.resolve(
            pool.wait_for_description(),
            opening["file"],
            {"trials": 10**6, "time_budget": given.seconds, "pruner": given.pruner},
        )
        pool.prepare({})
        while len(pool.idle()) < num_workers:
            list(pool.poll(1.0))
        began, cpu = time.perf_counter(), time.process_time()
        opened = storage.at(url).open(study.name)
        before = len(opened.get_trials(deepcopy=False))
        open_seconds, open_cpu = time.perf_counter() - began, time.process_time() - cpu
        coordinator = Timed(
            opened, settings, [], View(-1), open_logs(None, folder), Snapshots(folder / "study.db")
        )
        process = psutil.Process()
        cpu, began = sum(process.cpu_times()[:2]), time.perf_counter()
        profile = cProfile.Profile(time.process_time)
        if given.profile:
            profile.enable()
        with _watched(process) as of_workers:
            coordinator.search(pool)
        profile.disable()
        seconds = time.perf_counter() - began
        cpu = sum(process.cpu_times()[:2]) - cpu
    if given.profile:
        profile.dump_stats(given.profile)
    trials = opened.get_trials(deepcopy=False)[before:]
    return {
        "ask": took["ask"],
        "ask_cpu": took["ask_cpu"],
        "report": took["report"],
        "suggest": took["suggest"],
        "idle": idle(trials),
        "trial": [t.user_attrs["seconds"] for t in trials if t.state.is_finished()],
        "ended": sum(trial.state.is_finished() for trial in trials),
        "reports": sum(at > began + seconds / 2 for at in took["report at"]) / (seconds / 2),
        "cpu": cpu / seconds,
        "rss": process.memory_info().rss,
        "worker_rss": max(of_workers),
        "open": open_seconds,
        "open_cpu": open_cpu,
    }


@contextmanager
def _watched(process: Any) -> Iterator[list[int]]:
    """Resident bytes of a process's children, the largest at each look: at the end of a search
    those that were busy have just been replaced."""
    import psutil

    largest: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(2.0):  # this process's own CPU is measured, too
            with suppress(psutil.Error, ValueError):
                children = process.children(recursive=True)
                largest.append(max(child.memory_info().rss for child in children))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        done.set()
        thread.join()


def idle(trials: Iterable[Any]) -> list[float]:
    """Seconds of each worker between the end of a trial and the start of the next."""
    by_worker: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for trial in trials:
        for attempt in trial.user_attrs.get("attempts", []):
            worker = attempt.get("host"), attempt.get("process")
            by_worker[worker].append((attempt["start"], attempt.get("end", float("nan"))))
    gaps = []
    for spans in by_worker.values():
        spans.sort()
        gaps += [start - end for (_, end), (start, _) in itertools.pairwise(spans)]
    return [gap for gap in gaps if gap == gap]  # an attempt that still runs has no end


def print_starts(repeats: int = 3) -> None:
    """The command line, from nothing; the first figure of each is that of cold files."""
    print(f"load {os.getloadavg()[0]:.1f}; seconds, first and median of {repeats}")
    for arguments in (["--help"], ["studies"]):
        took = []
        for _ in range(repeats):
            began = time.perf_counter()
            subprocess.run([*_COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)
            took.append(time.perf_counter() - began)
        _print_start(" ".join(arguments), took)
    for label, command in (
        ("first trial of a function", (str(Path(__file__).resolve()),)),
        ("first trial of quickstart", ("quickstart", "--epochs", "0.5")),  # one report
    ):
        starts, ends = zip(*(first_trial(*command) for _ in range(repeats)), strict=True)
        _print_start(f"{label}: it starts", starts)
        _print_start(f"{label}: its first report", ends)


_COMMAND = (sys.executable, "-m", "search")


def first_trial(reference: str, *options: str) -> tuple[float, float]:
    """Seconds from the command until the first trial starts, and until it has reported: once, or
    as often as it does in even time."""
    from search import catalogue
    from search.storage import storage

    with tempfile.TemporaryDirectory(prefix="fmnist-search-") as name:
        out = Path(name) / "run"
        began = time.time()
        command = [*_COMMAND, "--study", reference, "--out", str(out), "--trials", "1", "--quiet"]
        command += ["--no-retrain", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        study_name = catalogue.find(reference).name
        found = storage.read_study(storage.url_in(out, None), study_name)
        assert found is not None
        (trial,) = found.trials
        (attempt,) = trial.user_attrs["attempts"]
        later = attempt["seen"] - attempt["start"]  # its last report
        first = later / len(trial.intermediate_values)
        return attempt["start"] - began, attempt["start"] - began + first


def _print_start(label: str, took: Sequence[float]) -> None:
    print(f"{label:45}{took[0]:>8.2f}{statistics.median(took):>8.2f}", flush=True)


def print_run(folder: Path) -> None:
    """Where the workers' time went in a run that has been; that of replacing one is not in it."""
    from search.storage import storage

    (name,) = _study_names(folder / "study.db")
    found = storage.read_study(storage.url_in(folder, None), name)
    assert found is not None
    trials = found.get_trials(deepcopy=False)
    seconds = {
        what: sum(trial.user_attrs.get(what, 0.0) for trial in trials)
        for what in ("seconds", "training_seconds", "validation_seconds")
    }
    gaps = idle(trials)
    whole = seconds["seconds"] + sum(gaps)
    print(f"{len(trials)} trials, {whole:,.0f} seconds of workers")
    for label, part in (
        ("training steps, the first one's tracing included", seconds["training_seconds"]),
        ("validation at reports", seconds["validation_seconds"]),
        (
            "else: building, last validation, answers",
            seconds["seconds"] - seconds["training_seconds"] - seconds["validation_seconds"],
        ),
        ("idle between two trials", sum(gaps)),
    ):
        print(f"{label:52}{part:>10,.0f}{part / whole:>8.1%}")
    if gaps:
        print(f"idle between two trials, milliseconds p50/p95: {_milliseconds(gaps)}")


def _study_names(database: Path) -> list[str]:
    import optuna

    return optuna.study.get_all_study_names(f"sqlite:///file:{database.resolve()}?mode=ro&uri=true")


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _seconds(values: Sequence[float]) -> str:
    return f"{percentile(values, 50):.1f}/{percentile(values, 95):.1f}" if values else "-"


def _milliseconds(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    middle, most = (1_000 * percentile(seconds, percent) for percent in (50, 95))
    return f"{middle:,.1f}/{most:,.1f}" if most < 100 else f"{middle:,.0f}/{most:,.0f}"


if __name__ == "__main__":
    main()
