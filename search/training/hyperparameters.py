"""KerasTuner's `HyperParameters`, answered by an Optuna trial or by a stored point.

A `HyperModel` reads `hp.Int(...)` and so on as ever; `_register` is the one place where KerasTuner
decides a value, so it is the one method that is overridden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import keras_tuner
from keras_tuner.engine import hyperparameters as kt


class TrialHyperParameters(keras_tuner.HyperParameters):
    """Each new hyperparameter is suggested by `trial` (an Optuna trial or what looks like one)."""

    def __init__(self, trial: Any):
        super().__init__()
        self._trial = trial

    def _register(self, hyperparameter: Any, overwrite: bool = False) -> Any:
        name = hyperparameter.name
        if self.is_active(hyperparameter):
            kind, arguments = distribution(hyperparameter)
            if name in self.values:  # read before, of another range perhaps
                _check_value(hyperparameter, self.values[name])
            else:
                self.values[name] = getattr(self._trial, f"suggest_{kind}")(name, **arguments)
        return super()._register(hyperparameter, overwrite=False)


class ReplayedHyperParameters(keras_tuner.HyperParameters):
    """A stored point, exactly: what it lacks or has too much is an error, not a default.

    Args:
        params: value by name.
        complete: take the space's default where `params` has nothing, for known points, which
            say only what differs.
    """

    def __init__(self, params: Mapping[str, Any], *, complete: bool = False):
        super().__init__()
        self.values = dict(params)
        self._complete = complete

    def _register(self, hyperparameter: Any, overwrite: bool = False) -> Any:
        name = hyperparameter.name
        active = self.is_active(hyperparameter)
        if active and name not in self.values and not self._complete:
            raise ValueError(
                f"The space reads {name!r}, which the stored point lacks; it was searched with "
                f"another space. Received: {sorted(self.values)}"
            )
        if active and name in self.values:
            _check_value(hyperparameter, self.values[name])
        return super()._register(hyperparameter, overwrite=False)

    def check_all_read(self) -> None:
        """Raises ValueError if the point has a value that the space never asked for."""
        read = {hp.name for hp in self.space if self.is_active(hp)}
        if unknown := sorted(self.values.keys() - read):
            raise ValueError(
                f"The space never reads {', '.join(map(repr, unknown))} at this point. "
                f"It reads: {', '.join(sorted(read))}"
            )


def distribution(hyperparameter: Any) -> tuple[str, dict[str, Any]]:
    """What to call on an Optuna trial for a KerasTuner hyperparameter: suggest_<kind>(**arguments).

    Raises:
        ValueError: for what Optuna can't express; it says what to write instead.
    """
    hp = hyperparameter
    if isinstance(hp, kt.Choice):
        return "categorical", {"choices": list(hp.values)}
    if isinstance(hp, kt.Boolean):
        return "categorical", {"choices": [False, True]}
    if isinstance(hp, kt.Fixed):
        return "categorical", {"choices": [hp.value]}
    if not isinstance(hp, kt.Int | kt.Float):
        raise ValueError(f"Unknown kind of hyperparameter. Received: {hp!r}")
    if hp.sampling == "reverse_log" or (hp.sampling == "log" and hp.step not in (None, 1)):
        raise ValueError(
            f"Optuna can't sample {hp.name!r} (sampling={hp.sampling!r}, step={hp.step!r}). "
            f"Write sampling='log' without step, or hp.Choice({hp.name!r}, [...])"
        )
    log = hp.sampling == "log"
    if isinstance(hp, kt.Int):
        step = 1 if log else hp.step or 1
        high = hp.min_value + (hp.max_value - hp.min_value) // step * step
        return "int", {"low": hp.min_value, "high": high, "step": step, "log": log}
    if log or hp.step is None:
        return "float", {"low": hp.min_value, "high": hp.max_value, "step": None, "log": log}
    # Optuna wants a range that the step divides; the small term keeps 0.5 a multiple of 0.1.
    steps = math.floor((hp.max_value - hp.min_value) / hp.step + 1e-9)
    high = round(hp.min_value + steps * hp.step, 12)
    return "float", {"low": hp.min_value, "high": high, "step": hp.step, "log": False}


def describe(
    default: keras_tuner.HyperParameters, build: Callable[[keras_tuner.HyperParameters], Any]
) -> list[dict[str, Any]]:
    """The space: name, kind, range and conditions of each hyperparameter, ready for JSON.

    Args:
        default: what a build at the default point has read.
        build: makes a model of another one. It is called once for each conditional scope in which
            the default point has registered nothing.

    Raises:
        ValueError: for what Optuna can't express; it says what to write instead.
    """
    described: dict[tuple[str, str], dict[str, Any]] = {}
    fixed: dict[str, Any] = {}  # of each name, what Optuna has to be the same in all of a study
    for hp in (*default.space, *_other_branches(default, build)):
        kind, arguments = distribution(hp)
        now = arguments["choices"] if kind == "categorical" else [kind, arguments["log"]]
        if (before := fixed.setdefault(hp.name, now)) != now:
            raise ValueError(
                f"Optuna knows one list of choices, or one kind and scale, for a name: {hp.name!r} "
                f"is {before} in one branch and {now} in another. Give it a name of its own in each"
            )
        conditions = [condition.get_config() for condition in hp.conditions]
        range_ = {"name": hp.name, "kind": kind, **arguments, "when": conditions}
        described.setdefault((hp.name, str(conditions)), range_)
    return list(described.values())


def _other_branches(
    default: keras_tuner.HyperParameters, build: Callable[[keras_tuner.HyperParameters], Any]
) -> Iterator[Any]:
    """What is registered elsewhere only: a space may ask inside an `if` for what has a meaning in
    one branch, as KerasTuner's documentation does."""
    left = _elsewhere(default)
    entered: list[dict[str, Any]] = []
    while left:
        if (values := left.pop()) in entered:
            continue
        entered.append(values)
        point = keras_tuner.HyperParameters()
        point.values = dict(values)
        with suppress(Exception):  # a point that can't be built may still have registered some
            build(point)
        yield from point.space
        left += _elsewhere(point)


def _elsewhere(point: keras_tuner.HyperParameters) -> list[dict[str, Any]]:
    """What leads into the conditional scopes that the point has not entered, and in which nothing
    was registered: a value for each of their conditions."""
    filled = [hp.conditions for hp in point.space]
    choices = {hp.name: hp.values for hp in point.space if isinstance(hp, kt.Choice)}
    return [
        {
            of.name: next((v for v in of.values if v in choices.get(of.name, of.values)), None)
            for of in scope
        }
        for scope in point.inactive_scopes
        if scope not in filled
    ]


def _check_value(hyperparameter: Any, value: Any) -> None:
    kind, arguments = distribution(hyperparameter)
    if kind == "categorical":
        if value not in arguments["choices"]:
            raise ValueError(
                f"{hyperparameter.name!r} is one of {arguments['choices']}. Received: {value!r}"
            )
        return
    low, high, step = arguments["low"], arguments["high"], arguments["step"]
    numbers = int if kind == "int" else int | float
    fits = isinstance(value, numbers) and not isinstance(value, bool) and low <= value <= high
    if fits and step is not None:  # Optuna would take one between two steps, with a warning
        steps = (value - low) / step
        fits = abs(steps - round(steps)) < 1e-8
    if not fits:
        by = "" if step in (None, 1) else f" in steps of {step}"
        raise ValueError(
            f"{hyperparameter.name!r} lies between {low} and {high}{by}. Received: {value!r}"
        )
