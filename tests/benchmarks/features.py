"""How much faster an epoch is on stored activations: Keras's VGG16 at 32x32, 2 threads.

    python -m tests.benchmarks.features [--images 5000] [--repeats 3]

Both kinds of training take turns in one run; each figure is the median of the repeats, after a
warm-up. CPU seconds are those of the process: on a shared machine they say more than the clock's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from search.workers.devices import Device

os.environ |= Device(threads=2).environment()

import keras
import numpy as np

from search.training import backend, features, quick_layers
from search.training.feature_store import FeatureStore

BATCH = 128
BARS = {"nothing": 150.0, "block5": 3.5}  # clock


class Clock(keras.callbacks.Callback):
    """Seconds of each epoch, by the clock and of the process."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        began, began_cpu = self._began
        self.epochs.append((time.perf_counter() - began, time.process_time() - began_cpu))


def network(unfrozen):
    keras.utils.set_random_seed(0)
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    for layer in base.layers:
        layer.trainable = layer.name.startswith(unfrozen)
    inputs = keras.Input((32, 32, 3), dtype="uint8")
    x = base(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(64, "relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(10, "softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def epochs(model, batches, num_epochs, steps):
    clock = Clock()
    model.fit(
        batches,
        epochs=num_epochs,
        steps_per_epoch=steps,
        callbacks=[clock],
        shuffle=False,
        verbose=0,
    )
    return clock.epochs


def order(num_images, num_epochs):
    """Positions, without the images that fill no batch."""
    seen = num_images // BATCH * BATCH
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(num_images)[:seen] for _ in range(num_epochs)]).astype(
        np.int32
    )


def measure(unfrozen, num_images, repeats, few_positions):
    """Medians (clock, CPU) of an epoch on images and on activations, and of computing them."""
    quick_layers._FEW_POSITIONS = few_positions
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (num_images, 32, 32, 3)).astype(np.uint8)
    y = np.arange(num_images) % 10
    steps = num_images // BATCH
    model = network(unfrozen)
    parts = features.cut(model, x)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter(), time.process_time()
        with FeatureStore(Path(folder), 8_000_000_000).open(parts, x, data="random") as stored:
            computing = time.perf_counter() - began[0], time.process_time() - began[1]
            rows = backend.Rows(stored, np.arange(num_images))

            def on_images(num_epochs, steps=steps):
                batches = backend.training_batches(x, y, order(num_images, num_epochs), BATCH)
                return epochs(model, batches, num_epochs, steps)

            def on_activations(num_epochs):
                batches = backend.training_batches(rows, y, order(num_images, num_epochs), BATCH)
                return epochs(parts.rest, batches, num_epochs, steps)

            on_images(1, steps=2)
            on_activations(1)
            slow, quick = [], []
            for _ in range(repeats):
                slow += on_images(1)
                quick += on_activations(5 if unfrozen == "nothing" else 1)
    return [
        tuple(map(statistics.median, zip(*them, strict=True)))
        for them in (slow, quick, [computing])
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(f"{given.images} images, load {os.getloadavg()[0]:.1f}; seconds an epoch: clock (CPU)")
    print(
        f"{'unfrozen':22}{'on images':>18}{'on activations':>18}{'ratio':>16}{'computed once':>18}"
    )
    for unfrozen, positions, note in (
        ("nothing", 16, ""),
        ("block5", 16, ""),
        ("block5", 0, ", Keras's Conv2D"),
    ):
        slow, quick, once = measure(unfrozen, given.images, given.repeats, positions)
        figures = [f"{clock:.2f} ({cpu:.2f})" for clock, cpu in (slow, quick, once)]
        ratio = f"{slow[0] / quick[0]:.1f} ({slow[1] / quick[1]:.1f})"
        print(
            f"{unfrozen + note:22}{figures[0]:>18}{figures[1]:>18}{ratio:>16}{figures[2]:>18}",
            flush=True,
        )
        if not note and slow[0] / quick[0] < BARS[unfrozen]:
            print(f"  below the bar of {BARS[unfrozen]}")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
