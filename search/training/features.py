"""The frozen part of a model, cut off: its activations are computed once and the rest is trained.

    parts = features.cut(model)                        # None: nothing can be cut off
    activations = parts.prefix.predict_on_batch(images)
    parts.rest.fit(...)                                # trains the layers of `model` itself

What comes before the first trainable layer is a constant function of the image, as long as nothing
in it is random in training. search/training/feature_store.py keeps its values on disk.

In `fit`, Keras 3.15 hands `training=True` to every layer of a functional model, also to one that
was called with `training=False`: a frozen base with dropout in it is not constant.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from search.training import quick_layers
from search.training.complexity import flops
from search.training.model_graph import arguments, calls, tensors

LOGITS_DIFFER = 1e-2  # at most, between float16 and float32 activations
CLASSES_AGREE = 0.999  # of the images, at least
_TRAINED = 10.0  # between the most and the least likely class's logits, once trained; a guess
_BATCH = 256
_WORTH = 0.05  # of the operations of the whole model, at inference
_TRIED_IMAGES = 4  # on which the prefix must be constant, and both parts together the model


class Cut(NamedTuple):
    """A model in two, which share its layers and variables."""

    prefix: keras.Model  # (n, height, width, channels) -> activation, the same in training
    rest: keras.Model  # activation -> output; compiled as the model, with its very optimizer


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
        None where next to no work comes before the first layer that is trained or random, where
        more than one tensor crosses there, or where nothing is trained at all.
    """
    if not (_is_graph(model) and model.compiled and model.trainable_variables):
        return None
    tried = _some_images(model) if images is None else np.array(images[:_TRIED_IMAGES])
    for prefix, rest in _splits(model):
        if _is_worth_it(model, prefix) and _is_sound(model, prefix, rest, tried):
            config = model._compile_config.config  # as given: get_compile_config holds copies
            rest.compile(**(config | {"optimizer": model.optimizer, "auto_scale_loss": False}))
            return Cut(prefix, rest)
    return None


class Difference(NamedTuple):
    """Between two answers to the same images."""

    logits: float  # the largest
    agreeing: float  # fraction of the images that get the same class

    @property
    def is_small(self) -> bool:
        return self.logits < LOGITS_DIFFER and self.agreeing >= CLASSES_AGREE

    def __str__(self) -> str:
        return f"logits differ by {self.logits:.2g}, {self.agreeing:.2%} of the classes agree"


def difference(outputs: np.ndarray, others: np.ndarray) -> Difference:
    """Between outputs, (n, classes) or (n, 1): probabilities or logits."""
    a, b = _logits(outputs), _logits(others)
    return Difference(float(np.abs(a - b).max()), float(np.mean(_classes(a) == _classes(b))))


def predicted(
    model: keras.Model, inputs: np.ndarray, positions: np.ndarray | None = None
) -> np.ndarray:
    """A model's outputs for images or activations, which may be mapped; for some of them, where
    positions are given."""
    return np.concatenate([model.predict_on_batch(x) for x in _batches(inputs, positions)])


def fits_float16(rest: keras.Model, activations: np.ndarray) -> bool:
    """Whether the rest answers the same to activations in float16: logits, and nearly all classes.

    A rest that is not trained yet answers much the same to all images, and so to all errors: its
    logits' difference counts as many times as they will lie further apart.

    Args:
        activations: (n, ...) float32.
    """
    exact, rounded = [], []
    for batch in _batches(activations):
        half = as_float16(batch)
        if half is None:
            return False
        exact.append(rest.predict_on_batch(batch))
        rounded.append(rest.predict_on_batch(half.astype(np.float32)))
    outputs = np.concatenate(exact)
    found = difference(outputs, np.concatenate(rounded))
    grown = found.logits * max(1.0, _TRAINED / max(_spread(_logits(outputs)), 1e-9))
    return found._replace(logits=grown).is_small


def as_float16(activations: np.ndarray) -> np.ndarray | None:
    """In float16, or None where a number is too large for it (65 504)."""
    is_larger = np.abs(activations).max() > np.finfo(np.float16).max
    return None if is_larger else activations.astype(np.float16)


def describe(model: keras.Model) -> list[Any]:
    """What a model computes, but for its weights and for names: Keras numbers those as it goes."""
    places = {id(model.inputs[0]): "input"}  # of tensors

    def place(value: Any) -> str:
        return places.get(id(value), repr(value))

    described = []
    for at, call in enumerate(calls(model)):
        places |= {id(tensor): f"{at}.{index}" for index, tensor in enumerate(call.outputs)}
        operation = call.operation
        given = keras.tree.map_structure(place, arguments(call))
        config = {name: v for name, v in operation.get_config().items() if name != "name"}
        about = describe(operation) if _is_graph(operation) else config
        described.append([type(operation).__module__, type(operation).__name__, about, given])
    return described


def largest(model: keras.Model) -> int:
    """Numbers in the largest tensor that a model makes of an image; open sizes count as 32."""
    sizes = [math.prod(size or 32 for size in model.inputs[0].shape[1:])]
    for call in calls(model):
        sizes += [math.prod(size or 32 for size in t.shape[1:]) for t in call.outputs]
        if _is_graph(call.operation):
            sizes.append(largest(call.operation))
    return max(sizes)


def _is_worth_it(model: keras.Model, prefix: keras.Model) -> bool:
    """Whether its activations spare more than reading and storing them costs: scaling does not."""
    return bool(prefix.weights) and flops(prefix) >= _WORTH * flops(model)


