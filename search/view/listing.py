"""Tables on the terminal: studies, leaderboard, what a run has come to."""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from search import results, run_record
from search.errors import EXIT_DAMAGED, EXIT_STORAGE_LOST, SearchError
from search.storage import storage
from search.view import textplot

if TYPE_CHECKING:
    from search.catalogue import Entry
    from search.doctor import Finding
    from search.journey import Outcome
    from search.winners.inference import Classified
    from search.winners.repeat import Repeated

# Into a file or a pipe, a table is as wide as it needs to be.
_console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 1000)
# Of a report: the value that is pruned by, and that of the training images.
_CURVES = {"value": "validation", "accuracy": "training"}
_COUNTS = ("parameters", "flops", "memory", "cached")
_FIGURES = ("accuracy", "loss", "precision", "recall", "f1", "roc_auc")


def print_studies(entries: list[Entry], runs: Path) -> None:
    """The known studies, then other runs: of a file of the user's, or in folders of other names."""
    table = _table("study", "question", "run")
    found = {(entry.name, runs / entry.name): entry.summary for entry in entries}
    for file in sorted(runs.glob("*/study.db")):
        for name in _names_in(file.parent):
            found.setdefault((name, file.parent), "")
    for (name, folder), summary in found.items():
        where = "" if folder.name == name else f", in {folder}"
        table.add_row(escape(name), escape(summary), escape(_run_of(folder, name) + where))
    _console.print(table)


def print_leaderboard(study: optuna.Study, folder: Path, top: int) -> None:
    rows = results.rows(study)
    params = _varying([row.params for row in rows])
    table = _table("trial", "state", "value", "reports", "seconds", "attempts")
    table.expand = _console.is_terminal
    table.add_column("why", no_wrap=True, ratio=1)
    table.add_column("params", no_wrap=True, ratio=2)
    for row in rows[:top]:
        value = row.value if row.value is not None else row.last_value
        table.add_row(
            str(row.number),
            row.state,
            results.decimal(value),
            str(row.reports),
            "" if row.seconds is None else f"{row.seconds:.0f}",
            str(row.attempts),
            escape(row.reason),
            escape(
                ", ".join(f"{k}={results.short(v)}" for k, v in row.params.items() if k in params)
            ),
        )
    _console.print(table)
    if any(row.value is None and row.last_value is not None for row in rows[:top]):
        _say("of a trial that is not complete the value is its last report's")
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    weights = {row.weights for row in rows if row.weights}
    begun_from = f"; begun from {', '.join(sorted(weights))}" if weights else ""
    _say(f"{len(rows)} trials in {folder}: {counts}{begun_from}")


def print_trial(study: optuna.Study, trial: dict[str, Any]) -> None:
    """One trial in full, as `results.detail` gives it."""
    of = study.user_attrs.get("run", {}).get("num_reports")
    line = f"[bold]trial {trial['number']}[/bold] of {escape(study.study_name)}: {trial['state']}"
    if trial["value"] is not None:
        line += f", [bold]{results.decimal(trial['value'])}[/bold]"
    line += f", {len(trial['reports'])}{f' of {of}' if of else ''} reports"
    line += f", from {escape(trial['weights'])}" if trial["weights"] else ""
    _console.print(line + (", a known point" if trial["known_point"] else ""))
    if trial["reason"]:
        _console.print(Text(trial["reason"]))
    _print_pairs("params", trial["params"])
    _print_pairs("figures", trial["figures"])
    if trial["attempts"]:
        _console.print()
        _console.print(_attempts(trial["attempts"]))
    series = {name: [report.get(name) for report in trial["reports"]] for name in _CURVES}
    names = {name: label for name, label in _CURVES.items() if any(series[name])}
    steps = [report["report"] for report in trial["reports"]]
    shown = {label: series[name] for name, label in names.items()}
    if plot := textplot.curves(shown, steps, width=min(_console.width, 80)):
        _console.print("\nlearning curve", style="bold")
        for row in plot:
            _console.print(Text(row), no_wrap=True)
    if trial["retrained"]:
        _console.print("\nretrained", style="bold")
    for stem, record in trial["retrained"].items():
        said = record.get("diverged") or f"{record.get('trained_epochs', 0):.1f} epochs"
        _console.print(Text(f"{stem}: {said} {record.get('model', '')}"))
    for name in ("traceback", "stderr"):
        if trial[name]:
            _console.print(f"\n{name}", style="bold")
            _console.print(Text(trial[name]))


def to_json(content: Any) -> str:
    """Strict JSON: what is not finite, such as the loss of a trial that diverged, is null."""
    return json.dumps(_finite(content), indent=2)


