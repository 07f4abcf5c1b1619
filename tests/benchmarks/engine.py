"""Training images per second, summed over the machine: the product's workers against plain Keras.

    python -m tests.benchmarks.engine [--repeats 5] [--model deep] [--contender product-float32]

Plain Keras is `keras.Model.fit(x, y, batch_size=128)` on float arrays, in one process with the
environment as it is. The product has one process for each device that `share_out("auto")` finds,
with that device's environment, and trains as its workers do. All processes are warm (model traced)
before the first turn; contenders take turns; those of one contender start together, and what counts
is the time in which all of them are training, so that none has the machine to itself.

"steps" counts from the first training step's end to the last one's. "call" counts until `fit` has
returned, which TensorFlow delays for arrays (search/training/backend.py says why). Each figure is
the median of the repeats, a ratio the median of the ratios of single turns. Images are random: only
speed is measured. The second table says where a worker's time goes once a model is traced.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from search.workers import devices

BATCH = 128
NUM_CLASSES = 10
SHAPE = (28, 28, 1)
MODELS = ("small", "deep")
BARS = {"small": 1.7, "deep": 1.5}  # the product's steps over plain Keras's
IMAGES = 12_800  # the training set
# Of study cnn: images of a report, reports of a trial that is not pruned.
IMAGES_PER_REPORT, NUM_REPORTS = 6_400, 39
MONITOR, VALIDATION = 2_500, 10_000  # images; what a search measures at a report, and at the end


@dataclass(frozen=True)
class Contender:
    """One way to train."""

    is_product: bool = True  # its batches and its `train`; else `fit` on float arrays
    one_process: bool = False
    precision: str = "auto"
    jit_compile: bool | str = "auto"
    plain_norm: bool = False  # Keras's own batch normalisation
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of the device's


CONTENDERS = {
    "keras": Contender(is_product=False, one_process=True, precision="float32"),
    "product": Contender(),
    # Single ideas, to be tried by name.
    "keras-bfloat16": Contender(is_product=False, one_process=True, precision="bfloat16"),
    "keras-processes": Contender(is_product=False, precision="float32"),
    "product-one-process": Contender(one_process=True),
    "product-float32": Contender(precision="float32"),
    "product-bfloat16": Contender(precision="bfloat16"),
    "product-jit": Contender(jit_compile=True),
    "product-plain-norm": Contender(plain_norm=True),
    "product-no-onednn": Contender(environment={"TF_ENABLE_ONEDNN_OPTS": "0"}),
}


class Turn(NamedTuple):
    """What the processes of one contender did together."""

    steps: float  # images per second
    call: float
    shares: dict[str, float]  # of a worker's time, where asked for; mean over the workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=2 * IMAGES, help="of each process")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", default=[])
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(*given.work)
        return
    names = list(dict.fromkeys(["keras", "product", *given.contender]))
    print(f"{devices.cores()} cores, load {os.getloadavg()[0]:.1f}, {given.repeats} repeats")
    print(
        f"{'model':8}{'contender':22}{'processes':>10}{'steps':>10}{'least-most':>18}{'ratio':>8}"
        f"{'call':>10}{'ratio':>8}"
    )
    shares = {}
    for model in given.model or MODELS:
        turns = take_turns(model, names, given.images // BATCH * BATCH, given.repeats)
        for name in names:
            print_row(model, name, turns[name], turns["keras"])
        ratio = _median_ratio(turns["product"], turns["keras"], "steps")
        if ratio < BARS[model]:
            print(f"  below the bar of {BARS[model]}")
        shares[model] = turns["product"][-1].shares
    print_shares(shares)
    print(f"load {os.getloadavg()[0]:.1f}")


def take_turns(
    model: str, names: Sequence[str], num_images: int, repeats: int
) -> dict[str, list[Turn]]:
    """The turns of each contender; the product's last one also says where its time goes."""
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    with warm_workers(model, names) as workers:
        for repeat in range(repeats):
            for name in names:
                turns[name].append(turn(workers[name], {"images": num_images}))
            if repeat == repeats - 1:
                shares = turn(workers["product"], {"reports": 3}).shares
                turns["product"][-1] = turns["product"][-1]._replace(shares=shares)
    return turns


