"""The first section: what was found, how good it is, what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optuna.trial import FrozenTrial

from search import results
from search.data.weights import RANDOM
from search.report import bars, page
from search.report.bars import name_of
from search.report.page import Html, text
from search.report.source import Run
from search.results import duration, short, spread

_NOT_MEASURED = (
    "No model has been measured on the test set. What is shown was there when this page was "
    "written."
)
_NO_MODEL = (
    "This study has an objective of its own: there is no model to retrain and no test accuracy."
)


def parts(run: Run) -> list[Html]:
    if run.metrics is None:
        return _without_metrics(run)
    made = [*_hero(run), *_remarks(run), page.tiles(_costs(run))]
    if run.is_comparison:
        made += _compared(run)
    else:
        best = run.winners[0]
        made += [
            page.heading("The best configuration", f"Trial {best['trial']}."),
            page.pairs((name, short(value)) for name, value in best["params"].items()),
        ]
    bars_ = bars.bars(run)
    if len(bars_) > 1:
        made.append(
            page.plot("Test accuracy beside others", bars.bars_figure(bars_), bars.caption(bars_),
                      height=60 + 25 * len(bars_))
        )  # fmt: skip
    return made


def _without_metrics(run: Run) -> list[Html]:
    made = []
    best = run.complete[0] if run.complete else None
    if best:
        label = results.begun_from(run.started, best.number, best.user_attrs)
        begun_from = f", begun from {label}" if label else ""
        remark = f"of trial {best.number}, so far the best{begun_from}"
        is_share = run.value_name == results.ACCURACY
        made.append(_big(best.value or 0.0, run.value_name, remark, as_share=is_share))
    made += [
        page.note(_NO_MODEL if run.kind == "objective" else _NOT_MEASURED),
        page.tiles(_costs(run)),
    ]
    if best and run.is_comparison:
        rows = [
            (
                _named(results.point_name(trial.params), run, trial),
                f"{trial.value:.4f}",
                trial.user_attrs.get("seeds", ""),
            )
            for trial in run.complete
        ]
        made += [
            page.heading("Points so far"),
            page.table(("", run.value_name, "seeds"), rows),
        ]
    elif best:
        made += [
            page.heading("The best configuration so far", f"Trial {best.number}."),
            page.pairs((name, short(value)) for name, value in best.params.items()),
        ]
    return made


def _named(name: str, run: Run, trial: FrozenTrial) -> str:
    label = results.begun_from(run.started, trial.number, trial.user_attrs)
    return f"{name} ({label})" if label else name


def _hero(run: Run) -> list[Html]:
    winner = run.winners[0]
    test, num_seeds = winner["test"], len(winner["seeds"])
    spread = (
        f"± {100 * test['std']['accuracy']:.2f} points: mean and standard deviation over "
        f"{num_seeds} seeds"
        if num_seeds > 1
        else "of one seed: its spread is not known"
    )
    validation = winner["validation_accuracy"]
    known = ""
    if validation is not None:
        is_share = run.value_name == results.ACCURACY
        reached = f"{100 * validation:.2f} %" if is_share else short(validation)
        known = f". {run.value_name.capitalize()} {reached}"
    what = "test accuracy"
    if run.is_comparison:
        what += f" of {name_of(winner, run)}, the best on validation data"
    remark = f"{spread}; {results.of_test_images(winner)}{known}"
    return [_big(test["mean"]["accuracy"], what, remark)]


def _big(value: float, what: str, remark: str, *, as_share: bool = True) -> Html:
    number = f"{100 * value:.2f}<small> %</small>" if as_share else text(short(float(value)))
    return Html(
        f'<div class="hero"><b>{number}</b><span><strong>{text(what)}</strong>{text(remark)}</span>'
        "</div>"
    )


def _remarks(run: Run) -> Iterable[Html]:
    assert run.metrics is not None
    measured, finished = run.metrics["search"]["trials"], len(run.finished)
    if measured != finished:
        yield page.note(
            f"The search has gone on since the winners were retrained: {finished} trials are "
            f"finished, the winners are those of {measured}.", warns=True
        )  # fmt: skip
    random = [name_of(w, run) for w in run.winners if w["weights"] == RANDOM]
    if random:
        published = (
            ", where the published model begins from pretrained ones. The figures are not those of "
            "the published method"
        )
        yield page.note(
            f"{', '.join(random)}: from random weights{published if run.is_comparison else ''}.",
            warns=True,
        )
    for line in results.remarks(run.metrics):
        yield page.note(f"{line[0].upper()}{line[1:]}.", warns=True)


def _costs(run: Run) -> Iterable[tuple[str, Any, Any]]:
    states = [trial.state.name.lower() for trial in run.finished]
    if not run.is_comparison:
        counts = ((states.count(state), state) for state in ("complete", "pruned", "fail"))
        remark = ", ".join(f"{count} {state}" for count, state in counts if count)
        yield "trials", f"{len(run.finished):,}", remark.replace("fail", "failed")
        remark = "" if run.epochs_per_report is None else f"{_searched_epochs(run):,.1f} epochs"
        yield "search took", duration(run.seconds), remark
        if run.kind == "space":
            yield (
                "saved by pruning",
                f"{run.saved_share:.0%}",
                "of the epochs that it would have been",
            )
    if run.metrics is None:
        return
    seconds = sum(winner["seconds"] * len(winner["seeds"]) for winner in run.winners)
    epochs = sum(winner["epochs"] * len(winner["seeds"]) for winner in run.winners)
    trainings = sum(len(winner["seeds"]) for winner in run.winners)
    name = "training took" if run.is_comparison else "retraining took"
    added_up = f"{trainings} trainings added up" if trainings > 1 else "1 training"
    yield name, duration(seconds), f"{added_up}, {epochs:,.1f} epochs"
    best = run.winners[0]
    yield "parameters", f"{best['parameters']:,}", f"{best['flops'] / 1e6:,.1f} Mflop an image"
    if ensemble := run.metrics["ensemble"]:
        accuracy = 100 * ensemble["test"]["accuracy"]
        yield "ensemble", f"{accuracy:.2f} %", f"of {ensemble['models']} models, test accuracy"
    if best["weights"]:
        yield "begun from", best["weights"], ""


def _searched_epochs(run: Run) -> float:
    reports = sum(trial.last_step or 0 for trial in run.trials)
    return reports * (run.epochs_per_report or 0.0)


def _compared(run: Run) -> list[Html]:
    """All points, and each published figure beside ours."""
    rows = []
    published = []
    for winner in run.winners:
        name = name_of(winner, run)
        num_seeds = len(winner["seeds"])
        accuracies = (
            spread(winner.get(part), "accuracy", num_seeds) for part in results.PARTS.values()
        )
        rows.append((name, *accuracies, num_seeds, f"{winner['epochs']:.1f}",
                     f"{winner['parameters']:,}"))  # fmt: skip
        published += [(name, *row) for row in results.published(winner)]
    made = [
        page.heading("All points", "Accuracy, mean ± standard deviation over the seeds."),
        page.table(("", "train", "validation", "test", "seeds", "epochs", "parameters"), rows),
    ]
    if published:
        made += [
            page.heading("Beside what was published", "Fractions; losses in nats."),
            page.table(("", "figure", "published", "here", "difference"), published),
        ]
    return made
