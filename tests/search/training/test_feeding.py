"""What training data cost in memory: it is shared, whatever TensorFlow would rather do."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from search.training import backend
from tests.command import ROOT

MEASURE = """
import sys
import numpy as np
import tensorflow as tf
from search.training import backend

def own():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

array = np.load(sys.argv[1], mmap_mode="c").view(np.ndarray)
rows = backend.Rows(array, np.arange(len(array)))
labels = np.zeros(len(array), np.uint8)
tf.constant(0)
before = own()
order = np.arange(64, dtype=np.int32)
for feed in (backend.training_batches(rows, labels, order, 16),
             backend.validation_batches(rows, labels)):
    x, y = next(iter(feed))
    assert np.array_equal(x, array[: len(x)])
print((own() - before) / array.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.slow
def test_two_feeds_share_the_memory_of_a_mapped_file(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (16_000, 32, 32, 4))
    array[:, 0, 0, 0] = np.arange(len(array))
    array.flush()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "x.npy")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"},  # as workers have it
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3  # batches; a copy for each feed would be 2


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((10_000, 28, 28, 1), 500),
        ((10_000, 64, 64, 3), 500),
        ((900, 224, 224, 3), 40),
        ((9, 4_000, 4_000, 3), 1),
        ((900, 25_088), 500),
    ],
)
def test_larger_images_are_measured_fewer_at_once(shape, size):
    assert backend.validation_batch(shape) == size


def test_all_are_measured_however_few_at_once():
    x = np.zeros((95, 256, 256, 1), np.uint8)  # 31 at once
    x[:, 0, 0, 0] = np.arange(95)
    sizes, seen = [], []
    for batch, _ in backend.validation_batches(x, np.zeros(95, np.uint8)):
        sizes.append(len(batch))
        seen += np.asarray(batch)[:, 0, 0, 0].tolist()
    assert sizes == [31, 31, 31, 2]
    assert seen == list(range(95))
