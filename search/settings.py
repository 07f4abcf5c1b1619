"""What a run is: the study's own fields, with what the command line says in their place."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.data import datasets, weights
from search.errors import EXIT_USAGE, SearchError
from search.workers.protocol import Message

# Another value of one of these is another question: a study keeps the one it began with.
FIXED = ("dataset", "epochs", "images_per_report", "batch_size", "seed", "kind", "weights")
# Options without a meaning where named points are trained as they are.
NOT_OF_A_COMPARISON = ("trials", "time_budget", "sampler", "pruner", "top", "final_epochs")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run, as coordinator and workers know it; all plain values."""

    name: str
    file: str  # of the study
    kind: str  # "space", "objective" or "comparison"
    dataset: str  # a name, or the absolute path of a file or folder
    epochs: float
    final_epochs: float | None
    images_per_report: int
    batch_size: int
    trials: int
    sampler: str
    pruner: str
    first_rung: int
    reduction_factor: int
    weights: str | None = None  # pretrained: a name, or the absolute path of a file
    max_parameters: int | None = None
    max_flops: int | None = None
    max_memory: int | None = None
    cache_size: int = 8_000_000_000  # bytes, of frozen parts' activations; 0 for none
    folder: str = ""  # of the run; absolute
    checkpoints: str = ""  # folder of trainings that run, where every worker sees it; absolute
    seed: int = 0
    max_attempts: int = 3
    trial_timeout: float | None = None  # seconds, for one attempt at a trial
    silence: float | None = None  # seconds without a word from a worker; None for a guess
    precision: str = "auto"
    time_budget: float | None = None  # seconds, for the search
    top: int = 1
    seeds: int = 3

    def fixed(self) -> dict[str, Any]:
        """The values of FIXED; a file that has moved to another folder is the same file."""
        values = {name: getattr(self, name) for name in FIXED}
        moved = {name: Path(values[name]).name for name in ("dataset", "weights") if values[name]}
        return values | moved


def resolve(described: Message, file: str, options: dict[str, Any]) -> Settings:
    """Options (those given) over what the study says of itself.

    A relative path is relative to the study's file, or to this process's folder.

    Raises:
        SearchError: if an option is of no use to this kind of study.
    """
    known = {field.name for field in dataclasses.fields(Settings)}
    own = {name: value for name, value in described.items() if name in known}
    given = {name: value for name, value in options.items() if name in known and value is not None}
    for name, resolved in (("dataset", datasets.resolve), ("weights", weights.resolve)):
        if own.get(name):
            own[name] = resolved(own[name], Path(file).parent)
        if name in given:
            given[name] = resolved(given[name], Path.cwd())
    _refuse_useless(own, given)
    return Settings(**{**own, "file": file, **given})


def _refuse_useless(own: dict[str, Any], given: dict[str, Any]) -> None:
    useless = [name for name in NOT_OF_A_COMPARISON if name in given]
    if own["kind"] == "comparison" and useless:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise SearchError(
            f"study {own['name']!r} compares {own['trials']} named points and searches nothing: "
            f"{options} can't apply. Leave it out; --seeds and --epochs apply",
            exit_code=EXIT_USAGE,
        )
    if "weights" in given and not own.get("weights"):
        raise SearchError(
            f"study {own['name']!r} begins from no pretrained weights, so --weights can't apply. "
            "Leave it out, or set Study(weights=...) for a space that takes them",
            exit_code=EXIT_USAGE,
        )


def refuse_differences(stored: dict[str, Any], now: dict[str, Any], study: str, out: str) -> None:
    """Raises SearchError if a continued study would answer another question; says what differs."""
    differing = [
        f"{name} was {stored[name]!r} and is now {now[name]!r}"
        for name in now
        if name in stored and stored[name] != now[name]
    ]
    if differing:
        raise SearchError(
            f"{out} holds a study {study!r} of another kind: {'; '.join(differing)}. Give the "
            "values it began with, or another --out",
            exit_code=EXIT_USAGE,
        )


def refuse_another_space(
    stored: list[dict[str, Any]], now: list[dict[str, Any]], study: str, out: str
) -> None:
    """The same for the space's hyperparameters: names, kinds, ranges, conditions."""
    before, after = _by_name(stored), _by_name(now)
    differing = [f"{name} is new" for name in after.keys() - before.keys()]
    differing += [f"{name} is gone" for name in before.keys() - after.keys()]
    differing += [
        f"{name} was {_range(before[name])} and is now {_range(after[name])}"
        for name in before.keys() & after.keys()
        if before[name] != after[name]
    ]
    if differing:
        raise SearchError(
            f"{out} holds a study {study!r} with another space: {'; '.join(sorted(differing))}. "
            "Put the space back as it was, or take another --out",
            exit_code=EXIT_USAGE,
        )


def refuse_other_points(
    stored: list[dict[str, Any]],
    now: list[dict[str, Any]],
    study: str,
    out: str,
    *,
    may_grow: bool,
) -> None:
    """The same for the known points, whose figures are stored by their place among them. A search
    tries those that have been added at the end; in a comparison all have been stored together."""
    points = itertools.zip_longest(stored, now)
    differing = next((at for at, (before, after) in enumerate(points) if before != after), None)
    if differing is None or (may_grow and differing == len(stored)):
        return
    before, after = (
        repr(points[differing]) if differing < len(points) else "none" for points in (stored, now)
    )
    raise SearchError(
        f"{out} holds a study {study!r} with other known_points: number {differing} was {before} "
        f"and is now {after}. Put them back as they were, or take another --out",
        exit_code=EXIT_USAGE,
    )


def _by_name(space: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    named: dict[str, list[dict[str, Any]]] = {}
    for hyperparameter in space:
        named.setdefault(hyperparameter["name"], []).append(hyperparameter)
    return named


def _range(described: list[dict[str, Any]]) -> str:
    return " or ".join(
        str({name: value for name, value in one.items() if name != "name"}) for one in described
    )
