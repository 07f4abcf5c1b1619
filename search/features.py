"""The frozen part of a model, cut off: its activations are computed once and the rest is trained.

    parts = features.cut(model)                        # None: nothing can be cut off
    activations = parts.prefix.predict_on_batch(images)
    parts.rest.fit(...)                                # trains the layers of `model` itself

What comes before the first trainable layer is a constant function of the image, as long as nothing
in it is random in training. search/feature_store.py keeps its values on disk; a mapped array of
them is read by `training_batches`.

Keras 3.15 hands `training=True` to every layer of a functional model in `fit`, also to one that was
called with `training=False`: a frozen base with dropout in it is not constant, however it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from search import backend
from search.model_graph import arguments, calls, tensors

_ALIGNMENT = 64  # bytes, of TensorFlow's arrays; a .npy file's data begins at a multiple of it
_TRIED_IMAGES = 4  # on which two calls of the prefix, and the cut model and the whole, must agree


class Cut(NamedTuple):
    """A model in two, which share its layers and variables."""

    prefix: keras.Model  # (n, height, width, channels) -> activation, the same in training
    rest: keras.Model  # activation -> output; compiled as the model, with its very optimizer


class Rows(NamedTuple):
    """Some rows of an array that stays on disk."""

    array: np.ndarray  # (n, ...) float16 or float32, mapped
    positions: np.ndarray  # (m,) of the rows in it

    def __len__(self) -> int:
        return len(self.positions)


def cut(model: keras.Model, images: np.ndarray | None = None) -> Cut | None:
    """The model in two, at the deepest tensor that is constant in training.

    Whether a layer is constant is first read off it, then tried: on some images the prefix must
    give the same with and without `training`, keep its weights, add no loss, and lead the rest to
    what the whole model gives.

    Args:
        model: compiled. Of a kind other than functional or Sequential, nothing is cut off, since
            it may do anything with its images.
        images: (n, height, width, channels), of which a few are tried; made up where there are
            none.

    Returns:
        None where no weights come before the first layer that is trained or random, where more
        than one tensor crosses there, or where nothing is trained at all.
    """
    if not _is_graph(model) or not model.compiled or not model.trainable_variables:
        return None
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        return None
    tried = _some_images(model) if images is None else np.array(images[:_TRIED_IMAGES])
    for prefix, rest in _splits(model):
        if prefix.weights and _is_sound(model, prefix, rest, tried):
            config = model._compile_config.config  # as given: get_compile_config holds copies
            rest.compile(**(config | {"optimizer": model.optimizer, "auto_scale_loss": False}))
            return Cut(prefix, rest)
    return None


def training_batches(rows: Rows, y: np.ndarray, order: np.ndarray, batch_size: int) -> Iterable:
    """As `backend.training_batches`, from a mapped array of which nothing is copied.

    Args:
        y: (len(rows), ...) labels.
        order: positions in rows, (steps * batch_size,) int32.
    """
    batches = order.reshape(-1, batch_size)
    if keras.backend.backend() != "tensorflow":
        return _numpy_batches(rows, y, batches)
    return _gathered(rows, y, batches).prefetch(2)


def validation_batches(rows: Rows, y: np.ndarray) -> Iterable:
    """As `backend.validation_batches`: the same in the same order each time."""
    if keras.backend.backend() != "tensorflow":
        return _Batches(rows, y)
    import tensorflow as tf

    order = tf.data.Dataset.range(len(rows)).batch(backend.VALIDATION_BATCH)
    return _gathered(rows, y, order)


def _gathered(rows: Rows, y: np.ndarray, batches: Any) -> Any:
    import tensorflow as tf

    array = rows.array
    if array.ctypes.data % _ALIGNMENT == 0:  # else TensorFlow would abort the process
        # Shares the mapped memory, where a constant would be a copy in each worker.
        array = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    positions, labels = tf.constant(rows.positions), tf.constant(y)
    if isinstance(batches, np.ndarray):
        batches = tf.data.Dataset.from_tensor_slices(batches)
    return backend._untuned(
        batches.map(
            lambda chosen: (
                tf.gather(array, tf.gather(positions, chosen)),
                tf.gather(labels, chosen),
            )
        )
    )


def _numpy_batches(rows: Rows, y: np.ndarray, batches: np.ndarray) -> Iterator:
    for chosen in batches:
        yield rows.array[rows.positions[chosen]], y[chosen]


class _Batches(keras.utils.PyDataset):
    def __init__(self, rows: Rows, y: np.ndarray):
        super().__init__()
        self._rows, self._y = rows, y

    def __len__(self) -> int:
        return -(-len(self._rows) // backend.VALIDATION_BATCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = index * backend.VALIDATION_BATCH
        part = slice(start, start + backend.VALIDATION_BATCH)
        return self._rows.array[self._rows.positions[part]], self._y[part]


def _splits(model: keras.Model) -> Iterator[tuple[keras.Model, keras.Model]]:
    """Prefix and rest at every tensor that alone crosses, the deepest first."""
    crossing, following = _crossings(model)
    if following is not None and crossing and _reads_only(following, crossing[-1]):
        yield from _splits_inside(model, crossing[-1], following)
    for tensor in reversed(crossing):
        yield keras.Model(model.inputs[0], tensor), keras.Model(tensor, model.outputs[0])


def _splits_inside(
    model: keras.Model, tensor: Any, node: Any
) -> Iterator[tuple[keras.Model, keras.Model]]:
    """Those in a model that is a layer of this one, and the first that is not constant."""
    for inner_prefix, inner_rest in _splits(node.operation):
        prefix = keras.Model(model.inputs[0], inner_prefix(tensor))
        crossing = inner_rest.inputs[0]
        start = keras.Input(batch_shape=crossing.shape, dtype=crossing.dtype)
        end = inner_rest(start)
        if node.outputs[0] is not model.outputs[0]:
            # Under the output's name, since losses may be given by it.
            name = model.output_names[0]
            end = keras.Model(node.outputs[0], model.outputs[0], name=name)(end)
        yield prefix, keras.Model(start, end)


def _crossings(model: keras.Model) -> tuple[list[Any], Any]:
    """Tensors before which all is constant and which alone cross there, in order; and the call that
    comes next."""
    nodes = calls(model)
    last_read = {id(tensor): at for at, node in enumerate(nodes) for tensor in tensors(node)}
    last_read[id(model.outputs[0])] = len(nodes)
    crossing: list[Any] = []
    alive: list[Any] = []
    for at, node in enumerate(nodes):
        if not _is_constant(node.operation):
            return crossing, node
        alive = [t for t in (*alive, *node.outputs) if last_read.get(id(t), -1) > at]
        if len(alive) == 1:
            crossing.append(alive[0])
    return crossing, None


def _is_constant(operation: Any) -> bool:
    """Whether it gives the same for the same image in training, as far as that shows."""
    if not isinstance(operation, keras.Layer):
        return True  # an operation such as x / 255
    if operation.trainable_variables or len(operation.variables) > len(operation.weights):
        return False  # what is no weight is the state of a random generator, or of a metric
    return not any(_moves(layer) for layer in operation._flatten_layers())


def _moves(layer: keras.Layer) -> bool:
    """As batch normalization without scale and centre does: it has nothing to train, and its
    statistics move."""
    parts = [part for part in layer._flatten_layers() if part is not layer]
    has_own = len(layer.weights) > sum(len(part.weights) for part in parts) if parts else (
        bool(layer.weights)
    )
    return has_own and layer.trainable and "training" in inspect.signature(layer.call).parameters


def _is_graph(model: keras.Model) -> bool:
    """Whether Keras itself calls its layers one after the other, and trains it."""
    own = type(model).__module__.partition(".")[0] == "keras"
    return own and model.built and hasattr(model, "inputs") and bool(model.inputs)


def _reads_only(node: Any, tensor: Any) -> bool:
    """Whether it calls a model with one tensor, and with nothing but `training` beside it."""
    args, kwargs = arguments(node)
    return (
        isinstance(node.operation, keras.Model)
        and _is_graph(node.operation)
        and len(node.operation.inputs) == len(node.operation.outputs) == 1
        and len(args) == 1
        and args[0] is tensor
        and not {name for name, value in kwargs.items() if value is not None} - {"training"}
    )


def _some_images(model: keras.Model) -> np.ndarray:
    shape = [size or 32 for size in model.inputs[0].shape[1:]]
    return np.random.default_rng(0).integers(0, 256, (_TRIED_IMAGES, *shape))


def _is_sound(
    model: keras.Model, prefix: keras.Model, rest: keras.Model, images: np.ndarray
) -> bool:
    """Whether the prefix is constant on these images and both parts together are the model."""
    if [id(v) for v in rest.trainable_variables] != [id(v) for v in model.trainable_variables]:
        return False  # the optimizer, where it is built, knows them in that order
    images = keras.ops.cast(images, model.inputs[0].dtype)
    before = prefix.get_weights()
    still = prefix(images, training=False)
    moving = prefix(images, training=True)
    losses = prefix.losses
    if not all(map(np.array_equal, before, prefix.get_weights())):
        prefix.set_weights(before)
        return False
    whole = model(images, training=False)
    return (
        not losses and _are_close(still, moving) and _are_close(whole, rest(still, training=False))
    )


def _are_close(some: Any, others: Any) -> bool:
    tolerance = 1e-4 if str(some.dtype) == "float32" else 1e-2  # of the largest
    a, b = (keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")) for x in (some, others))
    return np.allclose(a, b, rtol=0, atol=tolerance * np.abs(a).max())
