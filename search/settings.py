"""What a run is: the study's own fields, with what the command line says in their place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.data import datasets, weights
from search.errors import EXIT_USAGE, SearchError
from search.workers.protocol import Message

# Another value of one of these is another question: a study keeps the one it began with.
FIXED = (
    *("dataset", "epochs", "images_per_report", "batch_size", "average_weights"),
    *("seed", "kind", "weights"),
)
# Options without a meaning, by the kind of study.
USELESS = {
    "comparison": (
        *("trials", "time_budget", "trial_timeout", "sampler", "pruner", "top", "final_epochs"),
    ),
    "objective": (
        *("dataset", "epochs", "precision", "top", "seeds", "final_epochs", "cache_size"),
    ),
}


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
    average_weights: bool = True
    weights: str | None = None  # pretrained: a name, or the absolute path of a file
    cache_size: int = 8_000_000_000  # bytes, of frozen parts' activations; 0 for none
    folder: str = ""  # of the run; absolute
    checkpoints: str = ""  # folder of trainings that run, where every worker sees it; absolute
    seed: int = 0
    max_attempts: int = 3
    trial_timeout: float | None = None  # seconds, for one attempt at a trial
    silence: float | None = None  # seconds a worker may say nothing, see pool.py; None for a guess
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
    useless = [name for name in USELESS.get(own["kind"], ()) if name in given]
    if useless:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        why = "has an objective of its own, and no model of ours: {} can't apply. Leave it out"
        if own["kind"] == "comparison":
            why = (
                f"compares {own['trials']} named points and searches nothing: {{}} can't apply. "
                "Leave it out; --seeds and --epochs apply"
            )
        raise SearchError(f"study {own['name']!r} {why.format(options)}", exit_code=EXIT_USAGE)
    if "weights" in given and not own.get("weights"):
        raise SearchError(
            f"study {own['name']!r} begins from no pretrained weights, so --weights can't apply. "
            "Leave it out, or set Study(weights=...) for a space that takes them",
            exit_code=EXIT_USAGE,
        )
