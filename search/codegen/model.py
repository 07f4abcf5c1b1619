"""A Keras model as the functions that build and compile it.

    network = functions(model)
    network.code  # "def build(): ..." and "def compile_model(model): ..."

What was written is run, and what it makes is compared with the model.
"""

from __future__ import annotations

import builtins
import inspect
import keyword
import re
from typing import Any, NamedTuple

import keras
import numpy as np

from search.codegen.calls import body, identifier, unused
from search.codegen.expressions import (
    INCIDENTAL,
    NAMESPACE,
    call_text,
    expression,
    is_keras,
    own_name,
    plain,
    refused,
)
from search.codegen.layout import wrapped


class Network(NamedTuple):
    """A model as code."""

    # The functions `build()`, which makes the same model anew, and `compile_model(model)`; before
    # them one for each model that is used as a layer.
    code: str
    has_weights: bool  # the model has weights that its layers did not draw, such as pretrained ones


def functions(model: keras.Model) -> Network:
    """A model, compiled and not trained yet, as code.

    Raises:
        ValueError: if something can't be written as code; the message names it and says why.
    """
    if not model.compiled:
        raise ValueError(f"Model {model.name!r} can't be written as code: it is not compiled")
    parts = _Parts()
    built = parts.function("build", model)
    config = model.get_compile_config()
    for with_jit_compile in (False, True):  # which Keras otherwise decides by the model
        compiled = _compile_function(model, config, with_jit_compile=with_jit_compile)
        text = "\n\n\n".join([*parts.functions, built, compiled])
        made = _run(text)
        if plain(made.get_compile_config()) == plain(config):
            break
    else:
        raise ValueError("The model's compile() can't be written as code: it comes out different")
    if _outline(made.get_config()) != _outline(model.get_config()):
        raise ValueError("The model can't be written as code: its graph comes out different")
    return Network(text, _has_weights(model, made))


class _Parts:
    """The functions written so far, and which layer is made in which."""

    def __init__(self) -> None:
        self.functions: list[str] = []
        self.names = {*NAMESPACE, *keyword.kwlist, *dir(builtins), "x", "build", "compile_model"}
        self._made_in: dict[int, str] = {}

    def function(self, name: str, model: keras.Model) -> str:
        if type(model).__name__ not in ("Functional", "Sequential") or not is_keras(type(model)):
            raise ValueError(
                f"Model {model.name!r} can't be written as code: {type(model).__name__} is not "
                "keras.Sequential, or keras.Model of inputs and outputs"
            )
        if not model.built:
            raise ValueError(f"Model {model.name!r} can't be written as code: it is not built")
        for layer in model.layers:
            if self._made_in.setdefault(id(layer), name) != name:
                raise ValueError(
                    f"Layer {layer.name!r} can't be written as code: two models share it"
                )
        lines = body(model, self.layer, self.names)
        return "\n".join(
            [f"def {name}():", *(wrapped(f"    {line}") if line else "" for line in lines)]
        )

    def layer(self, layer: Any) -> str:
        """The expression that makes a layer."""
        if isinstance(layer, keras.Model):
            own = own_name(layer.name, type(layer).__name__)
            name = unused(f"build_{identifier(own or 'part')}", self.names)
            self.names.add(name)
            self.functions.append(self.function(name, layer))
            return f"{name}()"
        try:
            for value in (each for part in layer._flatten_layers() for each in vars(part).values()):
                # Of a function, a config has the name only, which Keras's own may have too.
                if inspect.isfunction(value) and not is_keras(value):
                    raise ValueError(f"{value.__name__} is a function of the space's own")
            return expression(keras.saving.serialize_keras_object(layer))
        except (ValueError, NotImplementedError) as error:
            raise refused(f"Layer {layer.name!r} ({type(layer).__name__})", error) from error


def _compile_function(model: keras.Model, config: dict[str, Any], *, with_jit_compile: bool) -> str:
    for loss in keras.tree.flatten(model.loss):
        if inspect.isfunction(loss) and not is_keras(loss):
            raise ValueError(
                f"The loss {loss.__name__!r} can't be written as code: it is a function of the "
                "space's own"
            )
    lines = []
    given = {}
    defaults = inspect.signature(keras.Model.compile).parameters
    for key, value in config.items():
        if value == defaults[key].default or (key == "jit_compile" and not with_jit_compile):
            continue
        try:
            given[key] = expression(value)
        except ValueError as error:
            raise refused(f"The model's {key}", error) from error
    rate = config["optimizer"]["config"].get("learning_rate")
    if isinstance(rate, dict):
        lines.append("# A step is a batch.")
        lines.append(f"learning_rate = {expression(rate)}")
        given["optimizer"] = given["optimizer"].replace(expression(rate), "learning_rate", 1)
    if not_decayed := _not_decayed(model.optimizer):
        lines.append(f"optimizer = {given['optimizer']}")
        lines.append(f"optimizer.exclude_from_weight_decay(var_names={not_decayed})")
        given["optimizer"] = "optimizer"
    lines.append(call_text("model.compile", ["optimizer"], given))
    return "\n".join(["def compile_model(model):", *(wrapped(f"    {line}") for line in lines)])


def _not_decayed(optimizer: Any) -> str | None:
    if getattr(optimizer, "_exclude_from_weight_decay", None):
        raise ValueError(
            "The optimizer can't be written as code: exclude_from_weight_decay was called with "
            "var_list; var_names can be written"
        )
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if pattern is None:
        return None
    # Keras joins the names in any order. Parts of a regular expression stay together.
    names = pattern.pattern.split("|")
    if not all(re.fullmatch(r"[\w/-]+", name) for name in names):
        names = [pattern.pattern]
    return expression(sorted(names))


def _run(text: str) -> keras.Model:
    namespace = dict(NAMESPACE)
    try:
        exec(text, namespace)
        model = namespace["build"]()
        namespace["compile_model"](model)
    except Exception as error:  # whatever Keras says
        raise refused("The model", error) from error
    return model


def _has_weights(model: keras.Model, made: keras.Model) -> bool:
    """Told by those that are one number everywhere when they are made, as biases."""
    pairs = zip(model.weights, made.weights, strict=True)
    return any(
        np.ptp(fresh) == 0 and not np.array_equal(weights, fresh)
        for weights, fresh in (map(keras.ops.convert_to_numpy, pair) for pair in pairs)
        if fresh.size
    )


def _outline(config: Any) -> Any:
    """A model's config with its layers numbered instead of named."""
    if isinstance(config, list | tuple):
        return [_outline(item) for item in config]
    if not isinstance(config, dict) or isinstance(plain(config), str):
        return plain(config)
    if "input_layers" in config:
        numbers = {layer["name"]: number for number, layer in enumerate(config["layers"])}
        for key in ("input_layers", "output_layers"):
            config = {**config, key: _numbered(config[key], numbers)}
        calls = [_numbered(layer["inbound_nodes"], numbers) for layer in config["layers"]]
        config = {**config, "calls": calls}
    skipped = (*INCIDENTAL, "inbound_nodes")
    return {key: _outline(item) for key, item in config.items() if key not in skipped}


def _numbered(value: Any, numbers: dict[str, int]) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(item, numbers) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    if len(value) == 3 and isinstance(value[0], str) and value[0] in numbers:
        return [numbers[value[0]], *value[1:]]  # a tensor: of which layer, call, output
    return [_numbered(item, numbers) for item in value]
