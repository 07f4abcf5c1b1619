"""One warm process: receives tasks, does them, never sees the storage.

    python -m search.workers.worker DESCRIPTOR     (an engine does, with its end of a socket pair)

Nothing heavy is imported until the socket is being read, so that a worker whose coordinator dies
early ends as well.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import SearchError
from search.workers.protocol import (
    Channel,
    Diverged,
    Message,
    RemoteTrial,
    TrialEnded,
    WorkerConnection,
)

if TYPE_CHECKING:
    from studies.study import Study

# What TensorFlow and XLA say of a full GPU, where the error's class does not.
_NO_MEMORY = (
    *("resource_exhausted", "cuda_error_out_of_memory", "failed to allocate"),
    "dst tensor is not initialized",  # a copy to the GPU found no room for its target
)


def main() -> None:
    # Who stops the whole job (a cluster's scheduler, the system) sends its signal to everybody: the
    # coordinator answers, and ends this process. A handler, unlike SIG_IGN, is not inherited.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    connection = WorkerConnection(Channel(socket.socket(fileno=int(sys.argv[1]))))
    try:
        from search import catalogue

        study = catalogue.load(Path(connection.receive()["file"]))
        connection.send({"type": "described", **_describe(study)})
        preparation = connection.receive()
        settings = preparation["settings"]
        tasks = FunctionTasks(study) if study.objective else _keras_tasks(study, settings)
        # Without a search to come, the data need not be there.
        described = tasks.describe() if preparation["search"] else {}
        connection.send({"type": "ready", "rss": _rss(), "gpus": _gpus(study), **described})
    except Exception as error:  # the user's file may raise anything
        connection.send(
            {
                "type": "failed",
                "message": f"the study can't be loaded: {type(error).__name__}: {error}",
                "traceback": _own_frames(error),
            }
        )
        connection.receive()  # the coordinator ends this process when it has heard
        return
    while True:
        _do(connection, tasks, connection.receive())


class FunctionTasks:
    """The task of a study whose objective is a function of a trial: no Keras is needed."""

    def __init__(self, study: Study):
        self._study = study

    def describe(self) -> Message:
        points = list(self._study.known_points)
        counts = ("num_reports", "images_per_report", "images_per_epoch", "num_images")
        nothing = {"space": [], "precision": "", "pretrained": [], **dict.fromkeys(counts, 0)}
        return {**nothing, "known_points": points, "own_fit": False}

    def trial(self, trial: RemoteTrial, message: Message) -> Message:
        assert self._study.objective is not None
        value = self._study.objective(trial)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"The objective returns a number. Received: {value!r}")
        if not math.isfinite(value):
            return {"outcome": "diverged", "reason": f"the objective returned {value}"}
        return {"outcome": "complete", "value": float(value)}


def _do(connection: WorkerConnection, tasks: Any, message: Message) -> None:
    """One task, from its `start` to its `finished`, whatever happens in between."""
    stamp = {"trial": message["trial"], "attempt": message["attempt"]}

    def tell(**figures: Any) -> None:
        connection.send({"type": "progress", **stamp, **figures})

    run: Callable[..., Message] = getattr(tasks, message["task"])
    is_trial = message["task"] == "trial"
    first = RemoteTrial(connection, *stamp.values()) if is_trial else tell
    try:
        outcome = run(first, message)
    except TrialEnded:
        outcome = {"outcome": "pruned"}
    except Diverged as error:
        outcome = {"outcome": "diverged", "reason": str(error)}
    except Exception as error:  # the user's space may raise anything
        outcome = {"outcome": "pruned"} if _is_pruned(error) else _failure(error)
    connection.send({"type": "finished", **stamp, "rss": _rss(), **outcome})


def _describe(study: Study) -> Message:
    """The study's fields that are plain values, and which kind it is."""
    fields = {field.name: getattr(study, field.name) for field in dataclasses.fields(study)}
    for name in ("space", "objective", "known_points"):
        del fields[name]
    # What trains by itself does as it does.
    fields["average_weights"] &= study.space is not None and not _trains_itself(study)
    fields["published"] = [dict(figures) for figures in study.published]
    if study.compare:
        return {**fields, "kind": "comparison", "trials": len(study.known_points)}
    return {**fields, "kind": "objective" if study.objective else "space"}


def _trains_itself(study: Study) -> bool:
    from search.training.hypermodel import trains_itself

    return trains_itself(study.space)


def _keras_tasks(study: Study, settings: Message) -> Any:
    from search.training import backend
    from search.training.keras_tasks import KerasTasks

    backend.keep_to_share()  # before anything lies on a GPU

    return KerasTasks(study, settings)


def _gpus(study: Study) -> int:
    if study.objective:
        return 0
    from search.training.backend import visible_gpus

    return visible_gpus()


def _rss() -> int:
    """Resident bytes of this process, once what the last task left is freed."""
    if "keras" in sys.modules:
        from search.training.backend import release

        return release()
    import psutil

    return int(psutil.Process().memory_info().rss)


def _is_pruned(error: Exception) -> bool:
    """optuna.TrialPruned, from an objective that imports Optuna; a worker need not."""
    optuna = sys.modules.get("optuna")
    return optuna is not None and isinstance(error, optuna.TrialPruned)


def _failure(error: Exception) -> Message:
    """How a task ended that raised: `out_of_memory`, or `error` with the traceback."""
    name, said = type(error).__name__, str(error).casefold()
    exhausted = isinstance(error, MemoryError) or name == "ResourceExhaustedError"
    if isinstance(error, SearchError):
        return {"outcome": "error", "reason": str(error), "traceback": error.detail}
    if exhausted or any(words in said for words in _NO_MEMORY):
        return {"outcome": "out_of_memory", "reason": str(error).partition("\n")[0] or name}
    return {"outcome": "error", "reason": f"{name}: {error}", "traceback": _own_frames(error)}


def _own_frames(error: Exception) -> str:
    """The traceback without this project's frames: what is left is the user's code and Keras. Where
    nothing is left, and it was not this file that refused something, all of it."""
    here = os.path.join(Path(__file__).parents[1], "")
    own = traceback.TracebackException.from_exception(error)
    kept = [f for f in own.stack if not f.filename.startswith((here, "<frozen"))]
    if kept or own.stack[-1].filename == __file__:
        own.stack = traceback.StackSummary.from_list(kept)
    return "".join(own.format()).rstrip()


if __name__ == "__main__":
    main()
