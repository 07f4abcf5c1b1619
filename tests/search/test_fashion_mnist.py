"""The main command on the real Fashion-MNIST, as small as it can be made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from search.data import datasets, fetching
from tests.command import ROOT


def is_cached() -> bool:
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    dataset = datasets.find("fashion_mnist")
    files = dataset.train_files + dataset.test_files
    return not fetching.wrong_files(home / "datasets" / dataset.folder, files)


@pytest.mark.slow
@pytest.mark.skipif(not is_cached(), reason="Fashion-MNIST is not in KERAS_HOME or ~/.keras")
def test_the_main_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", "cnn", "--trials", "2", "--epochs", "0.25",
         "--final-epochs", "0.2", "--seeds", "2", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2 trials finished" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (winner,) = metrics["winners"]
    assert len(winner["seeds"]) == 2
    confusion = winner["seeds"][0]["test"]["confusion_matrix"]
    assert [sum(row) for row in confusion] == [1000] * 10  # the whole test set, once
    assert winner["test"]["mean"]["accuracy"] > 0.6
