"""Everything that differs between Keras backends: feeding batches, precision, freeing memory.

Imported by workers only, after their environment has fixed devices and threads.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from search.devices import has_bfloat16

VALIDATION_BATCH = 500  # divides 2 500 and 10 000: one shape, traced once


def use_precision(precision: str) -> str:
    """Set Keras's dtype policy: `float32`, `bfloat16`, or `auto`; returns which it is."""
    if precision == "auto":
        native = _gpu_has_bfloat16() if visible_gpus() else has_bfloat16()
        precision = "bfloat16" if native else "float32"
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    return precision


def visible_gpus() -> int:
    """How many GPUs Keras itself can use in this process."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return len(tf.config.list_physical_devices("GPU"))
    if keras.backend.backend() == "jax":
        import jax

        return sum(device.platform == "gpu" for device in jax.devices())
    return 0


def training_batches(x: np.ndarray, y: np.ndarray, order: np.ndarray, batch_size: int) -> Iterable:
    """What `fit` reads: images and labels in `order`, batch after batch, over all epochs.

    Args:
        x: (n, height, width, channels) uint8.
        y: (n,) class numbers, or (n, classes) one-hot.
        order: positions in x, (steps * batch_size,) int32.
    """
    batches = order.reshape(-1, batch_size)
    if keras.backend.backend() != "tensorflow":
        return _numpy_batches(x, y, batches)
    import tensorflow as tf

    images, labels = tf.constant(x), tf.constant(y)
    dataset = tf.data.Dataset.from_tensor_slices(batches).map(
        lambda chosen: (tf.gather(images, chosen), tf.gather(labels, chosen))
    )
    return _untuned(dataset.prefetch(2))


def validation_batches(x: np.ndarray, y: np.ndarray) -> Iterable:
    """The same images in the same order each time it is read."""
    if keras.backend.backend() != "tensorflow":
        return _Batches(x, y)
    import tensorflow as tf

    return _untuned(tf.data.Dataset.from_tensor_slices((x, y)).batch(VALIDATION_BATCH))


def release() -> int:
    """Forget the last model and give its memory back; returns the process's own, in bytes."""
    import psutil

    keras.utils.clear_session(free_memory=False)
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()  # the compiled steps of the last model: some 100 MB
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def _untuned(dataset: Any) -> Any:
    """With autotuning on, `fit` and `evaluate` return only at the end of a tuning period.

    Seen with TensorFlow 2.21: 50 steps ended after 7.7 s, `fit` returned after 10.3 s.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _numpy_batches(x: np.ndarray, y: np.ndarray, batches: np.ndarray) -> Iterator:
    for chosen in batches:
        yield x[chosen], y[chosen]


class _Batches(keras.utils.PyDataset):
    def __init__(self, x: np.ndarray, y: np.ndarray):
        super().__init__()
        self._x, self._y = x, y

    def __len__(self) -> int:
        return -(-len(self._x) // VALIDATION_BATCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(index * VALIDATION_BATCH, (index + 1) * VALIDATION_BATCH)
        return self._x[part], self._y[part]


def _gpu_has_bfloat16() -> bool:
    """NVIDIA GPUs have it from compute capability 8.0 (Ampere)."""
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    details = [
        tf.config.experimental.get_device_details(gpu)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return all(detail.get("compute_capability", (0, 0)) >= (8, 0) for detail in details)
