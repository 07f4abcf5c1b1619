"""A table of full learning curves of study cnn's space on real Fashion-MNIST, for replays.

    python -m tests.benchmarks.curves record --folder curves
    python -m tests.benchmarks.curves pack --folder curves

Point k is drawn at random with seed k, and trained for 6 epochs of the first 20 000 images of the
training part, by one thread, as many points at a time as there are cores. After each 5 000 images,
of the average of the weights: accuracy on the 2 500 images that a search looks at; after each epoch
on all 10 000. The study's known points follow. Killed, the same command goes on with the points
that are neither in the folder nor in the table; one takes minutes. Seconds are the processor's,
which work beside it hardly changes: `nice` does no harm. Packing adds the folder's points to the
table.

The table: name (a file's, without its suffix), space (JSON, as `hyperparameters.describe` gives
it), params (points, each as JSON), known (one of the study's own points), parameters, flops, start
(seconds until the first step has been done: building and tracing), train (points, reports) and
measure (points, reports) seconds, monitor and loss (points, reports), val (points, epochs), final
(seconds of the last measurement on all validation images); NaN behind a divergence.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import optuna

from search.data import datasets
from search.training import averaging, backend, complexity, training
from search.training.hypermodel import Images, Space
from search.training.hyperparameters import ReplayedHyperParameters, TrialHyperParameters, describe
from search.workers.devices import Device, cores
from studies.cnn import FashionCNN, study

NUM_IMAGES = 20_000
NUM_EPOCHS = 6
IMAGES_PER_REPORT = 5_000
REPORTS_PER_EPOCH = NUM_IMAGES // IMAGES_PER_REPORT
_KNOWN = "known-"  # begins a file's name
_SINGLE = ("parameters", "flops", "start", "final")  # one figure for each point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "work", "pack"):
        command = commands.add_parser(name)
        command.add_argument("--folder", type=Path, required=True)
        command.add_argument("--table", type=Path, default=Path("tests/data/curves.npz"))
        command.add_argument("--points", type=int, default=109, help="drawn ones")
        command.add_argument("--index", type=int, default=0)
        command.add_argument("--of", type=int, default=cores())
    given = parser.parse_args()
    {"record": record, "work": work, "pack": pack}[given.command](given)


def record(given: argparse.Namespace) -> None:
    given.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | Device(threads=1).environment()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.curves", "work",
             "--folder", str(given.folder), "--table", str(given.table),
             "--points", str(given.points), "--index", str(index),
             "--of", str(given.of)], env=environment,
        )
        for index in range(given.of)
    ]  # fmt: skip
    try:
        codes = [worker.wait() for worker in workers]  # negative where a signal ended one
        sys.exit(any(codes))
    finally:
        for worker in workers:
            worker.kill()


def work(given: argparse.Namespace) -> None:
    backend.use_precision("auto")
    datasets.ensure("fashion_mnist")
    part = datasets.load_split("fashion_mnist")
    names = [f"{number:04d}" for number in range(given.points)]
    names += [f"{_KNOWN}{number:02d}" for number in range(len(study.known_points))]
    packed = set(stored(given.table).get("name", ()))
    missing = [name for name in names if name not in packed]
    for name in missing[given.index :: given.of]:
        path = given.folder / f"{name}.json"
        if path.exists():
            continue
        measured = curve(name, part)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(measured))
        beside.rename(path)
        last = measured["reports"][-1]
        print(f"point {name}: {last['accuracy']:.4f}, {last['at']:.0f} s", flush=True)
        backend.release()


def curve(name: str, part: datasets.Split) -> dict[str, object]:
    """Train a point and measure its curve."""
    began = time.process_time()
    number = int(name.removeprefix(_KNOWN))
    keras.utils.set_random_seed(number)
    hp = known(number) if name.startswith(_KNOWN) else drawn(number)
    space = empty_space()
    model = space.build(hp)
    averaging.average_weights(model)
    plan = training.Plan(
        NUM_IMAGES,
        IMAGES_PER_REPORT,
        NUM_EPOCHS * REPORTS_PER_EPOCH,
        hp.values["batch_size"],
        number,
    )
    watch = Watch(began, (part.x_val, part.y_val))
    training.train(
        model,
        (part.x_train[:NUM_IMAGES], part.y_train[:NUM_IMAGES]),
        plan,
        validation_data=(part.x_monitor, part.y_monitor),
        callbacks=[*space.callbacks(hp), watch, keras.callbacks.TerminateOnNaN()],
    )
    return {
        "params": hp.values,
        "parameters": complexity.parameters(model),
        "flops": complexity.flops(model),
        "start": watch.first_step - began,
        "reports": watch.reports,
        "epochs": watch.epochs,
        "final": watch.final,
    }


def empty_space() -> Space:
    return Space(FashionCNN, Images("fashion_mnist", (28, 28, 1), 10), NUM_EPOCHS * NUM_IMAGES)


def drawn(number: int) -> TrialHyperParameters:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.RandomSampler(seed=number)
    return TrialHyperParameters(optuna.create_study(sampler=sampler).ask())


def known(number: int) -> ReplayedHyperParameters:
    return ReplayedHyperParameters(study.known_points[number], complete=True)


class Watch(keras.callbacks.Callback):
    """Seconds and accuracies of each report; the time until the first step is no report's."""

    def __init__(self, began: float, val: tuple):
        super().__init__()
        self.reports: list[dict[str, float]] = []
        self.epochs: list[float] = []
        self.first_step = 0.0
        self.final = 0.0
        self._began, self._val = began, val

    def on_epoch_begin(self, epoch, logs=None):
        self._at = time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        if not self.first_step:
            self.first_step = self._at = time.process_time()

    def on_test_begin(self, logs=None):
        self._tested = time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        now = time.process_time()
        self.reports.append(
            {
                "accuracy": logs["val_accuracy"],
                "loss": logs["loss"],
                "train": self._tested - self._at,
                "measure": now - self._tested,
                "at": now - self._began,
            }
        )
        if (epoch + 1) % REPORTS_PER_EPOCH == 0:
            self.epochs.append(training.accuracy(self.model, self._val))
            self.final = time.process_time() - now