def print_outcome(outcome: Outcome, same_run: str, same_folder: str) -> None:
    """What has been reached, and the commands that go on from there.

    Args:
        same_run: their options.
        same_folder: the options of one that needs no study, but the run's folder.
    """
    settings = outcome.settings
    what = "points compared" if settings.kind == "comparison" else "trials finished"
    _console.print(
        f"\n[bold]{settings.name}[/bold]: {outcome.num_finished} of "
        f"{max(settings.trials, outcome.num_finished)} {what}"
    )
    if outcome.best and not outcome.metrics:
        best = outcome.best
        begun_from = f", begun from {best.weights}" if best.weights else ""
        _say(f"best: trial {best.number} with {results.decimal(best.value)}{begun_from}")
    if outcome.metrics and settings.kind == "comparison":
        _print_compared(outcome.metrics)
    elif outcome.metrics:
        _print_winners(outcome.metrics)
    report = outcome.folder / "report.html"
    if report.is_file():
        _say(f"report: {report}")
    _console.print("Next:", style="bold")
    for command in (
        f"fmnist-search show {same_run}",
        f"fmnist-search export {same_run}",
        *([f"fmnist-search predict {same_folder} IMAGE.png"] if outcome.metrics else []),
        f"fmnist-search dashboard {same_run}",
    ):
        _say(f"  {command}")


def print_reproduced(figures: dict[str, Any], folder: Path) -> None:
    """The figures of `train` beside those of the config."""
    config, (winner,) = figures["config"], figures["winners"]
    table = _table("", "now", "config", "difference")
    for name in _FIGURES:
        table.add_row(
            f"test {name}",
            results.spread(winner["test"], name, len(winner["seeds"])),
            results.spread(config["test"], name, len(config["training"]["seeds"])),
            f"{winner['test']['mean'][name] - config['test']['mean'][name]:+.4f}",
        )
    table.add_row("seeds", str(len(winner["seeds"])), str(len(config["training"]["seeds"])), "")
    _console.print(table)
    for line in results.remarks(figures):
        _say(line)
    _say(f"models and metrics.json in {folder}")


def print_repeated(repeated: Repeated) -> None:
    """Both curves, and whether they are the same."""
    table = _table("report", "stored", "now", "difference")
    for step in sorted(repeated.stored.keys() | repeated.now.keys()):
        stored, now = repeated.stored.get(step), repeated.now.get(step)
        both = stored is not None and now is not None
        table.add_row(
            str(step),
            results.decimal(stored),
            results.decimal(now),
            f"{now - stored:+.4f}" if both else "",  # type: ignore[operator]
        )
    _console.print(table)
    outcome = f"{repeated.outcome}{f' ({repeated.reason})' if repeated.reason else ''}"
    what = "curve" if repeated.stored or repeated.now else "value"
    same = f"the same {what}" if repeated.is_same else f"another {what}"
    difference = results.decimal(repeated.difference)
    ended = f", stored: {repeated.ended}" if repeated.ended not in ("", repeated.outcome) else ""
    _say(f"trial {repeated.number}: {same}, largest difference {difference}; {outcome}{ended}")


def print_classified(rows: list[Classified]) -> None:
    table = _table("image", "class", "confidence", "else")
    for row in rows:
        (name, confidence), *others = row.classes[:3]
        rest = ", ".join(f"{other} {share:.1%}" for other, share in others)
        image = row.image.encode(errors="replace").decode()  # a name may be no UTF-8
        table.add_row(escape(image), escape(name), f"{confidence:.1%}", escape(rest))
    _console.print(table)


def print_findings(findings: list[Finding]) -> None:
    """What `doctor` found, each with its fix below."""
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        fix = f"\n-> {finding.fix}" if finding.fix else ""
        state = Text(finding.state, styles[finding.state])
        table.add_row(state, Text(finding.subject), Text(finding.what + fix))
    _console.print(table)
    states = [finding.state for finding in findings]
    counts = {"problem": states.count("problem"), "warning": states.count("warning")}
    told = [f"{count} {state}{'s' * (count > 1)}" for state, count in counts.items() if count]
    _console.print(", ".join(told) or "All is well.")


