"""A run as a command names it: opened to read, or gone on with."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from search.errors import Interrupted, SearchError

if TYPE_CHECKING:
    import optuna

    from search.catalogue import Entry
    from search.view.progress import View


def journey(study: str, out: Path | None, values: dict[str, Any]) -> None:
    """Run a study, or go on with it, and print what it has come to."""
    from search import catalogue
    from search.journey import run
    from search.view import listing

    folder = folder_of(catalogue.find(study), out)
    final = not values.pop("no_retrain", False)
    with watched(values) as view:
        outcome = run(study, folder, values, view, final=final)
    listing.print_outcome(
        outcome, same_run(study, out, values["storage"]), same_run(study, out, None)
    )


@contextmanager
def watched(
    values: dict[str, Any], interrupted: str = "nothing is lost, the same command goes on"
) -> Iterator[View]:
    """The terminal's picture of long work; a signal ends the command with its exit code, and says
    what is left then."""
    from search.view.progress import View

    try:
        with View(values.pop("verbose") - values.pop("quiet")) as view:
            yield view
    except Interrupted as error:
        click.echo(f"fmnist-search: interrupted; {interrupted}", err=True)
        sys.exit(128 + error.number)


def folder_of(entry: Entry, out: Path | None) -> Path:
    return out or Path("runs") / entry.name


def opened(study: str, out: Path | None, url: str | None) -> tuple[optuna.Study, Path]:
    """The study of a run, read only, and its folder."""
    from search import catalogue, run_record
    from search.storage import storage

    entry = catalogue.find(study)
    folder = folder_of(entry, out)
    found = storage.read_study(storage.url_in(folder, url), entry.name)
    if found is None:
        raise SearchError(
            f"no run of {entry.name!r} in {folder}; start it with: "
            f"fmnist-search {same_run(study, out, url)}"
        )
    run_record.of(found, folder)  # refuses what it can't read
    return found, folder


def same_run(study: str, out: Path | None, url: str | None) -> str:
    """The options that name a run again."""
    named = {"--study": study, "--out": out, "--storage": url}
    return " ".join(f"{name} {shlex.quote(str(value))}" for name, value in named.items() if value)


def same_search(study: str, out: Path | None, url: str | None) -> str:
    """The options with which a run goes on: those that name it, and what it began with."""
    from search import run_record

    run = opened(study, out, url)[0].user_attrs.get("run")
    kept = run_record.options(run) if run else []
    return " ".join([same_run(study, out, url), *map(shlex.quote, kept)])


def stored_options(found: optuna.Study) -> dict[str, Any]:
    """What the run began with, so that `retrain` need not be told again."""
    from search.settings import USELESS

    run = found.user_attrs.get("run")
    if run is None:
        return {}
    options = dict(run["fixed"])
    useless = USELESS.get(options.pop("kind"), ())
    references = {name: run.get(name) for name in ("dataset", "weights")}
    options |= {name: known["reference"] for name, known in references.items() if known}
    options |= {name: run["told"][name] for name in ("precision", "final_epochs")}
    return {name: value for name, value in options.items() if name not in useless}
