"""The journey of study vgg16: a weights file of Keras's layout, frozen blocks computed once."""

from __future__ import annotations

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from search.storage import storage
from tests.command import ROOT
from tests.spaces.test_vgg16 import WIDTHS, write_weights

pytestmark = pytest.mark.slow


def search(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "search", "--study", "vgg16", "--out", str(folder / "run"),
         "--dataset", str(folder / "grey.npz"), "--trials", "3", "--epochs", "2", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Three trials on 240 grey images, whose class is how bright they are."""
    folder = tmp_path_factory.mktemp("vgg16")
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = np.clip(rng.normal(40 + 80 * y[:, None, None], 20, (300, 28, 28)), 0, 255).astype(np.uint8)
    np.savez(folder / "grey.npz", x_train=x[:240], y_train=y[:240], x_test=x[240:], y_test=y[240:])
    write_weights(folder / "vgg16_notop.h5", WIDTHS)
    arguments = ("--weights", str(folder / "vgg16_notop.h5"), "--seeds", "1", "--final-epochs", "1")
    done = search(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return folder, arguments, done


def test_every_figure_says_which_weights_it_came_from(searched):
    folder, _, done = searched
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    (winner,) = metrics["winners"]
    assert winner["weights"] == metrics["weights"]["label"] == "weights of vgg16_notop.h5"
    assert "weights of vgg16_notop.h5" in done.stdout
    assert "weights of vgg16_notop.h5" in (folder / "run" / "configs" / "best.yaml").read_text()


def test_known_points_come_first_and_the_whole_network_is_kept(searched):
    folder, _, _ = searched
    study = storage.read_study(f"sqlite:///{folder}/run/study.db", "vgg16")
    depths = [trial.params["num_unfrozen_blocks"] for trial in study.trials]
    assert depths[:2] == [2, 0]
    (path,) = (folder / "run" / "models").iterdir()
    model = keras.models.load_model(path)  # with its optimizer, of which nothing of ours is left
    assert [layer for layer in model.layers if layer.name == "block1_conv1"]
    assert type(model.optimizer).__module__.startswith("keras.")


def test_no_activations_are_left_behind(searched):
    folder, _, _ = searched
    assert not (folder / "run" / "features").exists()
    logs = "".join(path.read_text() for path in (folder / "run" / "logs").iterdir())
    assert "trained on images" not in logs


def test_other_weights_are_another_question(searched):
    folder, arguments, _ = searched
    refused = search(folder, *arguments[2:], "--weights", "none")
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert "weights was 'vgg16_notop.h5' and is now 'none'" in last
    (folder / "other").mkdir()
    write_weights(folder / "other" / "vgg16_notop.h5", WIDTHS, seed=2)
    refused = search(folder, "--weights", str(folder / "other" / "vgg16_notop.h5"), "--trials", "4")
    assert "weights was 'weights of vgg16_notop.h5 (SHA-256 " in refused.stderr.splitlines()[-1]
    assert search(folder, *arguments).returncode == 0
