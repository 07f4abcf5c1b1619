"""Commands that only read: what there is, how a run went, what it has found."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import click

from search.cli import options, runs
from search.errors import EXIT_USER_ERROR


@click.command(context_settings=options.CONTEXT)
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder whose runs are listed.",
)
def studies(runs: Path) -> None:
    """What studies there are, and which have been run.

    \b
    Example:
      fmnist-search studies
    """
    from search import catalogue
    from search.view import listing

    listing.print_studies(catalogue.studies(), runs)


@click.command(context_settings=options.CONTEXT)
@options.run
@click.option("--top", type=click.IntRange(1), help="Trials shown.  [default: 20; json: all]")
@click.option("--trial", type=click.IntRange(0), help="This one in full, with its learning curve.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(
    study: str,
    out: Path | None,
    storage: str | None,
    top: int | None,
    trial: int | None,
    as_json: bool,
) -> None:
    """The leaderboard of a run, or one trial in full, while it runs or after.

    \b
    Example:
      fmnist-search show --study cnn --top 10
      fmnist-search show --study cnn --trial 12
    """
    from search import results
    from search.view import listing

    if trial is not None and top is not None:
        raise click.UsageError("--top and --trial exclude each other")
    opened, folder = runs.opened(study, out, storage)
    if trial is not None:
        found = results.detail(opened, trial)
        click.echo(listing.to_json(found)) if as_json else listing.print_trial(opened, found)
        return
    if as_json:
        click.echo(listing.to_json([row._asdict() for row in results.rows(opened)[:top]]))
        return
    listing.print_leaderboard(opened, folder, top or 20)


@click.command(context_settings=options.CONTEXT)
@options.run
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8080,
    show_default=True,
    help="Or the next one that is free.",
)
@click.option("--no-browser", is_flag=True, help="Print the address only.")
def dashboard(
    study: str, out: Path | None, storage: str | None, port: int, no_browser: bool
) -> None:
    """Optuna's dashboard over a run, read only, while it runs or after.

    \b
    Example:
      fmnist-search dashboard --study cnn
    """
    opened, _ = runs.opened(study, out, storage)
    from search.view import dashboard

    dashboard.serve(opened, port, browser=not no_browser, say=click.echo)


@click.command(context_settings=options.CONTEXT)
@options.run
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="To write.  [default: report.html in the run's folder]",
)
@click.option("--open", "opens", is_flag=True, help="Show it in the browser.")
def report(
    study: str, out: Path | None, storage: str | None, file: Path | None, opens: bool
) -> None:
    """Write one HTML page about a run, while it runs or after: figures, images, how to do it again.

    \b
    Example:
      fmnist-search report --study cnn --open
    """
    from search import catalogue, folders
    from search.report import report
    from search.view import dashboard

    opened, folder = runs.opened(study, out, storage)
    path, summary = file or folder / report.NAME, catalogue.find(study).summary
    with nullcontext() if file else folders.umask(folders.PRIVATE):  # like all of a run's files
        report.write(opened, folder, path, summary)
    click.echo(path)
    if opens and not dashboard.has_browser():
        click.echo("fmnist-search: there is no browser here to open it in", err=True)
    elif opens:
        click.launch(str(path))


@click.command(context_settings=options.CONTEXT)
@options.run
@click.option("--top", type=click.IntRange(1), help="How many trials.  [default: 5; python: 1]")
@click.option("--trial", type=click.IntRange(0), help="This one only.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["yaml", "json", "csv", "python"]),
    default="yaml",
    show_default=True,
    help="python: a Keras script of its own, layer by layer.",
)
def export(
    study: str,
    out: Path | None,
    storage: str | None,
    top: int | None,
    trial: int | None,
    format_: str,
) -> None:
    """Print the best trials' values and params, or one as a stand-alone Keras script.

    \b
    Example:
      fmnist-search export --study cnn --top 5 --format csv > best.csv
      fmnist-search export --study cnn --format python > model.py
    """
    from search import results
    from search.winners import export

    if top and trial is not None:
        raise click.UsageError("--top and --trial exclude each other")
    if format_ == "python" and (top or 1) > 1:
        raise click.UsageError("a script holds one model: --trial N instead of --top")
    opened, _ = runs.opened(study, out, storage)
    chosen = results.chosen(opened, top or (1 if format_ == "python" else 5), trial)
    if format_ == "python":
        from search import catalogue

        file = catalogue.find(study).file
        stored = runs.stored_options(opened)
        click.echo(export.script(opened, chosen[0], file, stored), nl=False)
        return
    click.echo(export.leaderboard(opened, chosen, format_), nl=False)


@click.command(context_settings=options.CONTEXT)
@options.study
@options.out
@click.option(
    "--model",
    type=click.Choice(["winner", "ensemble"]),
    default="winner",
    show_default=True,
    help="ensemble: the mean of all retrained models.",
)
@click.option("--invert", is_flag=True, help="For dark things on light ground, where the model was "
              "trained on light ones on dark.")  # fmt: skip
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
def predict(
    study: str, out: Path | None, model: str, invert: bool, images: tuple[Path, ...]
) -> None:
    """Name the class of PNG or JPEG images, of any size, grey or colour.

    \b
    Example:
      fmnist-search predict --study cnn shoe.png shirt.jpg
    """
    from search import catalogue
    from search.view import listing
    from search.winners import inference

    entry = catalogue.find(study)
    folder = runs.folder_of(entry, out)
    rows = inference.classify(entry.name, folder, entry.file, images, model=model, invert=invert)
    listing.print_classified(rows)


@click.command(context_settings=options.CONTEXT)
@click.option("--dataset", metavar="NAME|FILE.npz|DIR", default="fashion_mnist", show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where runs are kept, or a run's folder.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(dataset: str, out: Path, as_json: bool) -> None:
    """Whether this machine has what a search needs; exit code 1 if not.

    \b
    Example:
      fmnist-search doctor
    """
    from search import doctor
    from search.view import listing

    findings = doctor.examine(dataset, out)
    if as_json:
        click.echo(doctor.to_json(findings))
    else:
        listing.print_findings(findings)
    if not doctor.is_well(findings):
        sys.exit(EXIT_USER_ERROR)
