"""A run that nobody ran: a study, metrics.json and predictions as the product writes them.

For tests and benchmarks of the report, in a second and without Keras.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution as Categorical
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int
from optuna.trial import TrialState, create_trial

from search import artifacts, run_record
from search.winners import evaluation

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
NUM_REPORTS = 20
BEGAN = 1_700_000_000.0  # seconds since 1970
NUM_TEST = 2_000
MADE_WITH = {
    "versions": {"python": "3.11.9", "keras": "3.15.1", "optuna": "5.0.0"},
    "backend": "tensorflow",
    "commit": "0" * 40,
    "hardware": {"processor": "AMD EPYC", "cores": 2, "gpus": 0},
}
SPACE = {
    "num_blocks": Int(1, 4),
    "filters": Int(8, 32, step=8),
    "kernel_size": Categorical([3, 5]),
    "batch_norm": Categorical([True, False]),
    "conv_dropout": Float(0.0, 0.5, step=0.05),
    "dense_units": Int(0, 512, step=32),
    "batch_size": Categorical([64, 128, 256]),
    "optimizer": Categorical(["adam", "sgd"]),
    "schedule": Categorical(["constant", "cosine", "plateau"]),
    "label_smoothing": Float(0.0, 0.2),
}
CONDITIONAL = {
    "adam": {"adam_learning_rate": Float(1e-4, 1e-2, log=True)},
    "sgd": {"sgd_learning_rate": Float(1e-3, 1.0, log=True), "sgd_momentum": Float(0.0, 0.99)},
}


def study_of(num_trials, *, seed=0, kind="space", classes=CLASSES, extra_params=()):
    """A finished search: a fifth complete, some diverged, some attempts that died.

    Args:
        extra_params: pairs of a name and categories.
    """
    rng = np.random.default_rng(seed)
    study = optuna.create_study(study_name="made-up", direction="maximize")
    study.set_user_attr("run", run_attribute(kind, classes))
    now = [BEGAN, BEGAN + 1.0]
    trials = []
    for number in range(num_trials):
        trials.append(_trial(number, rng, now, extra_params))
    study.add_trials(trials)
    return study


def run_attribute(kind="space", classes=CLASSES):
    dataset = {
        "name": "fashion_mnist",
        "reference": "fashion_mnist",
        "sha256": "ab" * 32,
        "input_shape": [28, 28, 1],
        "class_names": list(classes),
    }
    is_objective = kind == "objective"
    return {
        "format": run_record.FORMAT,
        "described": {"name": "made-up", "dataset": "fashion_mnist", "trials": 100},
        "fixed": {"kind": kind, "epochs": 5, "seed": 0, "dataset": "fashion_mnist"},
        "num_reports": 0 if is_objective else NUM_REPORTS,
        "images_per_report": 0 if is_objective else 12_800,
        "images_per_epoch": 0 if is_objective else 50_000,
        "num_images": 60_000,
        "dataset": None if is_objective else dataset,
        "known_points": [],
        "weights": None,
        "file": None,
        "told": {
            "trials": 100,
            "workers": 2,
            "sampler": "tpe",
            "pruner": "asha",
            "precision": "" if is_objective else "bfloat16",
            "final_epochs": None,
            "top": 2,
            "seeds": 3,
        },
        "made_with": [MADE_WITH],
    }


def write_metrics(study, folder, *, top=1, seeds=2, kind="space", classes=CLASSES, **changed):
    """metrics.json and evaluation/*.npz of the best trials."""
    rng = np.random.default_rng(1)
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: -trial.value)[:top]
    winners = [_winner(trial, folder, rng, seeds, kind, classes) for trial in best]
    counts = [trial.state for trial in study.trials]
    metrics = {
        "schema": 1,
        "study": study.study_name,
        "study_file": None,
        "dataset": study.user_attrs["run"]["dataset"],
        "weights": None,
        "training": {
            "precision": "bfloat16",
            "images_per_report": 12_800,
            "batch_size": 128,
            "sampler": "tpe",
            "pruner": "asha",
            "study_seed": 0,
        },
        "search": {
            "trials": len(counts),
            "complete": counts.count(TrialState.COMPLETE),
            "pruned": counts.count(TrialState.PRUNED),
            "fail": counts.count(TrialState.FAIL),
            "seconds": 3840.0,
            "saved_share": 0.8,
        },
        "winners": winners,
        "ensemble": {"models": top * seeds, "test": winners[0]["seeds"][0]["test"]},
        "provenance": MADE_WITH,
        **changed,
    }
    artifacts.write_json(Path(folder) / "metrics.json", metrics)
    return json.loads((Path(folder) / "metrics.json").read_text())


def _trial(number, rng, now, extra_params):
    space = SPACE | {name: Categorical(choices) for name, choices in extra_params}
    params = {name: _draw(range_, rng) for name, range_ in space.items()}
    for name, range_ in CONDITIONAL[params["optimizer"]].items():
        space = space | {name: range_}
        params[name] = _draw(range_, rng)
    rate = math.log10(params.get("adam_learning_rate", params.get("sgd_learning_rate", 0.03) / 10))
    best = 0.93 - 0.012 * (rate + 2.8) ** 2 - 0.01 * abs(params["num_blocks"] - 3)
    best += 0.0005 * params["filters"] - 0.02 * (not params["batch_norm"]) + rng.normal(0, 0.004)
    curve = {
        step: round(best - 0.25 * math.exp(-step / 3) + rng.normal(0, 0.003), 6)
        for step in range(1, NUM_REPORTS + 1)
    }
    draw = rng.random()
    state, reason, reached = TrialState.COMPLETE, "", NUM_REPORTS
    if draw > 0.25:
        state, reached = TrialState.PRUNED, int(rng.choice([1, 1, 1, 4, 4, 16]))
        reason = f"pruned: behind at report {reached}"
    if draw > 0.96:
        state, reason = TrialState.PRUNED, "diverged: loss was nan at report 2"
    kind = reason.partition(":")[0] or "complete"
    curve = {step: value for step, value in curve.items() if step <= reached}
    history = {
        str(step): {
            "accuracy": value + 0.02 - 0.03 * math.exp(-step / 4),
            "loss": 2 * (1 - value) ** 0.8,
            "val_accuracy": value,
            "val_loss": 2.2 * (1 - value) ** 0.8,
        }
        for step, value in curve.items()
    }
    return create_trial(
        state=state,
        value=curve[reached] if state == TrialState.COMPLETE else None,
        params=params,
        distributions={name: space[name] for name in params},
        intermediate_values=curve,
        user_attrs={
            "pretrained": True,  # where the run has weights
            "attempts": _attempts(number, reached, kind, now),
            "history": history,
            "parameters": 120_000,
            "flops": 9_000_000,
            **({"reason": reason} if reason else {}),
        },
    )


def _attempts(number, reached, reason, now):
    """One, or two of which the first died; on the worker that is free first."""
    worker = int(np.argmin(now))
    where = {"host": "vm", "process": 100 + worker, "device": "1 cpu"}
    attempts = []
    if number % 23 == 7:
        start, now[worker] = now[worker], now[worker] + 20
        attempts.append(
            {"attempt": 1, **where, "start": start, "end": start + 19, "reason": "killed"}
        )
    start, now[worker] = now[worker], now[worker] + 6.0 * reached + 2
    end = now[worker] - 1
    attempts.append(
        {"attempt": len(attempts) + 1, **where, "start": start, "end": end, "reason": reason}
    )
    return attempts


def _winner(trial, folder, rng, seeds, kind, classes):
    made = [_seed(trial, index, folder, rng, classes) for index in range(seeds)]
    summary = evaluation.summarise([seed["test"] for seed in made])
    compared = {
        "validated": True,
        "train": {"mean": {"accuracy": 0.95, "loss": 0.14}, "std": {"accuracy": 0.0, "loss": 0.0}},
        "validation": {
            "mean": {"accuracy": 0.92, "loss": 0.2},
            "std": {"accuracy": 0.0, "loss": 0.0},
        },
    }
    return {
        "trial": trial.number,
        "params": trial.params,
        "validation_accuracy": trial.value,
        "epochs": 8.0,
        "schedule_epochs": 8,
        "share": 1.0,
        "parameters": 123_456,
        "flops": 9_000_000,
        "seconds": 612.0,
        "validated": False,
        **(compared if kind == "comparison" else {}),
        "weights": None,
        "published": {},
        "test": summary,
        "seeds": made,
        "diverged": [],
    }


def _seed(trial, index, folder, rng, classes):
    stem = f"evaluation/trial-{trial.number}-seed-{index}"
    labels = np.arange(NUM_TEST) % len(classes)
    scores = rng.normal(0, 1, (NUM_TEST, len(classes)))
    scores[np.arange(NUM_TEST), labels] += 3.2
    probabilities = np.exp(2 * scores)
    probabilities = (probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32)
    curve = np.linspace(0.7, 0.93, 15)
    arrays = {"probabilities": probabilities, "labels": labels.astype(np.uint8),
              "history_accuracy": curve + 0.02, "history_val_accuracy": curve,
              "history_loss": 1 - curve, "history_val_loss": 1.1 - curve}  # fmt: skip
    folder = Path(folder)
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{stem}.npz", **arrays)
    seed = {
        "seed": 1_000 + index,
        "model": f"models/trial-{trial.number}-seed-{index}.keras",
        "model_sha256": "cd" * 32,
        "evaluation": f"{stem}.npz",
        "evaluation_sha256": artifacts.sha256(folder / f"{stem}.npz"),
        "test": evaluation.measure(probabilities, labels, classes),
    }
    if index == 0:
        np.savez(folder / f"{stem}-pictures.npz", **_pictures(probabilities, labels, rng, classes))
        seed["pictures"] = f"{stem}-pictures.npz"
        seed["pictures_sha256"] = artifacts.sha256(folder / f"{stem}-pictures.npz")
    return seed


def _pictures(probabilities, labels, rng, classes):
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)[:40]
    arrays = {}
    for name, chosen in (("misclassified", wrong), ("samples", np.arange(20))):
        arrays |= {
            f"{name}_images": rng.integers(0, 256, (len(chosen), 28, 28, 1), np.uint8),
            f"{name}_labels": labels[chosen],
            f"{name}_predicted": predicted[chosen],
            f"{name}_confidence": confidence[chosen],
        }
    of_train = np.repeat(np.arange(len(classes)), 5)
    return arrays | {
        "train_counts": np.full(len(classes), 60_000 // len(classes)),
        "train_images": rng.integers(0, 256, (len(of_train), 28, 28, 1), np.uint8),
        "train_labels": of_train,
        "layer": np.array("conv2d"),
        "num_filters": 64,
        "filters": rng.normal(0, 1, (3, 3, 1, 32)).astype(np.float16),
        "maps": rng.normal(0, 1, (4, 28, 28, 32)).astype(np.float16),
    }


def _draw(range_, rng):
    if isinstance(range_, Categorical):
        return range_.choices[int(rng.integers(len(range_.choices)))]
    if isinstance(range_, Int):
        return int(
            range_.low + range_.step * rng.integers((range_.high - range_.low) // range_.step + 1)
        )
    if range_.log:
        return float(math.exp(rng.uniform(math.log(range_.low), math.log(range_.high))))
    if range_.step:
        return round(range_.step * int(rng.integers(range_.high / range_.step + 1)), 6)
    return float(rng.uniform(range_.low, range_.high))