def _print_winners(figures: dict[str, Any]) -> None:
    search = figures["search"]
    _console.print(
        f"{search['complete']} complete, {search['pruned']} pruned, {search['fail']} failed in "
        f"{results.duration(search['seconds'])}; {search['saved_share']:.0%} of the epochs saved "
        "by pruning"
    )
    winners = figures["winners"]
    table = _table("", *(f"trial {winner['trial']}" for winner in winners))
    name = search.get("value_name", results.ACCURACY)
    table.add_row(name, *(results.decimal(w["validation_accuracy"]) for w in winners))
    for name in _FIGURES:
        figures_ = (results.spread(w["test"], name, len(w["seeds"])) for w in winners)
        table.add_row(f"test {name}", *figures_)
    table.add_row("seeds", *(str(len(winner["seeds"])) for winner in winners))
    table.add_row("epochs", *(f"{winner['epochs']:g}" for winner in winners))
    table.add_row("parameters", *(f"{winner['parameters']:,}" for winner in winners))
    if any(winner["weights"] for winner in winners):
        table.add_row("begun from", *(escape(winner["weights"] or "") for winner in winners))
    _console.print(table)
    _say(f"test accuracy: {results.of_test_images(winners[0])}")
    if ensemble := figures["ensemble"]:
        _console.print(
            f"ensemble of {ensemble['models']} models: test accuracy "
            f"{ensemble['test']['accuracy']:.4f}, loss {ensemble['test']['loss']:.4f}"
        )
    for line in results.remarks(figures):
        _say(line)


def _print_compared(figures: dict[str, Any]) -> None:
    """All points, the best on the validation part first; then each published figure beside ours."""
    winners = figures["winners"]
    table = _table("", "train", "validation", "test accuracy", "seeds", "epochs", "parameters")
    published = _table("published", "figure", "there", "here", "difference")
    for winner in winners:
        name = results.point_name(winner["params"])
        label = f"{name} ({winner['weights']})" if winner["weights"] else name
        num_seeds = len(winner["seeds"])
        parts = (winner.get(part) for part in results.PARTS.values())
        table.add_row(
            escape(label),
            *(results.spread(part, "accuracy", num_seeds) for part in parts),
            str(num_seeds),
            f"{winner['epochs']:.1f}",
            f"{winner['parameters']:,}",
        )
        for row in results.published(winner):
            published.add_row(escape(name), *row)
    _console.print(table)
    if published.rows:
        _console.print(published)
    for line in results.remarks(figures):
        _say(line)
    seconds = results.duration(figures["search"]["seconds"])
    _console.print(f"trained in {seconds}, all trainings added up")


def _print_pairs(heading: str, pairs: dict[str, Any]) -> None:
    if not pairs:
        return
    _console.print(f"\n{heading}", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, value in pairs.items():
        shown = f"{value:,}" if isinstance(value, int) and name in _COUNTS else results.short(value)
        table.add_row(Text(name), Text(shown))
    _console.print(table)


def _attempts(attempts: list[dict[str, Any]]) -> Table:
    table = _table("attempt", "host", "device", "process", "began", "ended", "how")
    for number, attempt in enumerate(attempts, 1):
        how = filter(None, [attempt.get("reason", "not ended yet"), _first(attempt.get("detail"))])
        table.add_row(
            str(number),
            *(escape(str(attempt.get(name, ""))) for name in ("host", "device", "process")),
            *(_clock(attempt.get(name)) for name in ("start", "end")),
            escape(" ".join(how)),
        )
    return table


def _say(line: str) -> None:
    """A line in which nothing is markup, and nothing is cut: paths, commands, reasons."""
    _console.print(line, markup=False, soft_wrap=True)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _first(text: str | None) -> str:
    return f"({text.splitlines()[0]})" if text else ""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value


def _names_in(folder: Path) -> list[str]:
    """Of a run folder's studies; its own name where they can't be read."""
    try:
        return storage.at(storage.url_in(folder, None)).names() or [folder.name]
    except SearchError:
        return [folder.name]


def _run_of(folder: Path, name: str) -> str:
    try:
        study = storage.read_study(storage.url_in(folder, None), name)
    except SearchError as error:
        how = {EXIT_DAMAGED: "damaged", EXIT_STORAGE_LOST: "can't be read"}
        return how.get(error.exit_code, "elsewhere")
    if study is None:
        return ""
    if not run_record.is_readable(study):
        return "of another version"
    trials = study.get_trials(deepcopy=False)
    best = results.winners(study, 1)
    finished = sum(trial.state.is_finished() for trial in trials)
    return f"{finished} trials" + (f", best {results.decimal(best[0].value)}" if best else "")


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _varying(all_params: list[dict[str, Any]]) -> set[str]:
    """The hyperparameters that are not the same in every trial."""
    names = {name for params in all_params for name in params}
    return {n for n in names if len({str(params.get(n)) for params in all_params}) > 1}
