"""Commands that train what a run has stored, and those that mend or move its study."""

from __future__ import annotations

import os
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
    found, _ = runs.opened(study, out, values["storage"])
    given = {name: value for name, value in values.items() if value is not None}
    stored = {"storage": None, **runs.stored_options(found)}
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
    from search.view import listing
    from search.winners import reproduce

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

    from search import catalogue
    from search.view import listing
    from search.winners import repeat as repeating

    opened, _ = runs.opened(study, out, storage)
    stored = runs.stored_options(opened)
    anew = "the same command begins the trial anew"
    with tempfile.TemporaryDirectory() as folder, runs.watched(values, anew) as view:
        file = catalogue.find(study).file
        repeated = repeating.repeat(opened, trial, file, Path(folder), stored, view)
    listing.print_repeated(repeated)
    if not repeated.is_same:
        sys.exit(1)


@click.command(context_settings=options.CONTEXT)
@options.study
@click.option("--from", "source", metavar="URL", required=True, help="Where it is.")
@click.option("--to", "target", metavar="URL", required=True, help="Where it is to be.")
def move(study: str, source: str, target: str) -> None:
    """Carry a study with all its trials to another database, SQLite or PostgreSQL.

    What lies in the run's folder stays. The same command again goes on where a kill ended it.

    \b
    Example:
      fmnist-search move --study cnn --from sqlite:///runs/cnn/study.db \\
        --to postgresql://me@host/studies
    """
    from search import catalogue
    from search.storage import moving
    from search.storage import storage as stores
    from search.storage.sqlite_file import SqliteFile

    entry = catalogue.find(study)
    source_, target_ = stores.at(source), stores.at(target)
    num_trials = moving.move(entry.name, source_, target_)
    click.echo(f"{entry.name}: {num_trials} trials moved from {source_.label} to {target_.label}")
    # The run's folder is where its file was, or where it is now.
    files = [end.path for end in (source_, target_) if isinstance(end, SqliteFile)]
    folder = next((file.parent for file in files if file.name == "study.db"), None)
    usual = runs.folder_of(entry, None).absolute()
    out = folder if folder and folder.absolute() != usual else None
    click.echo(f"go on with: fmnist-search {runs.same_search(study, out, target_.url)}")


@click.command(context_settings=options.CONTEXT)
@options.run
def repair(study: str, out: Path | None, storage: str | None) -> None:
    """Put the newest snapshot in the place of a damaged study file.

    A run takes one every five minutes, at the end of its search and at its own. What was trained
    since is trained again by the command that began the run.

    \b
    Example:
      fmnist-search repair --study cnn
    """
    from search import catalogue, folders
    from search.storage import snapshots
    from search.storage import storage as stores
    from search.storage.sqlite_file import SqliteFile

    entry = catalogue.find(study)
    database = stores.at(stores.url_in(runs.folder_of(entry, out), storage))
    if not isinstance(database, SqliteFile):
        raise SearchError(
            "snapshots are taken of SQLite files alone: a server's database is restored from its "
            "own backups (pg_restore)",
            exit_code=EXIT_USAGE,
        )
    path = database.path
    if not path.parent.is_dir():
        raise SearchError(f"there is no folder {path.parent}; check --out", exit_code=EXIT_USAGE)
    if not os.access(path.parent, os.W_OK, effective_ids=True):
        raise SearchError(
            f"{path.parent} can't be written; make it writable, or copy it elsewhere and take "
            "--out COPY"
        )
    with folders.umask(folders.PRIVATE), database.lock(entry.name):
        restored = snapshots.restore(path)
    click.echo(f"{path} is {restored.snapshot} now, with {restored.num_trials} finished trials")
    if restored.aside:
        click.echo(f"the damaged file lies in {restored.aside}")
    click.echo(f"go on with: fmnist-search {runs.same_search(study, out, storage)}")
