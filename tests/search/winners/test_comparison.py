"""Named points, trained as they are, on the training part, over several seeds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import keras
import numpy as np
import optuna
import pytest
import yaml

from search.data import datasets
from search.storage import storage
from search.winners import comparison
from search.winners.retrain import Job
from tests.command import ROOT

STUDY = '''
"""Which of two is better?"""
import keras
import keras_tuner
from studies.study import Study


class Two(keras_tuner.HyperModel):
    def __init__(self, input_shape, num_classes, weights):
        super().__init__()
        self.input_shape, self.num_classes, self.weights = input_shape, num_classes, weights

    def build(self, hp):
        units = hp.Choice("units", [2, 32])
        model = keras.Sequential([
            keras.Input(self.input_shape), keras.layers.Rescaling(1 / 16), keras.layers.Flatten(),
            keras.layers.Dense(units, "relu"), keras.layers.Dense(self.num_classes, "softmax"),
        ])
        loss = keras.losses.SparseCategoricalCrossentropy()
        model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
        return model

    def epochs(self, hp):
        return 2 if hp.Choice("units", [2, 32]) == 2 else 50

    def callbacks(self, hp):
        return [keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)]

    def is_pretrained(self, hp):
        return hp.get("units") == 2


study = Study(
    name="two", space=Two, dataset="digits", epochs=12, batch_size=32, images_per_report=1_197,
    known_points=({"units": 2}, {"units": 32}),
    published=({"test_accuracy": 0.5}, {"test_accuracy": 0.75, "val_loss": 0.1}),
    compare=True, weights="none",
)
'''


def command(folder, *arguments):
    return [sys.executable, "-m", "search", *arguments, "--out", str(folder / "run")]


def finish(folder, *arguments):
    done = subprocess.run(
        command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison whose coordinator was killed after its first training."""
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "two.py").write_text(STUDY)
    arguments = ["--study", str(folder / "two.py"), "--seeds", "2"]
    process = subprocess.Popen(
        command(folder, *arguments), cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    for line in process.stderr:
        if "trained for" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    output = finish(folder, *arguments)
    return folder, arguments, output


def metrics(folder):
    return json.loads((folder / "run" / "metrics.json").read_text())


@pytest.mark.slow
def test_each_point_is_a_trial_worth_the_mean_over_its_seeds(compared):
    folder, _, _ = compared
    study = storage.read_study(f"sqlite:///{folder}/run/study.db", "two")
    assert [trial.params for trial in study.trials] == [{"units": 2}, {"units": 32}]
    by_trial = {winner["trial"]: winner for winner in metrics(folder)["winners"]}
    for trial in study.trials:
        assert trial.value == pytest.approx(by_trial[trial.number]["validation_accuracy"])
        assert trial.intermediate_values
        assert len(by_trial[trial.number]["seeds"]) == 2
    assert metrics(folder)["winners"][0]["trial"] == 1  # the better one comes first


@pytest.mark.slow
def test_models_are_trained_on_the_training_part_as_long_as_suits_them(compared):
    folder, _, _ = compared
    study = storage.read_study(f"sqlite:///{folder}/run/study.db", "two")
    records = {k: v for k, v in study.user_attrs.items() if k.startswith("retrained:")}
    assert len(records) == 4
    part = datasets.load_split("digits")
    for key, record in records.items():
        model = keras.models.load_model(folder / "run" / record["model"])
        predicted = model.predict(part.x_val, verbose=0).argmax(axis=1)
        assert record["validation"]["accuracy"] == pytest.approx(np.mean(predicted == part.y_val))
        # One report is an epoch of the training part alone.
        epochs = len(record["history"]["loss"])
        assert record["trained_epochs"] == pytest.approx(epochs * (1_197 // 32 * 32) / 1_197)
        assert epochs == (2 if "trial-0" in key else epochs)
        assert epochs <= 12
        best = int(np.argmin(record["history"]["val_loss"]))
        assert record["train"]["loss"] == record["history"]["loss"][best]
        assert record["kept_epochs"] == pytest.approx(
            record["trained_epochs"] * (best + 1) / epochs
        )


@pytest.mark.slow
def test_published_figures_stand_beside_but_not_beside_random_weights(compared):
    folder, _, output = compared
    worse, better = sorted(metrics(folder)["winners"], key=lambda winner: winner["trial"])
    assert (worse["weights"], worse["published"]) == ("random weights", {})
    assert (better["weights"], better["published"]["test_accuracy"]) == (None, 0.75)
    lines = [line.split() for line in output.splitlines()]
    here = better["test"]["mean"]["accuracy"]
    difference = f"{here - 0.75:+.4f}"
    (figures,) = [line for line in lines if line[:3] == ["32", "test", "accuracy"]]
    assert figures[-1] == difference
    assert not [line for line in lines if line[:3] == ["2", "test", "accuracy"]]
    assert "2 (random weights)" in output
    assert {"train", "validation", "test"} <= better.keys()


@pytest.mark.slow
def test_the_same_command_says_that_all_is_done(compared):
    folder, arguments, output = compared
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*.keras")}
    assert finish(folder, *arguments) == output
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*.keras")} == before


@pytest.mark.slow
def test_a_third_seed_is_added_to_those_that_are_there(compared, tmp_path):
    import shutil

    folder, arguments, _ = compared
    shutil.copytree(folder / "run", tmp_path / "run")
    trained = {p.name for p in (tmp_path / "run" / "models").iterdir()}
    finish(tmp_path, *arguments[:2], "--seeds", "3")
    now = {path.name for path in (tmp_path / "run" / "models").iterdir()}
    assert now - trained == {"trial-0-seed-2.keras", "trial-1-seed-2.keras"}
    study = storage.read_study(f"sqlite:///{tmp_path}/run/study.db", "two")
    assert len(study.trials) == 2
    assert [attempt["reason"] for attempt in study.trials[0].user_attrs["attempts"]] == [
        "complete", "complete"
    ]  # fmt: skip
    seconds = metrics(tmp_path)["search"]["seconds"]  # of all, not of the first two seeds
    of_seeds = [3 * winner["seconds"] for winner in metrics(tmp_path)["winners"]]
    assert seconds == pytest.approx(sum(of_seeds), abs=0.5)
    assert seconds > metrics(folder)["search"]["seconds"]


@pytest.mark.slow
def test_a_config_is_trained_again_as_it_was(compared, tmp_path):
    folder, _, _ = compared
    config = yaml.safe_load((folder / "run" / "configs" / "trial-1.yaml").read_text())
    assert config["training"]["validated"] is True
    path = folder / "run" / "configs" / "trial-1.yaml"
    subprocess.run(
        [sys.executable, "-m", "search", "train", str(path), "--seeds", "1", "--out",
         str(tmp_path / "again")], cwd=ROOT, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    first = metrics(folder)["winners"][0]["seeds"][0]["test"]
    assert again["winners"][0]["seeds"][0]["test"]["accuracy"] == first["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("option", [["--trials", "9"], ["--sampler", "random"], ["--top", "2"]])
def test_options_of_a_search_are_refused(compared, option):
    folder, arguments, _ = compared
    done = subprocess.run(
        command(folder, *arguments, *option), cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"fmnist-search: study 'two' compares 2 named points and searches nothing: {option[0]}"
    )


def job(number, index, record):
    return Job(number, index, 1, {"x": number}, None, 1.0, record)


DONE = {
    "model": "m",
    "parameters": 1,
    "flops": 1,
    "start": 0.0,
    "seconds": 2.0,
    "history": {"val_accuracy": [0.5]},
    "validation": {"accuracy": 0.5},
}


def test_points_are_told_in_order_once_all_their_seeds_are_trained():
    study = optuna.create_study(direction="maximize")
    study.set_user_attr("run", {"known_points": [{"x": 0}, {"x": 1}, {"x": 2}]})
    jobs = [job(number, index, {}) for number in range(3) for index in range(2)]
    jobs[2].record = jobs[3].record = DONE  # point 1
    jobs[0].record = DONE
    assert comparison.tell(study, jobs) == []
    jobs[1].record = {"diverged": "loss was nan"}
    assert comparison.tell(study, jobs) == [0, 1]
    jobs[4].record = jobs[5].record = {"diverged": "loss was nan"}
    assert comparison.tell(study, jobs) == [2]
    assert [(t.state.name, t.value) for t in study.trials] == [
        ("COMPLETE", 0.5), ("COMPLETE", 0.5), ("FAIL", None)
    ]  # fmt: skip
    assert [trial.user_attrs["seeds"] for trial in study.trials] == [1, 2, 0]  # that are in it
    assert comparison.tell(study, jobs) == []
