"""What must hold after a run of the dummy study, whatever was killed: see `check`."""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from pathlib import Path

import optuna
import psutil

from search import results
from search.storage import storage


def check(folder: Path, log: Path, num_trials: int, url: str | None = None) -> None:
    """Hold the study in `folder` against the log that the dummy's attempts wrote.

    a. numbers are exactly 0..N-1; b. all are finished; c. each was told once; d. params, steps and
    value are those of the attempt that won; e. no trial had two attempts at a time; f. the best
    trial is the log's best; h. no process, lock or temporary file is left.
    """
    study = storage.read_study(storage.url_in(folder, url), "dummy")
    assert study is not None
    trials = study.get_trials(deepcopy=False)
    attempts = _attempts(log)
    assert [trial.number for trial in trials] == list(range(num_trials))
    for trial in trials:
        assert trial.state.is_finished(), f"trial {trial.number} is {trial.state.name}"
        told = [a for a in trial.user_attrs["attempts"] if a["reason"] in ("complete", "pruned")]
        if trial.state != optuna.trial.TrialState.FAIL:
            assert len(told) == 1, f"trial {trial.number} was told {len(told)} times"
            _check_stored(trial, attempts[trial.number])
        _check_one_at_a_time(trial.number, attempts[trial.number])
    _check_best(study, attempts)
    _check_nothing_left(folder)


def workers_of(folder: Path) -> list[psutil.Process]:
    """Living workers whose output goes to this run's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if "search.workers.worker" not in command or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        try:
            logs = [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        if any(str(folder.resolve()) in path for path in logs):  # a cluster's node has its own
            found.append(process)
    return found


def wait_until_no_worker(folder: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while workers_of(folder):
        assert time.monotonic() < end, f"workers alive after {seconds} s: {workers_of(folder)}"
        time.sleep(0.05)


def _attempts(log: Path) -> dict[int, dict[int, list[dict]]]:
    """The log's entries by trial and attempt. The last line may be torn by a kill."""
    found: dict[int, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["trial"]][entry["attempt"]].append(entry)
    return found


def _check_stored(trial: optuna.trial.FrozenTrial, attempts: dict[int, list[dict]]) -> None:
    last = trial.user_attrs["attempts"][-1]["attempt"]
    assert last == max(attempts), f"trial {trial.number}: another attempt won"
    entries = attempts[last]
    (params,) = [entry["params"] for entry in entries if entry["event"] == "params"]
    assert trial.params == params, f"trial {trial.number}"
    reports = {e["step"]: e["value"] for e in entries if e["event"] == "report"}
    assert trial.intermediate_values == reports, f"trial {trial.number}"
    if trial.state == optuna.trial.TrialState.COMPLETE:
        assert trial.value == list(reports.values())[-1]


def _check_one_at_a_time(number: int, attempts: dict[int, list[dict]]) -> None:
    for one, next_ in itertools.pairwise(sorted(attempts)):
        ended, began = attempts[one][-1]["time"], attempts[next_][0]["time"]
        assert ended <= began, f"trial {number}: attempts {one} and {next_} overlapped"
    for attempt, entries in attempts.items():
        assert len({entry["process"] for entry in entries}) == 1, (number, attempt)


def _check_best(study: optuna.Study, attempts: dict[int, dict[int, list[dict]]]) -> None:
    ends = {
        number: entry["value"]
        for number, by_attempt in attempts.items()
        for entry in by_attempt[max(by_attempt)]
        if entry["event"] == "end"
    }
    if not ends:
        return
    best = max(ends, key=lambda number: (ends[number], -number))
    assert results.winners(study, 1)[0].number == best


def _check_nothing_left(folder: Path) -> None:
    wait_until_no_worker(folder, 5)
    left = [p.name for p in folder.rglob("*") if p.suffix == ".lock" or ".partial" in p.name]
    assert left == []
    names = {p.name for p in folder.iterdir()}
    assert names <= {
        "report.html",
        "study.db",
        "study.db-wal",
        "study.db-shm",
        "search.log",
        "logs",
        "snapshots",
    }, names
