"""A functional model's graph: its calls in the order in which they were made.

    for call in calls(model):
        call.operation, arguments(call), call.outputs

A call is a Keras `Node` (keras/src/ops/node.py): an operation, often a layer, with the arguments
and the outputs of one call of it.
"""

from __future__ import annotations

import heapq
import re
from typing import Any

import keras


def calls(model: keras.Model) -> list[Any]:
    """The calls that lead from a model's inputs to its outputs, the oldest first where their order
    is free."""
    if isinstance(model, keras.Sequential):
        model = model._functional
    ends = {id(tensor) for tensor in model.inputs}
    found: dict[int, Any] = {}
    waiting = list(model.outputs)
    while waiting:
        tensor = waiting.pop()
        operation, index, _ = tensor._keras_history
        if id(tensor) in ends or id(node := operation._inbound_nodes[index]) in found:
            continue
        found[id(node)] = node
        waiting += tensors(node)
    needed: dict[int, set[int]] = {key: set() for key in found}
    for key, node in found.items():
        for tensor in tensors(node):
            if id(tensor) not in ends:
                operation, index, _ = tensor._keras_history
                needed[key].add(id(operation._inbound_nodes[index]))
    readers: dict[int, list[int]] = {key: [] for key in found}
    for key, sources in needed.items():
        for source in sources:
            readers[source].append(key)
    rank = {key: (age(node), number, key) for number, (key, node) in enumerate(found.items())}
    ready = [rank[key] for key, sources in needed.items() if not sources]
    heapq.heapify(ready)
    ordered = []
    while ready:
        *_, key = heapq.heappop(ready)
        ordered.append(found[key])
        for reader in readers[key]:
            needed[reader].discard(key)
            if not needed[reader]:
                heapq.heappush(ready, rank[reader])
    return ordered


def age(node: Any) -> int:
    """When the call was made: Keras numbers its tensors, as keras_tensor_12."""
    number = re.search(r"\d+", node.outputs[0].name)
    return int(number[0]) if number else -1


def arguments(node: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of a call, without the masks that Keras hands from layer to layer itself."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    masks = {id(getattr(tensor, "_keras_mask", None)) for tensor in node.arguments.keras_tensors}
    given = {
        name: value
        for name, value in kwargs.items()
        if not name.endswith("mask") or any(id(mask) not in masks for mask in _flat(value))
    }
    return args, given


def tensors(node: Any) -> list[Any]:
    """That a call reads."""
    return [value for value in _flat(arguments(node)) if isinstance(value, keras.KerasTensor)]


def _flat(value: Any) -> list[Any]:
    return keras.tree.flatten(value)