def pack(given: argparse.Namespace) -> None:
    packed = stored(given.table)
    paths = sorted(given.folder.glob("*.json"))
    points = {path.stem: json.loads(path.read_text()) for path in paths}
    added = columns({name: points[name] for name in points.keys() - set(packed.get("name", ()))})
    hp = keras_tuner.HyperParameters()
    empty_space().build(hp)
    space = json.dumps(describe(hp, empty_space().build))
    if packed.setdefault("space", space) != space:
        raise SystemExit(f"{given.table} is of another space: name a --table that is not there")
    rows = {name: np.concatenate([packed.get(name, of[:0]), of]) for name, of in added.items()}
    order = np.argsort(rows["name"])
    given.table.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(given.table, space=space, **{name: of[order] for name, of in rows.items()})
    print(f"{len(added['name'])} points added; {len(order)} in all, ", end="")
    print(f"{given.table.stat().st_size / 1e3:.0f} kB")


def stored(table: Path) -> dict[str, np.ndarray]:
    """What has been packed; nothing where there is no table."""
    if not table.exists():
        return {}
    with np.load(table) as packed:
        return dict(packed)


def columns(points: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """Rows of the table, in the order of the points."""

    def series(of: Callable[[dict], list[float]], length: int) -> np.ndarray:
        filled = np.full((len(points), length), np.nan, np.float32)
        for row, point in zip(filled, points.values(), strict=True):
            values = of(point)
            row[: len(values)] = values
        return filled

    figures = {"monitor": "accuracy", "loss": "loss", "train": "train", "measure": "measure"}
    return {
        "name": np.array(list(points), str),
        "params": np.array([json.dumps(point["params"]) for point in points.values()], str),
        "known": np.array([name.startswith(_KNOWN) for name in points], bool),
        **{name: np.array([point[name] for point in points.values()]) for name in _SINGLE},
        **{
            name: series(
                lambda point, key=key: [report[key] for report in point["reports"]],
                NUM_EPOCHS * REPORTS_PER_EPOCH,
            )
            for name, key in figures.items()
        },
        "val": series(lambda point: point["epochs"], NUM_EPOCHS),
    }


if __name__ == "__main__":
    main()