def _logits(outputs: np.ndarray) -> np.ndarray:
    """Of probabilities, their logarithms: logits but for a constant in each row."""
    outputs = outputs.astype(np.float64).reshape(len(outputs), -1)
    if not (outputs.min() >= 0 and outputs.max() <= 1):
        return outputs
    if outputs.shape[1] > 1 and np.allclose(outputs.sum(axis=1), 1, atol=2e-2):  # as bfloat16 adds
        return np.log(outputs.clip(1e-30))
    p = outputs.clip(1e-7, 1 - 1e-7)
    return np.log(p / (1 - p))


def _batches(inputs: np.ndarray, positions: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """In memory; what is in float16, as float32: another dtype would be traced anew."""
    positions = np.arange(len(inputs)) if positions is None else positions
    for start in range(0, len(positions), _BATCH):
        batch = inputs[positions[start : start + _BATCH]]
        yield batch.astype(np.float32) if batch.dtype == np.float16 else batch


def _spread(logits: np.ndarray) -> float:
    """How far the logits of an image lie apart, on average; a single one: from even odds."""
    apart = np.ptp(logits, axis=1) if logits.shape[1] > 1 else np.abs(logits)
    return float(apart.mean())


def _classes(logits: np.ndarray) -> np.ndarray:
    return logits.argmax(axis=1) if logits.shape[1] > 1 else logits[:, 0] > 0


def _splits(model: keras.Model) -> Iterator[tuple[keras.Model, keras.Model]]:
    """Prefix and rest at every tensor that alone crosses, the deepest first."""
    nodes = calls(model)
    last_read = {id(tensor): at for at, node in enumerate(nodes) for tensor in tensors(node)}
    last_read[id(model.outputs[0])] = len(nodes)
    alive = [model.inputs[0]]
    crossing = [(alive[0], nodes)]  # with the calls that come after
    for at, node in enumerate(nodes):
        if not _is_constant(node.operation):
            if len(alive) == 1 and last_read[id(alive[0])] == at and _reads_only(node, alive[0]):
                yield from _splits_inside(model, alive[0], nodes[at:])
            break
        alive = [t for t in (*alive, *node.outputs) if last_read.get(id(t), -1) > at]
        if len(alive) == 1:
            crossing.append((alive[0], nodes[at + 1 :]))
    for tensor, following in reversed(crossing[1:]):
        start = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype)
        yield keras.Model(model.inputs[0], tensor), _again(model, following, tensor, start, start)


def _splits_inside(
    model: keras.Model, tensor: Any, nodes: list[Any]
) -> Iterator[tuple[keras.Model, keras.Model]]:
    """Those in a model that is the next layer of this one."""
    for inner_prefix, inner_rest in _splits(nodes[0].operation):
        crossing = inner_rest.inputs[0]
        start = keras.Input(batch_shape=crossing.shape, dtype=crossing.dtype)
        rest = _again(model, nodes[1:], nodes[0].outputs[0], inner_rest(start), start)
        yield keras.Model(model.inputs[0], inner_prefix(tensor)), rest


def _again(
    model: keras.Model, nodes: list[Any], tensor: Any, value: Any, start: Any
) -> keras.Model:
    """A model of the same calls with another value for a tensor.

    On CPUs, some convolutions are computed in another way.
    """
    values = {id(tensor): value}
    quick = functools.cache(quick_layers.quick)  # a layer may be called twice

    def current(given: Any) -> Any:
        return values.get(id(given), given)

    for node in nodes:
        args, kwargs = keras.tree.map_structure(current, arguments(node))
        outputs = quick(node.operation)(*args, **kwargs)
        values |= zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True)
    return keras.Model(start, values[id(model.outputs[0])])


def _is_constant(operation: Any) -> bool:
    """Whether it gives the same for the same image in training, as far as that shows."""
    if not isinstance(operation, keras.Layer):
        return True  # an operation such as x / 255
    if operation.trainable_variables or len(operation.variables) > len(operation.weights):
        return False  # what is no weight is the state of a random generator, or of a metric
    return not any(_moves(layer) for layer in operation._flatten_layers())


def _moves(layer: keras.Layer) -> bool:
    """As batch normalization without scale and centre: it has nothing to train, but statistics."""
    has_training = "training" in inspect.signature(layer.call).parameters
    return layer.trainable and has_training and bool(layer._non_trainable_variables)


def _is_graph(model: Any) -> bool:
    """Whether Keras itself leads one input through the model's layers to one output."""
    own = isinstance(model, keras.Model) and type(model).__module__.startswith("keras.")
    return own and model.built and len(model.inputs or ()) == 1 == len(model.outputs or ())


def _reads_only(call: Any, tensor: Any) -> bool:
    """Whether it calls a model with one tensor, and with nothing but `training` beside it."""
    args, kwargs = arguments(call)
    given = {name for name, value in kwargs.items() if value is not None}
    return (
        _is_graph(call.operation)
        and len(args) == 1
        and args[0] is tensor
        and (given <= {"training"})
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
    adds_losses = bool(prefix.losses)
    if not all(map(np.array_equal, before, prefix.get_weights())):
        prefix.set_weights(before)
        return False
    if adds_losses or not _are_close(still, moving):
        return False
    return _are_close(model(images, training=False), rest(still, training=False))


def _are_close(some: Any, others: Any) -> bool:
    tolerance = 1e-4 if str(some.dtype) == "float32" else 1e-2  # of the largest
    a, b = (keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")) for x in (some, others))
    return np.allclose(a, b, rtol=0, atol=tolerance * np.abs(a).max())
