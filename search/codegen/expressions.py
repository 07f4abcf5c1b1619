"""Keras objects as the Python expressions that make them.

    expression(keras.saving.serialize_keras_object(layer))  # 'layers.Conv2D(32, 3, padding="same")'

Only what differs from the defaults is written. Nothing is taken on trust: an expression is
evaluated, and what it makes is compared with what it was written for.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import keras
import numpy as np

from search.codegen.layout import quoted

NAMESPACE = {"keras": keras, "layers": keras.layers, "np": np}  # what expressions refer to
# First arguments that need no name although they have a default.
_BARE = [
    "cropping",
    "factor",
    "l2",
    "learning_rate",
    "mode",
    "padding",
    "pool_size",
    "size",
    "value",
]
_ALWAYS = ("learning_rate",)  # said even where it is the default: a reader looks for it
# What a config holds beside what its object is.
INCIDENTAL = ("name", "build_config", "compile_config", "registered_name", "shared_object_id")
_LONG_FLOAT = 8  # characters; a longer one may be a fraction, as 1 / 255


def expression(value: Any) -> str:
    """A value of a Keras config, or a serialized Keras object, as Python.

    Raises:
        ValueError: if it can't be written; the message says why.
    """
    return list(_candidates(value))[-1]


def plain(value: Any) -> Any:
    """A config, such that two are equal if they make the same object but for its name."""
    if isinstance(value, dict):
        if str(value.get("class_name")).endswith("DTypePolicy"):
            return value["config"]["name"]
        return {key: plain(item) for key, item in value.items() if key not in INCIDENTAL}
    if isinstance(value, list | tuple):
        if len(value) == 1 and isinstance(value[0], int):  # an axis: Keras makes it a list, or not
            return value[0]
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def own_name(name: str, class_name: str) -> str | None:
    """The name, unless Keras made it up, as conv2d_3 for a Conv2D."""
    return None if re.fullmatch(rf"{snake_case(class_name)}(_\d+)?", name) else name


def snake_case(class_name: str) -> str:
    """As Keras does it for the names of layers."""
    words = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", class_name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", words).lower()


def call_text(callee: str, parameters: list[str], given: dict[str, str]) -> str:
    """A call; the leading ones of the given arguments are written without their names.

    Args:
        parameters: names of those that may go without.
        given: text by name, in the order of the signature.
    """
    written: list[str] = []
    for name, text in given.items():
        positional = len(written) < len(parameters) and parameters[len(written)] == name
        written.append(text if positional else f"{name}={text}")
    return f"{callee}({', '.join(written)})"


def sequence(value: list[Any] | tuple[Any, ...], written: Callable[[Any], str]) -> str:
    """A list or a tuple, its items as `written` has them."""
    items = ", ".join(map(written, value))
    if isinstance(value, list):
        return f"[{items}]"
    return f"({items},)" if len(value) == 1 else f"({items})"


def is_keras(made: Any) -> bool:
    """Whether a class or a function is Keras's own."""
    return str(made.__module__).startswith("keras.")


def refused(what: str, error: Exception) -> ValueError:
    return ValueError(f"{what} can't be written as code: {error}")


def _candidates(value: Any) -> Iterator[str]:
    """Texts for a value: those that are shorter, and may or may not do, then the exact one."""
    if isinstance(value, dict) and "class_name" in value and "config" in value:
        yield from _objects(value)
    elif isinstance(value, dict):
        items = (f"{expression(key)}: {expression(item)}" for key, item in value.items())
        yield "{" + ", ".join(items) + "}"
    elif isinstance(value, list | tuple):
        numbers = list(_flat(value))
        if all(type(number) is int for number in numbers) and len(set(numbers)) == 1:
            yield expression(numbers[0])  # (3, 3): often 3 will do
        elif len(value) == 2 and isinstance(value[1], float) and value[0] == -value[1]:
            yield expression(value[1])  # (-0.1, 0.1)
        yield sequence(value, expression)
    elif isinstance(value, str):
        yield quoted(value)
    elif isinstance(value, float):
        yield from _floats(value)
    elif value is None or isinstance(value, bool | int):
        yield repr(value)
    else:
        raise ValueError(f"it holds {value!r}, of type {type(value).__name__}")


