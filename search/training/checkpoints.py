"""The state of a training on disk, so that a killed one goes on where it was.

    checkpoints = Checkpoints(path, identity={"params": params, "seed": 7})
    training.train(..., checkpoints=checkpoints)  # goes on after the last report that was kept

Kept after a report: weights, the optimizer's variables (its step and learning rate among them), the
states of random generators, and what the callbacks hold in plain values. `BackupAndRestore` of
Keras 3.15 keeps neither those callbacks' states nor the optimizer's, and writes in place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from search import artifacts
from search.errors import SearchError
from search.training import features

logger = logging.getLogger("search")

SHARE = 0.02  # of the time that may go into writing
_BYTES_PER_SECOND = 200e6  # written, on a slow disk
_META = "meta"
# Of a callback: Keras sets them anew. It turns the sign of min_delta where less is better.
_NOT_STATE = ("model", "_model", "params", "min_delta")
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


class Checkpoints(keras.callbacks.Callback):
    """Writes checkpoints of a training, and takes up the one that an earlier attempt has left.

    To be the last of the callbacks: the others begin afresh, then get what they had.

    Args:
        path: of the file, `.npz`; replaced atomically.
        identity: what must be equal for a checkpoint to be this training's, ready for JSON.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        super().__init__()
        self._path = path
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        self._others: Sequence[keras.callbacks.Callback] = ()
        self._is_whole = True  # whether what is kept is all that there is
        self._described = ""
        self._cost = 0.0  # seconds, of the last write
        self._saved = time.monotonic()
        self._found = self._read()

    @property
    def reports(self) -> int:
        """How many reports the checkpoint that was found lies behind; 0 for none."""
        return self._found["reports"] if self._found else 0

    def watch(self, model: keras.Model, callbacks: Iterable[keras.callbacks.Callback]) -> None:
        """Whose state is kept, the callbacks in an order that is the same in each attempt.

        What was found is left where it is another model's: the space's code has changed, or the
        frozen part is trained along this time for want of room.
        """
        self.set_model(model)
        self._others = tuple(callbacks)
        self._is_whole = _has_one_optimizer(model)
        if not self._is_whole:
            logger.warning("the model has optimizers of its own: once killed, it begins again")
            self._found = None
        self._described = _described(model)
        if self._found and not self._suits(self._found):
            logger.warning("%s is of another model or other callbacks: begun again", self._path)
            self._found = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._saved = time.monotonic()
        # A guess until one is written: weights and two moments, an average and the last step's.
        self._cost = 5 * 4 * self.model.count_params() / _BYTES_PER_SECOND
        if not self._found:
            return
        arrays = self._found["arrays"]
        for variable, value in zip(self._variables(), arrays["variables"], strict=True):
            variable.assign(value)
        for callback, state in zip(self._others, self._found["callbacks"], strict=True):
            for name in state:
                setattr(callback, name, _with_arrays(state[name], arrays["callbacks"]))
        self._found = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.model.stop_training or time.monotonic() - self._saved < self._cost / SHARE:
            return
        if not self._is_whole:
            return
        began = time.monotonic()
        try:
            self._write(epoch + 1)
        except SearchError as error:  # a full disk costs the checkpoint, not the training
            logger.warning("no checkpoint: %s", error)
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def _suits(self, found: dict[str, Any]) -> bool:
        if not self.model.optimizer.built:  # some make their variables once more
            self.model.optimizer.build(self.model.trainable_variables)
        shapes = [tuple(variable.shape) for variable in self._variables()]
        return (
            found.get("model") == self._described
            and len(found["callbacks"]) == len(self._others)
            and shapes == [array.shape for array in found["arrays"]["variables"]]
        )

    def _variables(self) -> list[Any]:
        # Not model.variables: it holds the metrics' as well, once there are some.
        generators = [
            generator.state
            for layer in self.model._flatten_layers()
            for generator in layer._seed_generators
        ]
        return [*self.model.weights, *generators, *self.model.optimizer.variables]

    def _write(self, reports: int) -> None:
        kept: list[np.ndarray] = []
        states = [
            {name: _without_arrays(value, kept) for name, value in _state(callback).items()}
            for callback in self._others
        ]
        meta = {"identity": self._identity, "reports": reports, "callbacks": states}
        meta["model"] = self._described
        arrays = {
            f"v{index}": _readable(keras.ops.convert_to_numpy(variable))
            for index, variable in enumerate(self._variables())
        }
        arrays |= {f"c{index}": _readable(array) for index, array in enumerate(kept)}
        with artifacts.write_atomically(self._path) as beside:
            np.savez(beside, **arrays, **{_META: np.array(json.dumps(meta))})  # type: ignore[arg-type]

    def _read(self) -> dict[str, Any] | None:
        try:
            # np.load leaves a file that it can't read open.
            with self._path.open("rb") as stream, np.load(stream) as stored:
                meta = json.loads(str(stored[_META]))
                if meta["identity"] != self._identity:
                    return None
                arrays = {
                    part: [stored[f"{part[0]}{at}"] for at in range(_count(stored, part[0]))]
                    for part in ("variables", "callbacks")
                }
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            logger.warning("%s is damaged (%s): begun again", self._path, error)
            return None
        return {**meta, "arrays": arrays}


def _described(model: keras.Model) -> str:
    """A hash of what is trained, without the numbers that Keras adds to names, and addresses."""
    compiled = model.get_compile_config() or {}
    about = [features.describe(model), compiled.get("optimizer"), compiled.get("loss")]
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(r"_\d+\b|0x[0-9a-f]+", "", text).encode()).hexdigest()


def _has_one_optimizer(model: keras.Model) -> bool:
    kept = vars(model).values()
    return all(
        one is model.optimizer for one in kept if isinstance(one, keras.optimizers.Optimizer)
    )


def _readable(array: np.ndarray) -> np.ndarray:
    """NumPy writes what it doesn't know, as bfloat16, but reads it back as raw bytes."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _count(stored: Any, letter: str) -> int:
    return sum(name[0] == letter and name[1:].isdigit() for name in stored.files)


def _state(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """A callback's attributes that are plain values or arrays: counters, best values, weights."""
    return {
        name: value
        for name, value in vars(callback).items()
        if name not in _NOT_STATE and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | np.ndarray | np.generic)


def _without_arrays(value: Any, kept: list[np.ndarray]) -> Any:
    """The value as JSON has it; arrays move to `kept` and leave their place in it."""
    if isinstance(value, np.ndarray):
        kept.append(value)
        return {"array": len(kept) - 1}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"dict": {name: _without_arrays(item, kept) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_without_arrays(item, kept) for item in value]
    return value


def _with_arrays(value: Any, kept: list[np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_with_arrays(item, kept) for item in value]
    if isinstance(value, dict) and "array" in value:
        return kept[value["array"]]
    if isinstance(value, dict):
        return {name: _with_arrays(item, kept) for name, item in value["dict"].items()}
    return value
