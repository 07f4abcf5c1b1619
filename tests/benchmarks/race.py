"""Who has a good model first: this project, and stock tuners on the same cores, space and split.

    pip install '.[bench]'
    python -m tests.benchmarks.race --contender ours --minutes 20 --seed 1
    python -m tests.benchmarks.race --table

One contender at a time, on a machine that does nothing else. A contender and seed that are finished
are skipped; what was cut off begins anew, since its clock can't be stopped. Races of other lengths
or data are kept in other folders.

The curve of everyone is the accuracy on all 10 000 validation images, best so far, against the
seconds since this command began: imports, reading of data and tracing count. Of a peer it is
`val_accuracy` after each of its epochs, whatever its tuner makes of it. Ours reports more often, on
a part of them: where such a report is a worker's best so far, a callback of this file measures all
of them, in the race's time. A complete trial's value is its best weights' accuracy on all of them.

Peers do what their documentation says: one process, all cores, float32, epochs of the whole
training part, `fit` on arrays. Their HyperModel is study cnn's space with the `fit` that KerasTuner
documents for a tuned batch size. Epochs are the study's, for Hyperband, too: with the twelve of the
study's final training its first bracket alone would take longer than the race. Schedules end with
the epochs that a trial is to have; those of a trial that Hyperband promotes begin again with it,
since KerasTuner restores weights and no optimizer.

TensorFlow's oneDNN is off where it is off by default (on processors without AVX-512 VNNI, where
our workers turn it on and a step takes 1/1.4 to 1/1.7 of the time); TF_ENABLE_ONEDNN_OPTS=1 gives
it to a peer, too. KerasTuner's Bayesian optimization begins with three random points for each
hyperparameter, 81 of this space: in twenty minutes it is random search with other seeds of training
only, and of Optuna's sampler and pruner little more than the first ten and five trials are seen.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

OURS = ("ours", "ours-known")
MINUTES = (1, 2, 5, 10, 15, 20)  # at which the accuracies are shown
STEP = 0.005  # of the targets, in accuracy
LOWEST = 0.86  # target; a guess: anything gets there
PATIENCE = 5  # epochs, of the EarlyStopping that KerasTuner's guide gives its search

Curve = list[tuple[float, float]]  # seconds, best accuracy so far; the last is the race's end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contender", choices=[*OURS, *PEERS])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=".race/DATASET-MINUTES where it is not said")
    parser.add_argument("--dataset", default="fashion_mnist", help="digits: to try it out")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.folder = given.folder or Path(".race") / f"{given.dataset}-{given.minutes:g}"
    if given.table:
        show(given.folder)
        return
    if given.contender is None:
        parser.error("--contender or --table")
    path = given.folder / f"{given.contender}-{given.seed}.csv"
    if path.exists():
        print(f"{path} is there: nothing to do")
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    scratch = given.folder / f"{given.contender}-{given.seed}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    log = Log(path, psutil.Process().create_time(), 60 * given.minutes)
    if given.contender in OURS:
        ours(given.contender, given.seed, given.dataset, scratch, log)
        return
    threading.Thread(target=_end_in_time, args=(log, scratch), daemon=True).start()
    PEERS[given.contender](given.seed, given.dataset, scratch, log)
    # Whoever thinks that it has finished could still have gone on.
    _end_in_time(log, scratch)


class Log:
    """What a contender has reached, and when; appears under its name when the race is over.

    Args:
        began: when the command began, in seconds since 1970.
        seconds: of the race.
    """

    def __init__(self, path: Path, began: float, seconds: float):
        self._path, self._began, self._seconds = path, began, seconds
        self._rows: Curve = []
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        return self._began + self._seconds - time.time()

    def add(self, accuracy: float, at: float | None = None) -> None:
        """Reached now, or at a time in seconds since 1970."""
        with self._lock:
            self._rows.append(((at or time.time()) - self._began, float(accuracy)))

    def finish(self) -> None:
        with self._lock:
            beside = self._path.with_suffix(".partial")
            rows = [row for row in self._rows if row[0] <= self._seconds]
            with beside.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("seconds", "accuracy"))
                writer.writerows((round(at, 2), round(value, 5)) for at, value in best_so_far(rows))
                best = max((value for _, value in rows), default=0.0)
                writer.writerow((self._seconds, round(best, 5)))
            os.replace(beside, self._path)
            print(f"{self._path}: {best:.4f} after {self._seconds / 60:g} minutes", flush=True)


def _end_in_time(log: Log, scratch: Path) -> None:
    """End this process when the race is over, wherever it is: a tuner asks nobody in an epoch."""
    while (left := log.left) > 0:
        time.sleep(min(left, 1.0))
    log.finish()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def watched(space: type, dataset: str, folder: Path) -> type:
    """A space whose trainings write what they reach on all validation images into the folder: a
    file for each worker, a line (seconds since 1970, accuracy) for each best report of its own."""
    import keras

    from search.data import datasets
    from search.training import training

    rows, best, part = folder / f"{os.getpid()}.rows", [0.0], []

    class OnAllImages(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if logs[training.MONITOR] <= best[0]:
                return
            best[0] = logs[training.MONITOR]
            if not part:
                part.append(datasets.load_split(dataset))
            reached = training.accuracy(self.model, (part[0].x_val, part[0].y_val))
            with rows.open("a") as file:
                file.write(f"{time.time()},{reached}\n")

    class Watched(space):
        def callbacks(self, hp):
            return [*super().callbacks(hp), OnAllImages()]

    return Watched


def study_file(name: str, folder: Path, *, known: bool = False, watch: str = "") -> Path:
    """A file with a study of that name.

    Args:
        known: with its known points; else all points are drawn.
        watch: the dataset on whose validation images its trainings are watched (`watched`).
    """
    lines = [
        f'"""Study {name}, as a benchmark runs it."""\n',
        "from dataclasses import replace\n",
        f"from studies.{name} import study as whole\n",
        f'study = replace(whole, name="{name}")',
    ]
    if not known:
        lines.append("study = replace(study, known_points=())")
    if watch:
        lines += [
            "from pathlib import Path\n",
            "from tests.benchmarks.race import watched\n",
            f"space = watched(study.space, {watch!r}, Path({str(folder.absolute())!r}))",
            "study = replace(study, space=space)",
        ]
    file = folder / f"{name}.py"
    file.write_text("\n".join(lines) + "\n")
    return file


def ours(name: str, seed: int, dataset: str, scratch: Path, log: Log) -> None:
    """The command as a user types it, ended by a signal when the race is over."""
    from search.data import datasets
    from search.storage import storage

    datasets.ensure(dataset)
    # A killed race is to leave no search behind: the next would run beside it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    file = study_file("cnn", scratch, known=name == "ours-known", watch=dataset)
    out = scratch / "run"
    command = [sys.executable, "-m", "search", "--study", file, "--out", out, "--seed", str(seed)]
    command += ["--dataset", dataset, "--trials", "1000000", "--no-retrain", "--quiet"]
    command += ["--time-budget", f"{log.left + 30:.0f}s"]
    with subprocess.Popen(command) as process:
        try:
            process.wait(max(0.0, log.left))
        except subprocess.TimeoutExpired:
            pass
        else:
            raise SystemExit(f"the search ended by itself, with exit code {process.returncode}")
        finally:
            process.send_signal(signal.SIGTERM)
    study = storage.read_study(storage.url_in(out, None), "cnn")
    for trial in study.trials if study else ():
        if trial.value is not None:
            log.add(trial.value, trial.user_attrs["attempts"][-1]["end"])
    for line in (line for rows in scratch.glob("*.rows") for line in rows.read_text().split()):
        at, reached = line.split(",")
        log.add(float(reached), float(at))
    log.finish()


# The peers: each searches until the process ends.


def data_and_space(dataset: str, epochs: float, log: Log) -> tuple[tuple, tuple, Any]:
    """(images, one-hot labels) for training and for validation, and the HyperModel."""
    import keras
    import numpy as np

    from search.data import datasets
    from studies.cnn import FashionCNN

    datasets.ensure(dataset)
    part, found = datasets.load_split(dataset), datasets.find(dataset)

    class Recorded(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            log.add(logs["val_accuracy"])

    class Space(FashionCNN):
        """With the batch size of the point and what else a training of it needs."""

        def build(self, hp):
            # Hyperband's trials are to have so many epochs, or the rest of them.
            its_own = hp.values.get("tuner/epochs", epochs) - hp.values.get(
                "tuner/initial_epoch", 0
            )
            self.total_images = round(its_own * len(part.x_train))
            return super().build(hp)

        def fit(self, hp, model, *args, callbacks=(), **kwargs):
            # Recorded here: KerasTuner copies the callbacks that it is given.
            callbacks = [Recorded(), *self.callbacks(hp), *callbacks]
            batch_size = hp.get("batch_size")
            return model.fit(*args, batch_size=batch_size, callbacks=callbacks, **kwargs)

    one_hot = np.eye(found.num_classes, dtype=np.float32)
    space = Space(found.input_shape, found.num_classes, round(epochs * len(part.x_train)))
    return (part.x_train, one_hot[part.y_train]), (part.x_val, one_hot[part.y_val]), space


def keras_tuner_peer(tuner: str, seed: int, dataset: str, scratch: Path, log: Log) -> None:
    import keras
    import keras_tuner

    from studies.cnn import study

    keras.utils.set_random_seed(seed)
    epochs = math.ceil(study.epochs)
    # "As high a value as is within your resource budget": the race ends it.
    most = (
        {"max_epochs": epochs, "hyperband_iterations": 10**6}
        if tuner == "Hyperband"
        else {"max_trials": 10**6}
    )
    train, val, space = data_and_space(dataset, epochs, log)
    searched = getattr(keras_tuner, tuner)(
        space,
        objective="val_accuracy",
        seed=seed,
        directory=scratch,
        project_name="race",
        **most,
    )
    searched.search(
        *train,
        epochs=epochs,
        validation_data=val,
        callbacks=[keras.callbacks.EarlyStopping(monitor="val_loss", patience=PATIENCE)],
        verbose=0,
    )


def optuna_peer(seed: int, dataset: str, scratch: Path, log: Log) -> None:
    import keras
    import optuna
    from optuna_integration import KerasPruningCallback

    from search.training.hyperparameters import TrialHyperParameters
    from studies.cnn import study as cnn

    keras.utils.set_random_seed(seed)
    train, val, space = data_and_space(dataset, cnn.epochs, log)

    def objective(trial: optuna.Trial) -> float:
        keras.backend.clear_session()
        hp = TrialHyperParameters(trial)
        history = space.fit(
            hp,
            space.build(hp),
            *train,
            epochs=math.ceil(cnn.epochs),
            validation_data=val,
            callbacks=[KerasPruningCallback(trial, "val_accuracy")],
            verbose=0,
        )
        return max(history.history["val_accuracy"])

    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(
        direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner()
    )
    study.optimize(objective)


def _tuner(name: str) -> Callable[..., None]:
    return lambda *args: keras_tuner_peer(name, *args)


PEERS: dict[str, Callable[..., None]] = {
    "kerastuner-hyperband": _tuner("Hyperband"),
    "kerastuner-bayesian": _tuner("BayesianOptimization"),
    "optuna": optuna_peer,
    "random": _tuner("RandomSearch"),
}


# The table.


def best_so_far(rows: Iterable[tuple[float, float]]) -> Curve:
    """The rows that are better than all before them."""
    curve: Curve = []
    for at, value in sorted(rows):
        if not curve or value > curve[-1][1]:
            curve.append((at, value))
    return curve


def read(folder: Path) -> dict[str, dict[int, Curve]]:
    """The curves by contender and seed, ours first."""
    curves: dict[str, dict[int, Curve]] = {}
    for path in sorted(folder.glob("*-*.csv")):
        name, _, seed = path.stem.rpartition("-")
        with path.open(newline="") as file:
            rows = [(float(row["seconds"]), float(row["accuracy"])) for row in csv.DictReader(file)]
        curves.setdefault(name, {})[int(seed)] = rows
    order = [name for name in (*OURS, *PEERS) if name in curves]
    return {name: curves[name] for name in order}


def at(curve: Curve, seconds: float) -> float:
    """The best accuracy after so many seconds; not a number beyond the race's end."""
    if seconds > curve[-1][0]:
        return math.nan
    return max((value for reached, value in curve if reached <= seconds), default=0.0)


