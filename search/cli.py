"""The command line. Keras is imported by workers only, and nothing heavy before it is needed."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from search.errors import EXIT_USAGE, EXIT_USER_ERROR, SearchError

if TYPE_CHECKING:
    import optuna

    from search.progress import View

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_BYTES = {"": 0, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS = {"s": 1, "m": 60, "h": 3600}
PRECISIONS = ["auto", "float32", "bfloat16"]
_YEAR = 366 * 24 * 3600


class _Duration(click.ParamType):
    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
        if not 0 < seconds <= _YEAR:
            self.fail(
                "a time is a number and s, m or h, such as 90m, of a year at most. "
                f"Received: {str(value)[:40]!r}"
            )
        return seconds


class _Size(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT]?)", str(value))
        if not match or (not match[2] and float(match[1])):
            self.fail(
                f"a size is a number and M, G or T, such as 8G, or 0. Received: {str(value)[:40]!r}"
            )
        return int(float(match[1]) * _BYTES[match[2]])


class _Epochs(click.FloatRange):
    def __init__(self) -> None:
        super().__init__(min=0, min_open=True, max=10_000)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"epochs are a number above 0. Received: {value!r}")
        return number


_study = click.option("--study", metavar="NAME|FILE.py", required=True, help="Which study.")
_out = click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<study>]"
)
_storage = click.option(
    "--storage", metavar="URL", help="sqlite:///FILE.  [default: study.db in the run's folder]"
)


def _options(*options: Any) -> Any:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_verbosity = _options(
    click.option("-v", "--verbose", count=True, help="Every event beside the live view."),
    click.option("-q", "--quiet", is_flag=True, help="Warnings and the result only."),
)
_working = _options(
    click.option("--workers", default="auto", help="auto (one per GPU, or per core) or a number."),
    click.option("--max-attempts", type=click.IntRange(1, 1000), default=3, show_default=True,
                 help="Of a trial whose worker dies."),
    click.option("--silence", type=_Duration(),
                 help="After which a worker that says nothing is replaced.  [default: 10 times its "
                 "longest interval, 5m at least]"),
    click.option("--weights", metavar="imagenet|none|FILE",
                 help="Pretrained ones, where the study begins from some; none: random."),
    click.option("--cache-size", type=_Size(), help="On disk, of what frozen layers give, such as "
                 "500M; 0: none.  [default: 8G]"),
)  # fmt: skip
_running = _options(
    _working,
    click.option("--precision", type=click.Choice(PRECISIONS), default="auto"),
    click.option("--top", type=click.IntRange(1, 1000), help="Winners to retrain.  [default: 1]"),
    click.option("--seeds", type=click.IntRange(1, 1000), default=3, show_default=True,
                 help="Trainings of each winner."),
    click.option("--final-epochs", type=_Epochs(),
                 help="Of a winner's training.  [default: the study's, else as served it best]"),
    click.option("--log", type=click.Choice(["tensorboard", "csv"]),
                 help="Each trial's curve, for other tools."),
    _verbosity,
)  # fmt: skip


@click.group(invoke_without_command=True, context_settings=_CONTEXT)
@click.version_option(package_name="fmnist-search")
@click.option("--study", metavar="NAME|FILE.py", help="Which study; `studies` lists them.")
@click.option(
    "--trials",
    type=click.IntRange(1, 1_000_000),
    help="Finished trials in all, not more of them.  [default: the study's]",
)
@click.option("--epochs", type=_Epochs(), help="Of a trial that is not pruned.")
@click.option(
    "--dataset",
    metavar="NAME|FILE.npz|DIR",
    help="fashion_mnist, mnist, cifar10 or digits; a file of x_train, y_train, x_test, y_test; "
    "a folder of train/CLASS/*.png and test/CLASS/*.png.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Of the study.  [default: 0]")
@_out
@click.option("--time-budget", type=_Duration(), help="Of the search, such as 90m.")
@click.option("--trial-timeout", type=_Duration(), help="Of one attempt at a trial, such as 20m.")
@click.option("--sampler", type=click.Choice(["tpe", "random", "qmc"]))
@click.option("--pruner", type=click.Choice(["asha", "median", "none"]))
@_storage
@click.option("--no-retrain", is_flag=True, help="Search only.")
@_running
@click.pass_context
def cli(ctx: click.Context, study: str | None, out: Path | None, **options: Any) -> None:
    """From a search space of Keras models to a tested model.

    Searches the study, retrains the winner on all training data and measures it once on the test
    set. The same command again goes on where it was left.

    \b
    Example:
      fmnist-search --study quickstart
      fmnist-search --study cnn --trials 100
    """
    given = [
        parameter
        for parameter in ctx.params
        if ctx.get_parameter_source(parameter) == click.core.ParameterSource.COMMANDLINE
    ]
    if ctx.invoked_subcommand is not None:
        if given:
            raise click.UsageError(f"options stand behind the command {ctx.invoked_subcommand!r}")
        return
    if study is None:
        if given:
            raise click.UsageError("--study is missing; `fmnist-search studies` lists them")
        click.echo(ctx.get_help())
        return
    _journey(study, out, options)


@cli.command(context_settings=_CONTEXT)
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
    from search import catalogue, listing

    listing.print_studies(catalogue.studies(), runs)


@cli.command(context_settings=_CONTEXT)
@_study
@_out
@_storage
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
    from search import listing, results

    if trial is not None and top is not None:
        raise click.UsageError("--top and --trial exclude each other")
    opened, folder = _opened(study, out, storage)
    if trial is not None:
        found = results.detail(opened, trial)
        click.echo(listing.to_json(found)) if as_json else listing.print_trial(opened, found)
        return
    if as_json:
        click.echo(listing.to_json([row._asdict() for row in results.rows(opened)[:top]]))
        return
    listing.print_leaderboard(opened, folder, top or 20)


@cli.command(context_settings=_CONTEXT)
@_study
@_out
@_storage
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
    opened, _ = _opened(study, out, storage)
    from search import dashboard

    dashboard.serve(opened, port, browser=not no_browser, say=click.echo)


@cli.command(context_settings=_CONTEXT)
@_study
@_out
@_storage
@_running
def retrain(study: str, out: Path | None, **options: Any) -> None:
    """Retrain the winners of a run and test them, without further trials.

    \b
    Example:
      fmnist-search retrain --study cnn --top 3 --seeds 5 --final-epochs 30
    """
    _opened(study, out, options["storage"])  # there must be something to retrain
    given = {name: value for name, value in options.items() if value is not None}
    stored = {"storage": None, **_stored_options(study, out, options["storage"])}
    _journey(study, out, {**stored, **given, "search": False})


@cli.command(context_settings=_CONTEXT)
@_study
@_out
@_storage
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
    from search import export, results

    if format_ == "python" and (top or 1) > 1:
        raise click.UsageError("a script holds one model: --trial N instead of --top")
    opened, _ = _opened(study, out, storage)
    chosen = results.chosen(opened, top or (1 if format_ == "python" else 5), trial)
    if format_ == "python":
        from search import catalogue

        file = catalogue.find(study).file
        options = _stored_options(study, out, storage)
        click.echo(export.script(opened, chosen[0], file, options), nl=False)
        return
    click.echo(export.leaderboard(chosen, format_), nl=False)


@cli.command(context_settings=_CONTEXT)
@_study
@_out
@_storage
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
    from search import catalogue
    from search.report import report

    opened, folder = _opened(study, out, storage)
    path = file or folder / report.NAME
    report.write(opened, folder, path, catalogue.find(study).summary)
    click.echo(path)
    if opens:
        click.launch(str(path))


@cli.command(context_settings=_CONTEXT)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--study", metavar="NAME|FILE.py", help="Whose space it is.  [default: the config's]")
@click.option("--dataset", metavar="NAME|FILE.npz|DIR", help="[default: the config's]")
@click.option("--out", type=click.Path(path_type=Path), help="[default: runs/CONFIG-trained]")
@click.option("--seeds", type=click.IntRange(1, 1000), help="Trainings.  [default: the config's]")
@click.option("--precision", type=click.Choice(PRECISIONS), help="[default: the config's]")
@_working
@_verbosity
def train(config: Path, out: Path | None, **options: Any) -> None:
    """Train an exported CONFIG.yaml again and compare its figures with the file's.

    \b
    Example:
      fmnist-search train runs/cnn/configs/best.yaml --seeds 1
    """
    from search import listing, reproduce

    folder = out or Path("runs") / f"{config.stem}-trained"
    with _interruptible(), _view(options) as view:
        figures = reproduce.train(config, folder, options, view)
    listing.print_reproduced(figures, folder)


@cli.command(context_settings=_CONTEXT)
@_study
@_out
@_storage
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
    url = stores.url_in(out or Path("runs") / entry.name, storage)
    path = stores.database_path(url)
    if not path.parent.is_dir():
        raise SearchError(f"there is no folder {path.parent}; check --out", exit_code=EXIT_USAGE)
    with stores.lock(stores.lock_beside(url, entry.name)):
        restored = snapshots.restore(path)
    click.echo(f"{path} is {restored.snapshot} now, with {restored.num_trials} finished trials")
    if restored.aside:
        click.echo(f"the damaged file lies in {restored.aside}")
    click.echo(f"go on with: fmnist-search {_same_run(study, out, storage)}")


@cli.command(context_settings=_CONTEXT)
@_study
@_out
@_storage
@click.argument("trial", type=click.IntRange(0))
@_verbosity
def repeat(study: str, out: Path | None, storage: str | None, trial: int, **options: Any) -> None:
    """Train one TRIAL of a run again, alone, and compare its curve with the stored one.

    Exits with 1 where they differ. Nothing is stored.

    \b
    Example:
      fmnist-search repeat --study cnn 17
    """
    import tempfile

    from search import catalogue, listing
    from search import repeat as repeating

    opened, _ = _opened(study, out, storage)
    stored = _stored_options(study, out, storage)
    with tempfile.TemporaryDirectory() as folder, _interruptible(), _view(options) as view:
        file = catalogue.find(study).file
        repeated = repeating.repeat(opened, trial, file, Path(folder), stored, view)
    listing.print_repeated(repeated)
    if not repeated.is_same:
        sys.exit(1)


@cli.command(context_settings=_CONTEXT)
@_study
@_out
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
    from search import catalogue, inference, listing

    entry = catalogue.find(study)
    folder = out or Path("runs") / entry.name
    rows = inference.classify(folder, entry.file, images, model=model, invert=invert)
    listing.print_classified(rows)


@cli.command(context_settings=_CONTEXT)
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
    from search import doctor, listing

    findings = doctor.examine(dataset, out)
    if as_json:
        click.echo(doctor.to_json(findings))
    else:
        listing.print_findings(findings)
    if not doctor.is_well(findings):
        sys.exit(EXIT_USER_ERROR)


def main() -> None:
    """Runs the command line; every error that a user can mend is one line and an exit code."""
    try:
        cli(standalone_mode=False)
    except SearchError as error:
        if error.detail:
            click.echo(error.detail, err=True)
        click.echo(f"fmnist-search: {error}", err=True)
        sys.exit(error.exit_code)
    except click.UsageError as error:
        click.echo(f"fmnist-search: {error.format_message()} (see --help)", err=True)
        sys.exit(EXIT_USAGE)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


def _journey(study: str, out: Path | None, options: dict[str, Any]) -> None:
    from search import catalogue, listing
    from search.journey import run

    folder = out or Path("runs") / catalogue.find(study).name
    final = not options.pop("no_retrain", False)
    with _interruptible(), _view(options) as view:
        outcome = run(study, folder, options, view, final=final)
    listing.print_outcome(outcome, _same_run(study, out, options["storage"]))


def _view(options: dict[str, Any]) -> View:
    from search.progress import View

    return View(options.pop("verbose") - options.pop("quiet"))


@contextmanager
def _interruptible() -> Iterator[None]:
    from search.pool import Interrupted

    try:
        yield
    except Interrupted as error:
        click.echo(
            "fmnist-search: interrupted; nothing is lost, the same command goes on", err=True
        )
        sys.exit(128 + error.number)


def _opened(study: str, out: Path | None, url: str | None) -> tuple[optuna.Study, Path]:
    """The study of a run, read only, and its folder."""
    from search import catalogue, storage

    entry = catalogue.find(study)
    folder = out or Path("runs") / entry.name
    opened = storage.read_study(storage.url_in(folder, url), entry.name)
    if opened is None:
        raise SearchError(
            f"no run of {entry.name!r} in {folder}; start it with: "
            f"fmnist-search {_same_run(study, out, url)}"
        )
    return opened, folder


def _same_run(study: str, out: Path | None, url: str | None) -> str:
    """The options that name a run again."""
    named = {"--study": study, "--out": out, "--storage": url}
    return " ".join(f"{name} {shlex.quote(str(value))}" for name, value in named.items() if value)


def _stored_options(study: str, out: Path | None, url: str | None) -> dict[str, Any]:
    """What the run began with, so that `retrain` need not be told again."""
    opened, _ = _opened(study, out, url)
    run = opened.user_attrs.get("run")
    if run is None:
        return {}
    options = {name: value for name, value in run["fixed"].items() if name != "kind"}
    references = {name: run.get(name) for name in ("dataset", "weights")}
    return options | {name: known["reference"] for name, known in references.items() if known}
