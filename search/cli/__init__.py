"""The command line. Keras is imported by workers only, and nothing heavy before it is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from search.cli import again, look, options, runs
from search.errors import EXIT_USAGE, SearchError
from studies.study import PRUNERS, SAMPLERS


@click.group(invoke_without_command=True, context_settings=options.CONTEXT)
@click.version_option(package_name="fmnist-search")
@click.option("--study", metavar="NAME|FILE.py", help="Which study; `studies` lists them.")
@click.option(
    "--trials",
    type=click.IntRange(1, 1_000_000),
    help="Finished trials in all, not more of them.  [default: the study's]",
)
@click.option(
    "--epochs", type=options.Epochs(), help="Of a trial that is not pruned.  [default: the study's]"
)
@click.option(
    "--dataset",
    metavar="NAME|FILE.npz|DIR",
    help="fashion_mnist, mnist, cifar10 or digits; a file of x_train, y_train, x_test, y_test; "
    "a folder of train/CLASS/*.png and test/CLASS/*.png.  [default: the study's]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    help="Of draws, weights and the order of images.  [default: 0]",
)
@options.out
@click.option("--time-budget", type=options.Duration(), help="Of the search, such as 90m.")
@click.option(
    "--trial-timeout", type=options.Duration(), help="Of one attempt at a trial, such as 20m."
)
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    help="Which point next: learnt from the others (TPE), at random, or spread evenly (a "
    "quasi-random sequence).  [default: the study's]",
)
@click.option(
    "--pruner",
    type=click.Choice(PRUNERS),
    help="Which trials end early: those not among the best share at a report (successive halving), "
    "those worse than the median, or none.  [default: the study's]",
)
@options.storage
@click.option("--no-retrain", is_flag=True, help="Search only.")
@options.running
@click.pass_context
def cli(ctx: click.Context, study: str | None, out: Path | None, **values: Any) -> None:
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
    runs.journey(study, out, values)


for command in (
    *(look.studies, look.show, look.report, look.dashboard, look.export, look.predict),
    *(again.retrain, again.train, again.repeat, again.repair, again.move, look.doctor),
):
    cli.add_command(command)


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
