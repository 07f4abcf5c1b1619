"""Commands that train what a run has stored, and the one that mends it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from search.cli import options, runs
from search.errors import EXIT_USAGE, SearchError


@click.command(context_settings=options.CONTEXT)
@options.run
@options.running
def retrain(study: str, out: Path | None, **values: Any) -> None:
    """Retrain the winners of a run and test them, without further trials.

    \b
    Example:
      fmnist-search retrain --study cnn --top 3 --seeds 5 --final-epochs 30
    """
    runs.opened(study, out, values["storage"])  # there must be something to retrain
    given = {name: value for name, value in values.items() if value is not None}
    stored = {"storage": None, **runs.stored_options(study, out, values["storage"])}
    runs.journey(study, out, {**stored, **given, "search": False})


@click.command(context_settings=options.CONTEXT)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--study", metavar="NAME|FILE.py", help="Whose space it is.  [default: the config's]")
@click.option("--dataset", metavar="NAME|FILE.npz|DIR", help="[default: the config's]")
@click.option("--out", type=click.Path(path_type=Path), help="[default: runs/CONFIG-trained]")
@click.option("--seeds", type=click.IntRange(1, 1000), help="Trainings.  [default: the config's]")
@click.option("--precision", type=click.Choice(options.PRECISIONS), help="[default: the config's]")
@options.working
@options.verbosity
def train(config: Path, out: Path | None, **values: Any) -> None:
    """Train an exported CONFIG.yaml again and compare its figures with the file's.

    \b
    Example:
      fmnist-search train runs/cnn/configs/best.yaml --seeds 1
    """
    from search import listing, reproduce

    folder = out or Path("runs") / f"{config.stem}-trained"
    with runs.watched(values) as view:
        figures = reproduce.train(config, folder, values, view)
    listing.print_reproduced(figures, folder)


@click.command(context_settings=options.CONTEXT)
@options.run
@click.argument("trial", type=click.IntRange(0))
@options.verbosity
def repeat(study: str, out: Path | None, storage: str | None, trial: int, **values: Any) -> None:
    """Train one TRIAL of a run again, alone, and compare its curve with the stored one.

    Exits with 1 where they differ. Nothing is stored.

    \b
    Example:
      fmnist-search repeat --study cnn 17
    """
    import tempfile

    from search import catalogue, listing
    from search import repeat as repeating

    opened, _ = runs.opened(study, out, storage)
    stored = runs.stored_options(study, out, storage)
    with tempfile.TemporaryDirectory() as folder, runs.watched(values) as view:
        file = catalogue.find(study).file
        repeated = repeating.repeat(opened, trial, file, Path(folder), stored, view)
    listing.print_repeated(repeated)
    if not repeated.is_same:
        sys.exit(1)


@click.command(context_settings=options.CONTEXT)
@options.run
def repair(study: str, out: Path | None, storage: str | None) -> None:
    """Put the newest snapshot in the place of a damaged study file.

    The coordinator takes one every five minutes and at the end of a search. What was trained since
    is trained again by the command that began the run.

    \b
    Example:
      fmnist-search repair --study cnn
    """
    from search import catalogue, snapshots
    from search import storage as stores

    entry = catalogue.find(study)
    url = stores.url_in(runs.folder_of(entry, out), storage)
    path = stores.database_path(url)
    if not path.parent.is_dir():
        raise SearchError(f"there is no folder {path.parent}; check --out", exit_code=EXIT_USAGE)
    with stores.lock(stores.lock_beside(url, entry.name)):
        restored = snapshots.restore(path)
    click.echo(f"{path} is {restored.snapshot} now, with {restored.num_trials} finished trials")
    if restored.aside:
        click.echo(f"the damaged file lies in {restored.aside}")
    click.echo(f"go on with: fmnist-search {runs.same_run(study, out, storage)}")