def time_to(curve: Curve, target: float) -> float:
    """Seconds until the target was reached; infinite if it never was."""
    return next((reached for reached, value in curve if value >= target), math.inf)


def median_time(curves: Mapping[int, Curve], target: float) -> float:
    return statistics.median(time_to(curve, target) for curve in curves.values())


def targets(curves: Mapping[str, Mapping[int, Curve]]) -> list[tuple[str, float]]:
    """What is to be reached, by name: steps up to the best median, and what peers end with."""
    ends = {
        # Of an even number the lower one: of their mean, half of the seeds would never be there.
        name: statistics.median_low(curve[-1][1] for curve in by_seed.values())
        for name, by_seed in curves.items()
    }
    first, last = round(LOWEST / STEP), math.floor(max(ends.values()) / STEP + 1e-9)
    steps = [(f"{step * STEP:.1%}", step * STEP) for step in range(first, last + 1)]
    peers = [(f"{end:.2%}, {name}'s end", end) for name, end in ends.items() if name not in OURS]
    return steps + sorted(peers, key=lambda target: target[1])


def accuracy_rows(curves: Mapping[str, Mapping[int, Curve]]) -> list[list[str]]:
    """Median accuracy by the minute, and the spread at the end."""
    head = ["after minutes", *(f"{minutes:g}" for minutes in MINUTES), "end, least-most", "seeds"]
    rows = [head]
    for name, by_seed in curves.items():
        row = [name]
        for minutes in MINUTES:
            values = [at(curve, 60 * minutes) for curve in by_seed.values()]
            is_known = not any(map(math.isnan, values))
            row.append(f"{statistics.median(values):.2%}" if is_known else "")
        ends = [curve[-1][1] for curve in by_seed.values()]
        rows.append([*row, f"{min(ends):.2%}-{max(ends):.2%}", str(len(by_seed))])
    return rows


