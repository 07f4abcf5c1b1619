"""Everything that differs between Keras backends: feeding batches, precision, freeing memory.

Imported by workers only, after their environment has fixed devices and threads.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from search.workers.devices import gpu_memory, has_bfloat16

logger = logging.getLogger("search")

VALIDATION_BATCH = 500  # divides 2 500 and 10 000: one shape, traced once
# In a batch to be measured, where images are larger: a map of 64 filters takes half a gigabyte.
_MOST_PIXELS = VALIDATION_BATCH * 64 * 64
_ALIGNMENT = 64  # bytes, of TensorFlow's arrays; a .npy file's data begins at a multiple of it
# On a GPU a step of a small model is over before Python has sent the next one.
_MOST_AT_ONCE = 50
_OF_THE_GPU = 0.25  # its memory's share that a training set may take
_EACH_BATCH = (
    *("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end"),
    *("on_test_batch_begin", "on_test_batch_end"),
)


@dataclass(frozen=True)
class Rows:
    """Some rows of an array, which may stay on disk: nothing is copied before a batch is."""

    array: np.ndarray  # (n, ...) images or activations
    positions: np.ndarray  # (m,) of the rows in it

    def __len__(self) -> int:
        return len(self.positions)


def shareable(array: np.ndarray) -> np.ndarray:
    """The array where TensorFlow can read its memory, or one copy where it can: otherwise each
    feed (training, validation) would have a copy of its own."""
    if _is_shareable(array):
        return array
    buffer = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _is_shareable(array: np.ndarray) -> bool:
    flags = array.flags
    return bool(flags.c_contiguous and flags.writeable and not array.ctypes.data % _ALIGNMENT)


def as_rows(x: Rows | np.ndarray) -> Rows:
    return x if isinstance(x, Rows) else Rows(x, np.arange(len(x)))


def use_precision(precision: str) -> str:
    """Set Keras's dtype policy: `float32`, `bfloat16`, or `auto`; returns which it is."""
    if precision == "auto":
        native = _gpu_has_bfloat16() if visible_gpus() else has_bfloat16()
        precision = "bfloat16" if native else "float32"
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    return precision


def keep_to_share() -> None:
    """Let this process take no more of its GPU's memory than it is to; JAX reads its environment.
    Call before the first tensor."""
    if (limit := gpu_memory()) and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        own = tf.config.LogicalDeviceConfiguration(memory_limit=limit)
        try:
            for gpu in tf.config.list_physical_devices("GPU"):
                tf.config.set_logical_device_configuration(gpu, [own])
        except RuntimeError as error:  # the study's file has used it
            logger.warning("the GPU's memory is shared as workers take it: %s", error)


def visible_gpus() -> int:
    """How many GPUs Keras itself can use in this process."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return len(tf.config.list_physical_devices("GPU"))
    if keras.backend.backend() == "jax":
        import jax

        return sum(device.platform == "gpu" for device in jax.devices())
    return 0


def steps_at_once(
    model: keras.Model, callbacks: Sequence[keras.callbacks.Callback], steps_per_report: int
) -> int:
    """How many steps each call of the train function makes; they divide a report, beyond whose end
    Keras would go else. On a GPU many, unless a callback is to be told of each."""
    own = math.gcd(model.steps_per_execution, steps_per_report)
    one_by_one = model.run_eagerly or any(map(_sees_batches, callbacks))
    if model.steps_per_execution > 1 or one_by_one or not visible_gpus():
        return own
    return max(n for n in range(1, _MOST_AT_ONCE + 1) if steps_per_report % n == 0)


def _sees_batches(callback: keras.callbacks.Callback) -> bool:
    """Whether it does anything then; the loss that TerminateOnNaN sees is a mean, which stays NaN
    until a report's end."""
    if isinstance(callback, keras.callbacks.TerminateOnNaN):
        return False
    plain = keras.callbacks.Callback
    # A LambdaCallback has its functions in the instance.
    own = (getattr(getattr(callback, name), "__func__", None) for name in _EACH_BATCH)
    return any(f is not getattr(plain, name) for f, name in zip(own, _EACH_BATCH, strict=True))


def training_batches(
    x: Rows | np.ndarray, y: np.ndarray, order: np.ndarray, batch_size: int
) -> Iterable:
    """What `fit` reads: inputs and labels in `order`, batch after batch, over all epochs.

    Args:
        x: (n, height, width, channels) uint8, or activations of a frozen part.
        y: (n,) class numbers, or (n, classes) one-hot.
        order: positions in x, (steps * batch_size,) int32.
    """
    rows, batches = as_rows(x), order.reshape(-1, batch_size)
    if keras.backend.backend() != "tensorflow":
        return _numpy_batches(rows, y, batches)
    import tensorflow as tf

    return _gathered(rows, y, tf.data.Dataset.from_tensor_slices(batches), prefetch=2)


@contextmanager
def feeding(
    model: keras.Model, x: Rows | np.ndarray, y: np.ndarray, order: np.ndarray, batch_size: int
) -> Iterator[Iterable]:
    """The `training_batches` for a `fit` of this model, whose `steps_per_execution` is set. On JAX
    and a GPU images lie there as uint8, and it reads their positions only."""
    batches = order.reshape(-1, model.steps_per_execution, batch_size)
    if not (steps := _steps_on_device(model, as_rows(x), y, batches[0])):
        yield training_batches(x, y, order, batch_size)
        return
    model.train_function = steps
    try:
        yield ((chosen,) for chosen in batches)
    finally:
        model.train_function = None


