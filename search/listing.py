"""Tables on the terminal: studies, leaderboard, what a run has come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from rich.console import Console
from rich.table import Table

from search import results, storage
from search.catalogue import Entry
from search.progress import duration
from search.run import Outcome

_console = Console(highlight=False)
_FIGURES = ("accuracy", "loss", "precision", "recall", "f1", "roc_auc")


def print_studies(entries: list[Entry], runs: Path) -> None:
    table = _table("study", "question", "run")
    for entry in entries:
        table.add_row(entry.name, entry.summary, _run_of(runs / entry.name, entry.name))
    _console.print(table)


def print_leaderboard(study: optuna.Study, folder: Path, top: int) -> None:
    rows = results.rows(study)
    params = _varying([row.params for row in rows])
    table = _table("trial", "state", "value", "reports", "seconds", "why", "params")
    for row in rows[:top]:
        value = row.value if row.value is not None else row.last_value
        table.add_row(
            str(row.number),
            row.state,
            "" if value is None else f"{value:.4f}",
            str(row.reports),
            "" if row.seconds is None else f"{row.seconds:.0f}",
            row.reason,
            ", ".join(f"{k}={_short(v)}" for k, v in row.params.items() if k in params),
        )
    _console.print(table)
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    _console.print(f"{len(rows)} trials in {folder}: {counts}")


def print_outcome(study: str, outcome: Outcome) -> None:
    folder, settings = outcome.folder, outcome.settings
    _console.print(
        f"\n[bold]{settings.name}[/bold]: {outcome.num_finished} of {settings.trials} trials "
        "finished"
    )
    if outcome.metrics:
        _print_winners(outcome.metrics)
    option = "" if folder == Path("runs") / settings.name else f" --out {folder}"
    _console.print("Next:", style="bold")
    for command in (
        f"fmnist-search show --study {study}{option}",
        f"fmnist-search export --study {study}{option}",
        f"optuna-dashboard {outcome.url}",
    ):
        _console.print(f"  {command}", soft_wrap=True)


def _print_winners(figures: dict[str, Any]) -> None:
    search = figures["search"]
    _console.print(
        f"{search['complete']} complete, {search['pruned']} pruned, {search['fail']} failed in "
        f"{duration(search['seconds'])}; {search['saved_share']:.0%} of the epochs saved by pruning"
    )
    table = _table("winner", "validation", *(f"test {name}" for name in _FIGURES), "seeds")
    for winner in figures["winners"]:
        mean, std = winner["test"]["mean"], winner["test"]["std"]
        table.add_row(
            f"trial {winner['trial']}",
            f"{winner['validation_accuracy']:.4f}",
            *(f"{mean[name]:.4f} ± {std[name]:.4f}" for name in _FIGURES),
            str(len(winner["seeds"])),
        )
    _console.print(table)


def _run_of(folder: Path, name: str) -> str:
    study = storage.read_study(storage.url_in(folder, None), name)
    if study is None:
        return ""
    trials = study.get_trials(deepcopy=False)
    best = results.winners(study, 1)
    finished = sum(trial.state.is_finished() for trial in trials)
    return f"{finished} trials" + (f", best {best[0].value:.4f}" if best else "")


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _varying(all_params: list[dict[str, Any]]) -> set[str]:
    """The hyperparameters that are not the same in every trial."""
    names = {name for params in all_params for name in params}
    return {n for n in names if len({str(params.get(n)) for params in all_params}) > 1}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