def _objects(value: dict[str, Any]) -> Iterator[str]:
    if isinstance(policy := plain(value), str):
        yield quoted(policy)
    elif value["class_name"] == "function":
        yield _function(value["config"])
    else:
        text = _object(value)
        if value["module"] == "keras.initializers" and text.endswith("()"):
            yield quoted(snake_case(value["class_name"]))
        yield text


def _function(name: str) -> str:
    for module in ("losses", "metrics", "activations"):
        if inspect.isfunction(getattr(getattr(keras, module), name, None)):
            return f"keras.{module}.{name}"
    raise ValueError(f"the function {name!r} is not one of Keras's own")


def _flat(value: Any) -> Iterator[Any]:
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _floats(value: float) -> Iterator[str]:
    if not np.isfinite(value):
        yield f'float("{value}")'
        return
    yield repr(float(str(np.float32(value))))  # 0.001 for 0.0010000000474974513, a variable's
    if len(repr(value)) <= _LONG_FLOAT:
        yield repr(value)
        return
    inverse = round(1 / value, 3)
    fraction = Fraction(value).limit_denominator(1_000)
    if inverse < 1_000 and 1 / (inverse or 1) == value:
        yield f"1 / {inverse:g}"
    elif float(fraction) == value:
        yield f"{fraction.numerator} / {fraction.denominator}"
    else:
        yield repr(value)


def _object(serialized: dict[str, Any]) -> str:
    """The call that makes the object, with as few and as short arguments as make the same."""
    callee, make = _class(serialized)
    config = serialized["config"]
    signature = inspect.signature(make.__init__).parameters  # type: ignore[misc]
    names = [name for name in signature if name in config and name != "name"]
    names += [name for name in config if name not in signature and name != "name"]
    required = [name for name in names if _is_required(signature.get(name))]
    bare = required or [name for name in list(signature)[1:2] if name in _BARE]
    if serialized["module"].endswith("schedules"):
        bare = []  # numbers that say little without their names

    def text(given: dict[str, str]) -> str:
        ordered = {name: given[name] for name in [*names, "name"] if name in given}
        return call_text(callee, bare, ordered)

    given = {name: expression(config[name]) for name in required}
    made = _made(text(given))
    for name in names:
        if name not in required and name not in _ALWAYS and _agree(made, config, name):
            continue
        for candidate in _candidates(config[name]):
            given[name] = candidate
            # The last one stays, whatever it does: some arguments work only together.
            with contextlib.suppress(ValueError):
                made = _made(text(given))
                if _agree(made, config, name):
                    break
    made = _made(text(given))
    if wrong := [name for name in names if not _agree(made, config, name)]:
        raise ValueError(f"{text(given)} has another {', '.join(wrong)}")
    own = own_name(config.get("name") or "", serialized["class_name"])
    if own and own != made.get("name"):
        given["name"] = quoted(own)
    return text(given)


def _class(serialized: dict[str, Any]) -> tuple[str, type]:
    class_name, module = serialized["class_name"], serialized.get("module") or ""
    if class_name in ("Lambda", "__lambda__"):
        raise ValueError("its function is Python code of the space's own")
    public: Any = keras
    for part in module.split(".")[1:]:
        public = getattr(public, part, None)
    found = getattr(public, class_name, None)
    if serialized.get("registered_name") or not re.match(r"keras(\.|$)", module) or not found:
        raise ValueError(f"{class_name} is not one of Keras's own classes")
    return f"{re.sub('^keras.layers', 'layers', module)}.{class_name}", found


def _is_required(parameter: inspect.Parameter | None) -> bool:
    return (
        parameter is not None
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )


def _made(text: str) -> dict[str, Any]:
    try:
        return keras.saving.serialize_keras_object(eval(text, dict(NAMESPACE)))["config"]
    except Exception as error:  # whatever a class of Keras says of arguments
        raise ValueError(f"{text} fails: {error}") from error


def _agree(made: dict[str, Any], config: dict[str, Any], name: str) -> bool:
    missing = object()
    return plain(made.get(name, missing)) == plain(config.get(name, missing))
