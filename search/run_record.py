"""What a study keeps of the run it began as, and whether a later call asks the same of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from search import artifacts, catalogue, provenance
from search.errors import EXIT_USAGE, SearchError
from search.settings import USELESS, Settings
from search.workers.protocol import Message

# Of what is kept here and in the trials' attributes: to be raised where older runs can no longer be
# read right. Better refused than half understood.
FORMAT = 2

# What a call that does not say it takes from the one before: typed once more, the command that
# began a run leaves alone what `retrain` has made of it.
OF_WINNERS = ("top", "seeds", "final_epochs")

# What the workers find out before the first trial.
_MEASURED = (
    *("num_reports", "images_per_report", "images_per_epoch", "num_images", "precision"),
    "pretrained",  # which known points begin from the study's weights
    "own_fit",  # whether the space's own `fit` says what a trial's value is
)


def of(study: optuna.Study | None, folder: Path) -> dict[str, Any] | None:
    """The study's attribute `run`; None where none has begun.

    Raises:
        SearchError: for a run of a version that keeps something else.
    """
    run: dict[str, Any] | None = None if study is None else study.user_attrs.get("run")
    if run is not None and study and not is_readable(study):
        raise SearchError(
            f"{folder} holds a run that another version began (format {run.get('format', 0)}, this "
            f"one's is {FORMAT}); install that version, or take another --out",
            exit_code=EXIT_USAGE,
        )
    return run


def is_readable(study: optuna.Study) -> bool:
    """Whether what is kept of its run, if it has begun, is what this version keeps."""
    run = study.user_attrs.get("run")
    return run is None or run.get("format") == FORMAT


def record(
    before: dict[str, Any] | None,
    file: Path,
    described: Message,
    ready: Message,
    settings: Settings,
    *,
    dataset: dict[str, Any] | None,
    pretrained: dict[str, Any] | None,
    workers: int | None,
    searches: bool,
) -> dict[str, Any]:
    """What is kept from now on.

    Args:
        before: what was kept by earlier calls.
        file: the study's.
        described, ready: what the workers have said of the study and its space.
        settings: with the weights as the study names them.
        dataset, pretrained: as `search/data/verified.py` gives them.
        workers: of this machine; None where a cluster has them.
        searches: whether trials are still to be run.
    """
    return {
        "format": FORMAT,
        "described": described,
        "fixed": settings.fixed(),
        "space": ready["space"],
        "known_points": ready["known_points"],
        **{name: ready[name] for name in _MEASURED},
        "dataset": dataset,
        "weights": pretrained,
        "file": None if catalogue.is_installed(file) else str(file),
        "file_sha256": artifacts.sha256(file),
        "told": told(before, settings, ready["precision"], workers, searches=searches),
        "made_with": made_with(before),
    }


def told(
    before: dict[str, Any] | None,
    settings: Settings,
    precision: str | None,
    workers: int | None,
    *,
    searches: bool,
) -> dict[str, Any]:
    """What may change from one call to the next. One that has nothing left to search keeps what
    the search was told: its trials are those of another sampler, pruner and precision."""
    now: dict[str, Any] = {name: getattr(settings, name) for name in OF_WINNERS}
    if before is None or settings.kind == "comparison" or searches:
        now |= {name: getattr(settings, name) for name in ("trials", "sampler", "pruner")}
        # So many trials run while TPE draws the next.
        now |= {"precision": precision, "workers": workers}
    return (before["told"] if before else {}) | now


def changed(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What the trials to come have otherwise than those before, a line each."""
    told = before["told"] if before else {}
    return [
        f"{name} was {told[name]} until now: trials from here on have {now['told'][name]}, and "
        "reports and `repeat` know of that alone"
        for name in ("sampler", "pruner", "precision")
        if told.get(name) not in (None, now["told"][name])
    ]


def options(run: Mapping[str, Any]) -> list[str]:
    """What the command line has to say so that a run goes on as it was, or is done again: all but
    the workers, which are the machine's."""
    fixed, described, told = run["fixed"], run["described"], run["told"]
    known = {name: run[name]["reference"] for name in ("dataset", "weights") if run[name]}
    own = {name: described.get(name) for name in (*known, "final_epochs")}
    said = {name: fixed[name] for name in ("epochs", "seed")} | known
    said |= {name: told[name] for name in ("trials", "sampler", "pruner", "precision", *OF_WINNERS)}
    words = []
    for name, value in said.items():
        is_own = name in own and value == own[name]
        if value in (None, "") or is_own or name in USELESS.get(fixed["kind"], ()):
            continue
        value = f"{value:.15g}" if isinstance(value, float) else str(value)
        words += [f"--{name.replace('_', '-')}", value]
    return words


def made_with(before: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Versions, commit and hardware, of each call where they were others than before."""
    known = before["made_with"] if before else []
    now = provenance.collect()
    return known if known[-1:] == [now] else [*known, now]


def refuse_another(
    run: dict[str, Any],
    ready: Message,
    dataset: dict[str, Any] | None,
    pretrained: dict[str, Any] | None,
    study: str,
    out: str,
) -> None:
    """Raises SearchError if what was begun has another space, other points, data or weights."""
    refuse_another_space(run["space"], ready["space"], study, out)
    may_grow = run["fixed"]["kind"] != "comparison"
    refuse_other_points(run["known_points"], ready["known_points"], study, out, may_grow=may_grow)
    if dataset:
        refuse_differences(
            {"data": run["dataset"]["sha256"]}, {"data": dataset["sha256"]}, study, out
        )
    if pretrained:
        before, now = (
            {"weights": f"{known['label']} (SHA-256 {known['sha256'][:12] or 'none'})"}
            for known in (run["weights"], pretrained)
        )
        refuse_differences(before, now, study, out)


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
            "Put the space back as it was (of a study of this project: install the version that it "
            "began with), or take another --out",
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