def time_rows(curves: Mapping[str, Mapping[int, Curve]]) -> list[list[str]]:
    """Median seconds to each target, and how many times those of the first contender."""
    base, *_ = curves
    rows = [["seconds to", *curves]]
    for label, target in targets(curves):
        own = median_time(curves[base], target)
        row = [label]
        for name, by_seed in curves.items():
            seconds = median_time(by_seed, target)
            if math.isinf(seconds):
                row.append("never")
            elif name == base or math.isinf(own):
                row.append(f"{seconds:,.0f}")
            else:
                row.append(f"{seconds:,.0f} ({seconds / own:.1f}x)")
        rows.append(row)
    return rows


def show(folder: Path) -> None:
    curves = read(folder)
    if not curves:
        raise SystemExit(f"{folder} holds no finished race")
    for rows in (accuracy_rows(curves), time_rows(curves)):
        _print(rows)
        print()
    path = folder / "race.html"
    figure(curves).write_html(path)
    print(f"medians over seeds; figure: {path}")


def _print(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def figure(curves: Mapping[str, Mapping[int, Curve]]) -> Any:
    """A line for each seed, a colour for each contender."""
    import plotly.express
    import plotly.graph_objects as go

    colours = plotly.express.colors.qualitative.D3
    drawn = go.Figure()
    for (name, by_seed), colour in zip(curves.items(), colours, strict=False):
        for index, (seed, curve) in enumerate(by_seed.items()):
            drawn.add_scatter(
                x=[at / 60 for at, _ in curve],
                y=[value for _, value in curve],
                name=name,
                legendgroup=name,
                showlegend=index == 0,
                line={"shape": "hv", "color": colour},
                mode="lines",
                hovertemplate=f"{name}, seed {seed}: %{{y:.2%}} after %{{x:.1f}} min",
            )
    best = max(curve[-1][1] for by_seed in curves.values() for curve in by_seed.values())
    drawn.update_layout(
        xaxis_title="minutes since the command began",
        yaxis_title="best validation accuracy so far",
        yaxis={"tickformat": ".0%", "range": [LOWEST - 0.02, best + 0.005]},
    )
    return drawn


if __name__ == "__main__":
    main()