@contextmanager
def warm_workers(model: str, names: Sequence[str]) -> Iterator[dict[str, list[subprocess.Popen]]]:
    """The processes of each contender, their models traced."""
    started: dict[str, list[subprocess.Popen]] = {name: [] for name in names}
    with tempfile.TemporaryFile("w+") as said, ExitStack() as ends:
        try:
            for name in names:
                for environment in environments(CONTENDERS[name]):
                    worker = subprocess.Popen(
                        [sys.executable, "-m", "tests.benchmarks.engine", "--work", name, model],
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=said,  # TensorFlow greets
                        text=True,
                    )
                    ends.callback(worker.communicate)
                    ends.callback(worker.kill)
                    started[name].append(worker)
                for worker in started[name]:
                    _answer(worker)  # ready
            yield started
        except RuntimeError:
            said.seek(0)
            print(said.read()[-2_000:], file=sys.stderr)
            raise


def environments(contender: Contender) -> list[dict[str, str]]:
    """One for each process."""
    if not contender.is_product and contender.one_process:
        return [os.environ | contender.environment]
    shared_out = devices.share_out("1" if contender.one_process else "auto")
    return [os.environ | device.environment() | contender.environment for device in shared_out]


def turn(workers: Sequence[subprocess.Popen], task: Mapping[str, int]) -> Turn:
    for worker in workers:
        assert worker.stdin is not None
        print(json.dumps(task), file=worker.stdin, flush=True)
    answers = [_answer(worker) for worker in workers]
    shares = {
        part: statistics.mean(answer["shares"][part] for answer in answers)
        for part in answers[0]["shares"]
    }
    return Turn(*rates(answers), shares)


