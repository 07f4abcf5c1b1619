"""Spaces that nobody here wrote: searched, pruned, retrained, exported like ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

from search.storage import storage
from tests.command import ROOT

FOREIGN = ROOT / "tests" / "foreign.py"


def write_data(path: Path, num_classes: int, num_images: int) -> Path:
    """Bright images of a colour for each class: easy, so that training shows."""
    rng = np.random.default_rng(0)

    def part(n):
        y = np.arange(n) % num_classes
        x = rng.integers(0, 120, (n, 32, 32, 3)).astype(np.uint8)
        x[np.arange(n), :, :, y] += 120
        return x, y

    (x_train, y_train), (x_test, y_test) = part(num_images), part(60)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def search(
    folder: Path, space: str, num_classes: int = 3, epochs: float = 2, num_images: int = 240
) -> None:
    data = write_data(folder / "data.npz", num_classes, num_images)
    study = folder / "study.py"
    study.write_text(
        "from studies.study import Study\n"
        f"study = Study(name='foreign', space={space!r}, dataset={str(data)!r}, trials=3, "
        f"epochs={epochs}, images_per_report=96, batch_size=32)\n"
    )
    run(folder, "--study", str(study), "--seeds", "1", "--seed", "3")


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "search", *arguments, "--out", str(folder / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(folder: Path) -> dict:
    """Three trials, a measured winner whose model plain Keras loads, and its config and script."""
    opened = storage.read_study(f"sqlite:///{folder}/run/study.db", "foreign")
    assert [trial.state.name for trial in opened.trials if trial.state.name == "FAIL"] == []
    assert len(opened.trials) == 3
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    (winner,) = metrics["winners"]
    config = yaml.safe_load((folder / "run" / "configs" / "best.yaml").read_text())
    assert config["params"] == opened.trials[config["trial"]].params
    model = keras.models.load_model(folder / "run" / winner["seeds"][0]["model"], compile=False)
    assert model.count_params() == winner["parameters"]
    script = run(folder, "export", "--study", str(folder / "study.py"), "--format", "python")
    compile(script, "model.py", "exec")
    return metrics


GUIDES = (
    "dense",
    "Deep",
    "Shuffled",
    "Normalised",
    "OwnLoop",
    "Convolutional",
    "Conditional",
    "binary",
    "Augmented",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_s_space_goes_the_whole_way(tmp_path, name):
    search(tmp_path, f"{FOREIGN}:{name}", num_classes=2 if name == "binary" else 3)
    check(tmp_path)


@pytest.mark.longest
@pytest.mark.parametrize(
    "space",
    [
        "keras_tuner.applications:HyperXception",
        "keras_tuner.applications:HyperResNet",
        f"{FOREIGN}:EfficientNet",
    ],
)
def test_kerastuner_s_applications_go_the_whole_way(tmp_path, space):
    search(tmp_path, space, epochs=1, num_images=48)
    check(tmp_path)


@pytest.mark.slow
def test_a_fit_of_its_own_reports_each_epoch_and_decides_the_value(tmp_path):
    search(tmp_path, f"{FOREIGN}:Epochs", epochs=2)
    opened = storage.read_study(f"sqlite:///{tmp_path}/run/study.db", "foreign")
    for trial in opened.trials:
        if trial.state.name == "COMPLETE":
            assert list(trial.intermediate_values) == list(range(1, trial.params["epochs"] + 1))
            assert trial.value == max(trial.intermediate_values.values())
    check(tmp_path)
