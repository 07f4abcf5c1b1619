"""A study whose objective only sleeps and reports: for faults, in seconds and without Keras.

It writes what it does to an append-only log of its own, which `invariants.py` holds against the
study. Environment: DUMMY_LOG, its path; DUMMY_SLEEP, seconds between two reports at most, unless
the file DUMMY_LOG.sleep says otherwise, which may come and go meanwhile; DUMMY_FAULT, what goes
wrong in it.
"""

import json
import os
import signal
import sys
import time

from studies.study import Study

NUM_REPORTS = 5


def log(trial, event, **content):
    entry = {"process": os.getpid(), "trial": trial.number, "attempt": trial.attempt}
    line = json.dumps({**entry, "event": event, "time": time.monotonic(), **content}) + "\n"
    descriptor = os.open(os.environ["DUMMY_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def most_seconds():
    try:
        with open(os.environ["DUMMY_LOG"] + ".sleep") as file:
            return float(file.read())
    except FileNotFoundError:
        return float(os.environ.get("DUMMY_SLEEP", "0.09"))


def objective(trial):
    fault = os.environ.get("DUMMY_FAULT", "")
    share = float(os.environ.get("FMNIST_SEARCH_GPU_SHARE", "1"))
    log(trial, "begin", niceness=os.nice(0), gpu_share=share)
    x = trial.suggest_float("x", 0.0, 1.0)
    units = trial.suggest_int("units", 16, 256, log=True)
    kind = trial.suggest_categorical("kind", ["a", "b"])
    if kind == "b":
        trial.suggest_float("b_rate", 1e-4, 1e-1, log=True)
    log(trial, "params", params=trial.params)
    value = 0.0
    for step in range(1, NUM_REPORTS + 1):
        # 10 % to 100 % of the time, the same for the same point.
        time.sleep(most_seconds() * (0.1 + 0.9 * x))
        value = round(1 - (x - 0.3) ** 2 - 1 / (units * step), 9)
        fail(fault, trial, step)
        log(trial, "report", step=step, value=value)
        trial.report(float("nan") if fault == "nan" and trial.number % 2 else value, step)
        log(trial, "answer", step=step, prune=trial.should_prune())
        if trial.should_prune():
            return value
    log(trial, "end", value=value)
    return "none" if fault == "string" else value


def is_crowded():
    """Whether another worker's attempt has begun and not ended, as far as the log says."""
    last = {}
    with open(os.environ["DUMMY_LOG"]) as lines:
        for line in lines:
            entry = json.loads(line)
            last[entry["process"]] = entry
    others = [entry for process, entry in last.items() if process != os.getpid()]
    return any(entry["event"] not in ("end", "no memory") for entry in others)


def fail(fault, trial, step):
    while fault == "hang" and trial.number == 2 and step == 2:
        pass
    if fault == "memory" and trial.number == 2 and step == 2:
        hog = []
        while True:  # until the kernel ends it: only in a cgroup with a limit
            hog.append(bytearray(b"x") * 2**24)
    # The first time without a look, since two may have met by chance or not.
    is_short = trial.number in (2, 3) and step == 2 and (trial.attempt == 1 or is_crowded())
    if fault == "memory-error" and is_short:
        log(trial, "no memory")
        raise MemoryError("the dummy's own limit")
    if fault == "raise":
        raise RuntimeError("the dummy's own error")
    dies = {
        "die-once": trial.attempt == 1 and trial.number % 4 == 1,
        "die-always": trial.number == 2,
    }
    if step == 3 and dies.get(fault, False):
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


study = Study(
    name="dummy",
    objective=objective,
    trials=20,
    known_points=({"x": 0.6, "units": 64, "kind": "a"}, {"x": 0.5, "units": 32, "kind": "a"}),
)
