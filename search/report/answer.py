"""The first section: what was found, how good it is, what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import plotly.graph_objects as go

from search.progress import duration
from search.report import page, references, theme
from search.report.course import shown
from search.report.page import Html, label, text
from search.report.source import Run, Winner

_OURS, _BASELINE, _FIELD = "this run", "published baselines", "field's references"
_COLORS = {_OURS: theme.ACCENT, _BASELINE: theme.ORANGE, _FIELD: theme.GREY}
_PARTS = {"train": "train", "val": "validation", "test": "test"}


class Bar(NamedTuple):
    """One system's test accuracy."""

    name: str
    accuracy: float  # fraction
    std: float | None  # over seeds; None for what was published
    group: str


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
            page.pairs((name, shown(value)) for name, value in best["params"].items()),
        ]
    bars_ = bars(run)
    if len(bars_) > 1:
        made.append(
            page.plot("Test accuracy beside others", bars_figure(bars_), _beside(run, bars_),
                      height=60 + 25 * len(bars_))
        )  # fmt: skip
    return made


def bars(run: Run) -> list[Bar]:
    """This run's winners, and what was published of the same data; the best first."""
    made = []
    for winner in run.winners:
        test = winner["test"]
        made.append(
            Bar(name_of(winner, run), test["mean"]["accuracy"], test["std"]["accuracy"], _OURS)
        )
    ensemble = run.metrics["ensemble"] if run.metrics else None
    if ensemble and not run.is_comparison:
        name = f"ensemble of {ensemble['models']} models"
        made.append(Bar(name, ensemble["test"]["accuracy"], None, _OURS))
    if run.dataset and run.dataset["name"] == references.DATASET:
        published = ((references.BASELINES, _BASELINE), (references.FIELD, _FIELD))
        made += [
            Bar(name, accuracy, None, group)
            for of, group in published
            for name, accuracy in of.items()
        ]
    return sorted(made, key=lambda bar: -bar.accuracy)


def bars_figure(bars_: list[Bar]) -> go.Figure:
    """Horizontal bars, named inside, so that a phone's width is enough; the axis begins below the
    worst, which the caption says."""
    figure, start = go.Figure(), axis_start(bars_)
    for group, color in _COLORS.items():
        of = [(place, bar) for place, bar in enumerate(bars_) if bar.group == group]
        if not of:
            continue
        figure.add_bar(
            base=start,
            x=[round(100 * bar.accuracy - start, 3) for _, bar in of],
            y=[place for place, _ in of],
            name=group,
            orientation="h",
            marker={"color": color},
            error_x={
                "type": "data",
                "array": [100 * (bar.std or 0.0) for _, bar in of],
                "visible": any(bar.std for _, bar in of),
                "color": theme.INK,
                "thickness": 1.3,
                "width": 3,
            },
            text=[_named(bar) for _, bar in of],
            textposition="auto",
            insidetextanchor="start",
            constraintext="none",
            insidetextfont={"color": "#ffffff"},
            hovertemplate="%{text} %<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", showgrid=False, showticklabels=False)
    best = 100 * max(bar.accuracy + (bar.std or 0.0) for bar in bars_)
    figure.update_xaxes(range=[start, min(100.5, best + 1)], ticksuffix=" %")
    return theme.styled(figure, legend=True, bargap=0.28)


def axis_start(bars_: list[Bar]) -> float:
    """Where the axis of a bar chart begins, in percent: a multiple of 10 below all bars."""
    return max(0.0, 10 * ((100 * min(bar.accuracy for bar in bars_) - 2) // 10))


def name_of(winner: Winner, run: Run) -> str:
    """A point of a comparison by its value, with what it began from; else the trial."""
    if not run.is_comparison:
        return f"{run.name}, trial {winner['trial']}"
    params = winner["params"]
    name = ", ".join(
        shown(value) if len(params) == 1 else f"{key}={shown(value)}"
        for key, value in params.items()
    )
    return f"{name} ({winner['weights']})" if winner["weights"] else name


def _named(bar: Bar) -> str:
    if bar.group == _OURS:
        return f"<b>{100 * bar.accuracy:.2f}  {label(bar.name)}</b>"
    published = ", published" if bar.group == _BASELINE else ""
    return f"{100 * bar.accuracy:.1f}  {label(bar.name)}{published}"


def _without_metrics(run: Run) -> list[Html]:
    made = []
    if run.complete:
        best = run.complete[0]
        remark = f"of trial {best.number}, so far the best"
        is_share = run.kind != "objective"
        made.append(_big(best.value or 0.0, run.value_name, remark, as_share=is_share))
    words = (
        "This study has an objective of its own: there is no model to retrain and no test accuracy."
        if run.kind == "objective"
        else "The winners have not been retrained yet: there is no test accuracy. "
        "What is shown is the state of the search when this page was written."
    )
    made += [page.note(words), page.tiles(_costs(run))]
    if run.complete:
        best = run.complete[0]
        made += [
            page.heading("The best configuration so far", f"Trial {best.number}."),
            page.pairs((name, shown(value)) for name, value in best.params.items()),
        ]
    return made


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
    known = "" if validation is None else f". Validation accuracy {100 * validation:.2f} %"
    what = "test accuracy"
    if run.is_comparison:
        what += f" of {name_of(winner, run)}, the best on validation data"
    return [_big(test["mean"]["accuracy"], what, spread + known)]


def _big(value: float, what: str, remark: str, *, as_share: bool = True) -> Html:
    number = f"{100 * value:.2f}<small> %</small>" if as_share else text(shown(float(value)))
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
    random = [name_of(w, run) for w in run.winners if w["weights"] == "random weights"]
    if random:
        yield page.note(
            f"{', '.join(random)}: from random weights, where the published model begins from "
            "pretrained ones. The figures are not those of the published method.", warns=True
        )  # fmt: skip
    for winner in run.winners:
        if winner["diverged"]:
            yield page.note(
                f"{name_of(winner, run)}: {len(winner['diverged'])} of its trainings diverged and "
                "are not among the figures.", warns=True
            )  # fmt: skip


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
    yield name, duration(seconds), f"{trainings} trainings added up, {epochs:,.1f} epochs"
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


def _beside(run: Run, bars_: list[Bar]) -> str:
    words = [f"Percent of the test images; the axis begins at {axis_start(bars_):.0f} %."]
    if any(bar.std for bar in bars_):
        words.append("Whiskers: standard deviation over seeds.")
    if any(bar.group == _FIELD for bar in bars_):
        words.append(f"References: {references.SOURCE}, as published there, not measured here.")
    return " ".join(words)


def _compared(run: Run) -> list[Html]:
    """All points, and each published figure beside ours."""
    rows = []
    published = []
    for winner in run.winners:
        name = name_of(winner, run)
        here = {part: winner[part] for part in _PARTS.values()}
        accuracies = (_spread(here[part], "accuracy") for part in _PARTS.values())
        rows.append((name, *accuracies, len(winner["seeds"]), f"{winner['epochs']:.1f}",
                     f"{winner['parameters']:,}"))  # fmt: skip
        for figure, there in winner["published"].items():
            short, _, what = figure.partition("_")
            ours = here[_PARTS[short]]
            difference = ours["mean"][what] - there
            published.append((name, f"{_PARTS[short]} {what}", f"{there:.4f}",
                              _spread(ours, what), f"{difference:+.4f}"))  # fmt: skip
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


def _spread(of: Any, figure: str) -> str:
    return f"{of['mean'][figure]:.4f} ± {of['std'][figure]:.4f}"
