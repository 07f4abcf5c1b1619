"""The body of the function that builds a Keras model: a line for each call of a layer.

    lines = list(body(model, write_layer, taken={"keras", "layers"}))  # "inputs = keras.Input(...)"

In the order in which the calls were made, so that weights drawn after the same seed are the same.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import keras
import numpy as np

from search.codegen.expressions import (
    call_text,
    expression,
    is_keras,
    own_name,
    refused,
    sequence,
    snake_case,
)
from search.codegen.layout import quoted
from search.training.model_graph import age, arguments, calls, tensors

_MAX_CONSTANT = 64  # numbers of an array that is written out
_FOREVER = 1 << 30  # the number of a call that never comes

WriteLayer = Callable[[Any], str]  # a layer -> the expression that makes it


def body(model: keras.Model, write_layer: WriteLayer, taken: Collection[str]) -> Iterator[str]:
    """Statements that end in `return keras.Model(...)`, and empty lines between paragraphs.

    Args:
        model: functional or sequential, and built.
        taken: names that variables can't have.

    Raises:
        ValueError: if an operation can't be written as code; the message names it and says why.
    """
    yield _docstring(model)
    if not isinstance(model, keras.Sequential):
        yield from _Graph(model, write_layer, set(taken)).lines()
        return
    layers = ", ".join([_input(model.inputs[0]), *map(write_layer, model.layers)])
    yield f"return {_model_call('keras.Sequential', [f'[{layers}]'], model)}"


class _Graph:
    """The body of the function that builds a functional model."""

    def __init__(self, model: keras.Model, write_layer: WriteLayer, taken: set[str]):
        self._model = model
        self._write_layer = write_layer
        self._taken = taken | {"x", "_"}
        self._nodes = calls(model)
        self._names: dict[int, str] = {}  # of tensors, by id
        self._last_use: dict[str, int] = {}  # of variables: the number of the call
        self._layers: dict[int, str] = {}  # variables of layers, by id
        self._readers: dict[int, list[int]] = {}  # of tensors: the numbers of calls
        for number, node in enumerate(self._nodes):
            for tensor in tensors(node):
                self._readers.setdefault(id(tensor), []).append(number)
        for tensor in model.outputs:
            self._readers.setdefault(id(tensor), []).append(_FOREVER)

    def lines(self) -> Iterator[str]:
        for tensor in self._model.inputs:
            own = own_name(tensor._keras_history.operation.name, "InputLayer")
            base = "inputs" if len(self._model.inputs) == 1 else own or "inputs"
            name = self._names[id(tensor)] = self._variable(base, -1, _FOREVER)
            yield f"{name} = {_input(tensor)}"
        made_before, said = self._made_before(), False
        for number, node in enumerate(self._nodes):
            for layer in made_before.get(number, ()):
                text = self._write_layer(layer)
                own = own_name(layer.name, type(layer).__name__) or snake_case(type(layer).__name__)
                base = text[len("build_") : -2] if isinstance(layer, keras.Model) else own
                name = self._layers[id(layer)] = self._variable(base, number, _FOREVER)
                yield f"{name} = {text}"
            if self._begins_paragraph(number):
                yield ""
            call = self._call(node)
            if call.endswith(", training=False)") and not said:
                said = True
                yield "# training=False is for calls such as model(x): fit() overrules it."
            names = [self._name(tensor, number, node) for tensor in node.outputs]
            yield f"{', '.join(names)} = {call}{_shape_comment(node)}"
        ends = [self._value(self._model.input), self._value(self._model.output)]
        yield f"return {_model_call('keras.Model', ends, self._model)}"

    def _begins_paragraph(self, number: int) -> bool:
        """For the eye: before a convolution that follows pooling, dropout or a fork, and before
        maps become vectors."""
        if number == 0:
            return False
        node, before = self._nodes[number], self._nodes[number - 1]
        if len(node.outputs[0].shape) != len(before.outputs[0].shape):
            return True
        has_maps = len(node.outputs[0].shape) > 3 and hasattr(node.operation, "kernel")
        forks = any(len(self._readers.get(id(tensor), ())) > 1 for tensor in before.outputs)
        plain_before = not (
            isinstance(before.operation, keras.layers.Activation | keras.layers.BatchNormalization)
            or hasattr(before.operation, "kernel")
        )
        return has_maps and (forks or plain_before)

    def _made_before(self) -> dict[int, list[Any]]:
        """Layers that need a variable, by the number of the call before which they are made."""
        uses: dict[int, list[int]] = {}
        for number, node in enumerate(self._nodes):
            uses.setdefault(id(node.operation), []).append(number)
        made: dict[int, list[Any]] = {}
        for first, *others in uses.values():
            layer = self._nodes[first].operation
            if isinstance(layer, keras.Model):
                began = min((age(node) for node in calls(layer)), default=0)
                later = (at for at, node in enumerate(self._nodes) if age(node) > began)
                made.setdefault(min(first, next(later, first)), []).append(layer)
            elif others and isinstance(layer, keras.Layer):
                made.setdefault(first, []).append(layer)
        return made

    def _name(self, tensor: Any, number: int, node: Any) -> str:
        """The variable of a tensor: x if the next call is all that reads it."""
        readers = self._readers.get(id(tensor), [])
        if set(readers) == {number + 1} and len(node.outputs) == 1:
            base = "x"
        elif not readers:
            base = "_"
        else:
            base = self._base_name(readers, node)
        name = base if base in ("x", "_") else self._variable(base, number, max(readers))
        self._names[id(tensor)] = name
        return name

    def _base_name(self, readers: list[int], node: Any) -> str:
        operation = node.operation
        if _FOREVER in readers and len(self._model.outputs) == 1:
            return "outputs"
        if own := own_name(operation.name, type(operation).__name__):
            return own
        if _FOREVER in readers:
            return "output"
        if len(node.outputs) > 1:
            return snake_case(type(operation).__name__)
        if len(readers) > 1:
            return "block"
        added = type(self._nodes[readers[0]].operation).__name__ == "Add"
        return "shortcut" if added else "branch"

    def _variable(self, base: str, number: int, last_use: int) -> str:
        """A name that holds nothing which the call of that number, or a later one, reads."""
        held = {name for name, last in self._last_use.items() if last > number}
        name = unused(identifier(base), self._taken | held)
        self._last_use[name] = last_use
        return name

    def _call(self, node: Any) -> str:
        operation = node.operation
        values, kwargs = arguments(node)
        name = type(operation).__name__
        if name == "GetItem":
            return f"{self._value(values[0])}[{_index(values[1])}]"
        args = [self._value(value) for value in values]
        if isinstance(operation, keras.Layer):
            defaults = inspect.signature(operation.call).parameters
            given = [
                f"{name}={self._value(value)}"
                for name, value in kwargs.items()
                if name not in defaults or value is not defaults[name].default
            ]
            layer = self._layers.get(id(operation)) or self._write_layer(operation)
            return f"{layer}({', '.join([*args, *given])})"
        try:
            return _operation(operation, args, {k: self._value(v) for k, v in kwargs.items()})
        except (ValueError, NotImplementedError) as error:
            raise refused(f"Operation {operation.name!r} ({name})", error) from error

    def _value(self, value: Any) -> str:
        if isinstance(value, keras.KerasTensor):
            return self._names[id(value)]
        if isinstance(value, list | tuple):
            return sequence(value, self._value)
        if isinstance(value, dict):
            items = (f"{self._value(key)}: {self._value(item)}" for key, item in value.items())
            return "{" + ", ".join(items) + "}"
        if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
            return _constant(keras.ops.convert_to_numpy(value))
        return expression(keras.saving.serialize_keras_object(value))


def _operation(operation: Any, args: list[str], kwargs: dict[str, str]) -> str:
    """A call of keras.ops: what the operation was made with becomes arguments like the others."""
    name = snake_case(type(operation).__name__)
    spaces = {"keras.ops": keras.ops, "keras.ops.image": keras.ops.image}
    spaces["keras.ops.linalg"] = keras.ops.linalg
    space = next((key for key, value in spaces.items() if hasattr(value, name)), None)
    if space is None or not is_keras(type(operation)):
        raise ValueError("it is not in keras.ops")
    parameters = inspect.signature(getattr(spaces[space], name)).parameters
    for key, value in operation.get_config().items():
        if key == "name" or (key in parameters and value == parameters[key].default):
            continue
        if key not in parameters:
            raise ValueError(f"keras.ops.{name} takes no {key}")
        kwargs[key] = expression(keras.saving.serialize_keras_object(value))
    given = [*args, *(f"{key}={text}" for key, text in kwargs.items())]
    return f"{space}.{name}({', '.join(given)})"


def _index(key: Any) -> str:
    if isinstance(key, tuple):
        return ", ".join(_index(part) for part in key)
    if isinstance(key, slice):
        ends = [key.start, key.stop] + ([] if key.step is None else [key.step])
        return ":".join("" if end is None else str(end) for end in ends)
    if key is Ellipsis:
        return "..."
    if key is None or isinstance(key, int):
        return repr(key)
    raise ValueError(f"An index can't be written as code. Received: {key!r}")


def _constant(array: np.ndarray) -> str:
    if array.size > _MAX_CONSTANT:
        raise ValueError(
            f"The model can't be written as code: it holds a constant of shape {array.shape}"
        )
    return f"np.array({array.tolist()!r}, dtype={quoted(str(array.dtype))})"


def _input(tensor: Any) -> str:
    layer = tensor._keras_history.operation
    config = layer.get_config()
    batch_size, *shape = config["batch_shape"]
    given = {"shape": f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"}
    if batch_size is not None:
        given["batch_size"] = str(batch_size)
    if config["dtype"] != keras.Input(shape).dtype:
        given["dtype"] = quoted(config["dtype"])
    given |= {key: "True" for key in ("sparse", "ragged", "optional") if config.get(key)}
    if own := own_name(layer.name, "InputLayer"):
        given["name"] = quoted(own)
    return call_text("keras.Input", ["shape"], given)


def _model_call(callee: str, ends: list[str], model: keras.Model) -> str:
    given = list(ends)
    if not model.trainable:
        given.append("trainable=False")
    if own := own_name(model.name, type(model).__name__):
        given.append(f"name={quoted(own)}")
    return f"{callee}({', '.join(given)})"


def _shape_comment(node: Any) -> str:
    """Of a map that a call makes of another size."""
    if not tensors(node) or len(node.outputs) != 1:
        return ""
    before, after = tensors(node)[0].shape, node.outputs[0].shape
    if len(before) == len(after) and before[1:-1] == after[1:-1]:
        return ""
    return f"  # {_shape(after)}"


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"(n, {', '.join(map(str, shape[1:]))})" if len(shape) > 1 else "(n,)"


def _docstring(model: keras.Model) -> str:
    sides = [
        ", ".join(f"{_shape(tensor.shape)} {tensor.dtype}" for tensor in side)
        for side in (model.inputs, model.outputs)
    ]
    return f'"""{" -> ".join(sides)}."""'


def identifier(name: str) -> str:
    cleaned = re.sub(r"\W+", "_", name.lower()).strip("_")
    return f"_{cleaned}" if cleaned[:1].isdigit() else cleaned or "part"


def unused(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found