def rates(answers: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Images per second, by steps while all processes train and by whole calls.

    Args:
        answers: for each process `began`, `ended` and `stamps`, the ends of its steps, in seconds
            of a clock that all share.
    """
    first = max(answer["stamps"][0] for answer in answers)
    last = min(answer["stamps"][-1] for answer in answers)
    if last <= first:
        raise RuntimeError("the processes did not train at the same time: take more --images")
    steps = sum(sum(first < at <= last for at in answer["stamps"]) for answer in answers)
    seconds = max(a["ended"] for a in answers) - min(a["began"] for a in answers)
    images = sum(len(answer["stamps"]) for answer in answers) * BATCH
    return steps * BATCH / (last - first), images / seconds


def print_row(model: str, name: str, turns: Sequence[Turn], keras: Sequence[Turn]) -> None:
    steps = [turn.steps for turn in turns]
    call = statistics.median(turn.call for turn in turns)
    spread = f"{min(steps):,.0f}-{max(steps):,.0f}"
    print(
        f"{model:8}{name:22}{len(environments(CONTENDERS[name])):>10}"
        f"{statistics.median(steps):>10,.0f}{spread:>18}"
        f"{_median_ratio(turns, keras, 'steps'):>8.2f}"
        f"{call:>10,.0f}{_median_ratio(turns, keras, 'call'):>8.2f}",
        flush=True,
    )


def print_shares(shares: Mapping[str, Mapping[str, float]]) -> None:
    print(
        f"\nthe product's worker, tracing apart; a whole trial has {NUM_REPORTS} reports and a "
        f"measurement of {VALIDATION:,} images"
    )
    columns = ("training steps", "validation", "else", "not steps", "not steps, whole trial")
    print(f"{'model':8}" + "".join(f"{column:>24}" for column in columns))
    for model, parts in shares.items():
        print(f"{model:8}" + "".join(f"{parts[column]:>24.1%}" for column in columns))


def _median_ratio(turns: Sequence[Turn], others: Sequence[Turn], what: str) -> float:
    pairs = zip(turns, others, strict=True)
    return statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs)


def _answer(worker: subprocess.Popen) -> dict[str, Any]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a process ended with exit code {worker.wait()}")
    return json.loads(line)


# What follows runs in the processes that train.


def work(name: str, model_name: str) -> None:
    """Train when asked to, until the end of the standard input."""
    # Whatever else prints would be read as an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    import keras

    from search.training import averaging, backend, quick_layers, training

    contender = CONTENDERS[name]
    if contender.plain_norm:
        quick_layers.fused_batch_norm = nullcontext
    backend.use_precision(contender.precision)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (IMAGES, *SHAPE)).astype(np.uint8)
    y = rng.integers(0, NUM_CLASSES, len(x)).astype(np.uint8)
    model = network(model_name, contender)
    if contender.is_product:
        averaging.average_weights(model)
    floats = (x / 255).astype(np.float32)

    class Clock(keras.callbacks.Callback):
        """When each step ended, and when each report began."""

        def __init__(self):
            super().__init__()
            self.stamps, self.begins = [], []

        def on_epoch_begin(self, epoch, logs=None):
            self.begins.append(time.monotonic())

        def on_train_batch_end(self, batch, logs=None):
            self.stamps.append(time.monotonic())

    def train(num_images):
        clock = Clock()
        if not contender.is_product:
            at = np.resize(np.arange(len(x)), num_images)
            inputs, labels = floats[at], y[at]
            began = time.monotonic()
            model.fit(inputs, labels, batch_size=BATCH, verbose=0, callbacks=[clock])
            return began, clock
        began = time.monotonic()
        plan = training.Plan(len(x), num_images, 1, BATCH, seed=0)
        training.train(model, (x, y), plan, validation_data=None, callbacks=[clock])
        return began, clock

    def report(num_reports):
        clock, trial = Clock(), Nobody()
        told = training.Report(trial, IMAGES_PER_REPORT)
        plan = training.Plan(len(x), IMAGES_PER_REPORT, num_reports + 1, BATCH, seed=0)
        part = backend.Rows(x, np.arange(MONITOR)), y[:MONITOR]
        began = time.monotonic()
        training.train(model, (x, y), plan, validation_data=part, callbacks=[clock, told])
        ended = time.monotonic()
        at = np.resize(np.arange(len(x)), VALIDATION)
        training.accuracy(model, (backend.Rows(x, at), y[at]))
        final = time.monotonic() - ended
        return began, clock, shares(clock, trial.validations, ended, final, plan)

    train(10 * BATCH)  # traced
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        task, parts = json.loads(line), {}
        if "reports" in task:
            began, clock, parts = report(task["reports"])
        else:
            began, clock = train(task["images"])
        told = {"began": began, "ended": time.monotonic(), "stamps": clock.stamps, "shares": parts}
        print(json.dumps(told), file=answers, flush=True)


def shares(
    clock: Any, validations: list[float], ended: float, final: float, plan: Any
) -> dict[str, float]:
    """Where the time of all reports but the first went: in that one the validation is traced."""
    last_steps = clock.stamps[plan.steps_per_report - 1 :: plan.steps_per_report][1:]
    steps = sum(end - begin for begin, end in zip(clock.begins[1:], last_steps, strict=True))
    total = ended - clock.begins[1]
    validation = validations[-1] - validations[0]
    counted = len(last_steps)
    whole = NUM_REPORTS * total / counted + final
    return {
        "training steps": steps / total,
        "validation": validation / total,
        "else": 1 - (steps + validation) / total,
        "not steps": 1 - steps / total,
        "not steps, whole trial": 1 - NUM_REPORTS * steps / counted / whole,
    }


class Nobody:
    """A trial that is told and never stops; what the coordinator costs, overheads.py measures."""

    def __init__(self):
        self.validations = []  # seconds, summed over the reports until each

    def report(self, value, step, *, validation_seconds, **rest):
        self.validations.append(validation_seconds)

    def should_prune(self):
        return False


def network(name: str, contender: Contender) -> Any:
    """small: Conv32-pool-Conv64-pool-Dense128; deep: three blocks of two Conv-BN-relu, Dense256."""
    import keras

    layers = keras.layers
    dtype = "uint8" if contender.is_product else "float32"
    stack = [layers.Rescaling(1 / 255)] if contender.is_product else []
    if name == "small":
        for filters in (32, 64):
            stack += [layers.Conv2D(filters, 3, activation="relu"), layers.MaxPooling2D()]
    else:
        for filters in (32, 64, 128):
            for _ in range(2):
                stack += [
                    layers.Conv2D(filters, 3, padding="same", use_bias=False),
                    layers.BatchNormalization(),
                    layers.ReLU(),
                ]
            stack.append(layers.MaxPooling2D())
    stack += [
        layers.Flatten(),
        layers.Dense(128 if name == "small" else 256, "relu"),
        layers.Dense(NUM_CLASSES, "softmax", dtype="float32"),
    ]
    model = keras.Sequential([keras.Input(SHAPE, dtype=dtype), *stack])
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=contender.jit_compile,
    )
    return model


if __name__ == "__main__":
    main()