def validation_batch(shape: Sequence[int]) -> int:
    """How many inputs of a shape are measured at once.

    Args:
        shape: of all of them, (n, height, width, channels); of stored activations perhaps (n, m).
    """
    pixels = math.prod(shape[1:3]) if len(shape) == 4 else 1
    return max(1, min(VALIDATION_BATCH, _MOST_PIXELS // pixels))


def validation_batches(x: Rows | np.ndarray, y: np.ndarray) -> Iterable:
    """The same inputs in the same order each time it is read."""
    rows = as_rows(x)
    if keras.backend.backend() != "tensorflow":
        return _Batches(rows, y)
    import tensorflow as tf

    batches = tf.data.Dataset.range(len(rows)).batch(validation_batch(rows.array.shape))
    return _gathered(rows, y, batches, prefetch=1)


def release() -> int:
    """Forget the last model and give its memory back; returns the process's own, in bytes."""
    import psutil

    keras.utils.clear_session(free_memory=False)
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()  # the compiled steps of the last model: some 100 MB
    _forget_gradients()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def _forget_gradients() -> None:
    """Keras sums gradients through a custom gradient, and TensorFlow keeps each of these by name,
    for ever, with the whole graph of the training step. Seen with TensorFlow 2.21: 6 to 16 MB of
    every model that was trained. They are needed where a graph is made, and no model is left that
    could still want one."""
    ops = sys.modules.get("tensorflow.python.framework.ops")
    known = getattr(getattr(ops, "gradient_registry", None), "_registry", {})
    for name in [name for name in known if name.startswith("CustomGradient-")]:
        del known[name]


def _gathered(rows: Rows, y: np.ndarray, batches: Any, *, prefetch: int) -> Any:
    import tensorflow as tf

    if not _is_shareable(rows.array):
        array = tf.constant(rows.array)  # shared, TensorFlow would abort the process
    else:
        # Shares the memory, mapped or not, where a constant would be a copy in each worker.
        array = tf.experimental.dlpack.from_dlpack(rows.array.__dlpack__())
    positions, labels = tf.constant(rows.positions), tf.constant(y)

    def gather(chosen: Any) -> Any:
        return tf.gather(array, tf.gather(positions, chosen)), tf.gather(labels, chosen)

    options = tf.data.Options()
    # With autotuning, `fit` and `evaluate` return only at the end of a tuning period. Seen with
    # TensorFlow 2.21: 50 steps ended after 7.7 s, `fit` returned after 10.3 s.
    options.autotune.enabled = False
    # With oneDNN on, rewriting the graph makes each iterator copy the whole array. Seen there: a
    # gigabyte for each of two feeds, where 15 ms and no memory do.
    options.experimental_optimization.apply_default_optimizations = False
    return batches.map(gather).prefetch(prefetch).with_options(options)


def _fits(rows: Rows) -> bool:
    """Whether there is room for them on JAX's first device, beside a model."""
    import jax

    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    each = rows.array.itemsize * math.prod(rows.array.shape[1:])
    return len(rows) * each <= _OF_THE_GPU * limit


def _steps_on_device(
    model: keras.Model, rows: Rows, y: np.ndarray, first: np.ndarray
) -> Callable[..., Any] | None:
    """A train function, as Keras makes one on JAX, whose data lie on the device and which makes
    the steps of one call there, without asking Python in between. None where there is no GPU, no
    room, or a model that is not to be compiled, or can't be.

    Args:
        first: (steps, batch_size) positions, as each call will get them.
    """
    if keras.backend.backend() != "jax" or not visible_gpus() or model.run_eagerly:
        return None
    # Activations are mapped from disk, and may be many times as large.
    if rows.array.dtype != np.uint8 or not _fits(rows):
        return None
    import jax

    # Else `fit` would build loss and metrics by what it reads, which is positions.
    model._symbolic_build(data_batch=(rows.array[rows.positions[first[0]]], y[first[0]]))
    data = jax.device_put((rows.array[rows.positions], y))

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state: Any, data: Any, batches: Any) -> Any:
        def step(state: Any, chosen: Any) -> Any:
            logs, state = model.train_step(state, jax.tree.map(lambda part: part[chosen], data))
            return state, logs

        state, logs = jax.lax.scan(step, state, batches)
        return jax.tree.map(lambda values: values[-1], logs), state

    def train_function(state: Any, iterator: Iterator) -> Any:
        (batches,) = next(iterator)
        return steps(state, data, batches)

    parts = ("trainable", "non_trainable", "optimizer", "metrics")
    state = model._get_jax_state(**{f"{part}_variables": True for part in parts})
    try:  # Keras runs what can't be compiled step by step; a trace is kept for the first call
        jax.eval_shape(steps, state, data, first)
    except Exception:
        return None
    return train_function


def _numpy_batches(rows: Rows, y: np.ndarray, batches: np.ndarray) -> Iterator:
    for chosen in batches:
        yield rows.array[rows.positions[chosen]], y[chosen]


class _Batches(keras.utils.PyDataset):
    def __init__(self, rows: Rows, y: np.ndarray):
        super().__init__()
        self._rows, self._y = rows, y
        self._size = validation_batch(rows.array.shape)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(index * self._size, (index + 1) * self._size)
        return self._rows.array[self._rows.positions[part]], self._y[part]


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
