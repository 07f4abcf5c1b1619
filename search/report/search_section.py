"""The second section: how the search went, and where in its space the good points are."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.report import course, page, source, space, timeline
from search.report.page import Html
from search.report.source import Run
from search.results import short

logger = logging.getLogger("search")


def parts(run: Run) -> list[Html]:
    if not run.trials:
        return [page.note("No trial has been started yet.")]
    return [*_warnings(run), *_course(run), *_space(run)]


def _warnings(run: Run) -> list[Html]:
    """Where the best value lies at an edge, and what went wrong."""
    made = []
    edges = space.at_edges(run.complete[0]) if run.complete else []
    if edges:
        named = "; ".join(
            f"{edge.name} is {short(edge.value)}, {edge.where} {edge.of}" for edge in edges
        )
        made.append(
            page.note(
                f"The best value lies at an edge of its range: {named}. A wider range may hold a "
                "better one.",
                warns=True,
            )
        )
    failed = [trial for trial in run.trials if trial.user_attrs.get("reason")]
    failed = [t for t in failed if not t.user_attrs["reason"].startswith("pruned:")]
    if failed:
        rows = [
            (f"trial {trial.number}", str(trial.user_attrs["reason"])[:300])
            for trial in failed[:50]
        ]
        left = f" The first 50 of {len(failed)}." if len(failed) > 50 else ""
        made.append(
            page.folded(
                f"Trials that ended without a value, and not by pruning: {len(failed)}",
                [page.table(("trial", "why"), rows), page.paragraph(left)],
            )
        )
    return made


def _course(run: Run) -> list[Html]:
    figures = []
    if run.complete:
        figures.append(
            _plotted(
                "Best so far, by trials",
                lambda: course.history_figure(course.reached_by_trial(run.trials), run.value_name),
                "Line: the best complete trial so far. Dots: complete trials; circles: the best "
                "reports of pruned ones. Those far below the line are not shown: double-click "
                "shows all.",
                height=300,
            )
        )
    timed = course.reached_by_time(run.trials)
    if any(one.is_complete for one in timed):
        figures.append(
            _plotted(
                "Best so far, by time",
                lambda: course.hours_figure(timed, run.seconds / 3600, run.value_name),
                "The same against the time in which trials ran.",
                height=300,
            )
        )
    made = [page.columns(figures)] if figures else []
    if reported := sum(bool(trial.intermediate_values) for trial in run.trials):
        made.append(
            _plotted(
                "Learning curves",
                lambda: course.curves_figure(course.curves(run), run),
                "Red: the best trial. Blue: trials that ran to their end. Grey: pruned, failed or "
                "still running. Pointing at a curve names its params."
                + source.left_out(reported, course.MOST_CURVES, "curves"),
                height=420,
            )
        )
    if attempts := timeline.attempts(run.trials):
        lanes = len({attempt.lane for attempt in attempts})
        ends = ("died", "interrupted", "running")
        died, cut, running = (sum(a.end == end for a in attempts) for end in ends)
        made.append(
            _plotted(
                "What the workers did",
                lambda: timeline.timeline_figure(attempts),
                f"{len(attempts):,} attempts, at most {timeline.most_at_once(attempts)} at a time; "
                f"{died} died with their worker, {cut} were cut off as the search itself ended, "
                f"{running} had not ended when this page was written. Times without any are left "
                "out.",
                height=140 + 34 * lanes,
            )
        )
    return made


def _space(run: Run) -> list[Html]:
    trials, report = space.compared(run.trials)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) < 2:
        return [page.note("Fewer than two trials have a value: no params can be compared yet.")]
    study = space.snapshot(trials)
    ranked = _importances(study)
    params = space.chosen_params(study, list(ranked))
    if not params:
        return [page.note("No hyperparameter differs between the trials that can be compared.")]
    said, made = [], []
    value_name, who = run.value_name, "trials that were not pruned"
    if report is not None:
        value_name = f"best {value_name} until report {report}"
        who = f"the {len(complete):,} trials that came to report {report}"
        said.append(
            page.note(
                f"Most trials were pruned. So that they can be compared, {who} stand here with "
                f"their {value_name}."
            )
        )
    if ranked:
        made.append(
            _plotted(
                "Importances",
                lambda: space.importances_figure(ranked),
                "How much of the difference between good trials and others goes with each "
                f"hyperparameter (PED-ANOVA), over {who}. Of conditional ones, over those "
                "that have them.",
                height=60 + 26 * min(12, len(ranked)),
            )
        )
    else:
        made.append(
            page.note(
                f"Importances need {space.LEAST_COMPLETE} trials that differ; there are "
                f"{len(complete)}."
            )
        )
    drawn = study
    if len(complete) > space.MOST_DRAWN:
        drawn = space.snapshot(trials, space.MOST_DRAWN)
    left_out = source.left_out(len(complete), space.MOST_DRAWN, "trials")
    two = space.pair(drawn, list(ranked))
    if len(two) == 2:
        made.append(
            _plotted(
                "The two most important together",
                lambda: space.contour_figure(drawn, two, value_name),
                f"Colour: {value_name}, interpolated between the trials (dots) that have both."
                + left_out,
                height=360,
            )
        )
    made = [*said, page.columns(made)]
    made.append(
        _plotted(
            "Parallel coordinates",
            lambda: space.parallel_figure(drawn, params, run.value_name.rpartition(" ")[2]),
            f"A line is a trial, the stronger the better. {_chosen(complete, params)}" + left_out,
            height=380,
            least_width=110 * (len(params) + 1),
        )
    )
    sliced = list(ranked)[: space.MOST_PARAMS] or params
    order = ", the most important first" if ranked else ""
    caption = f"Each hyperparameter against {value_name}{order}."
    made.append(page.heading("Slices", caption + left_out))
    slices = [
        _plotted(
            html.unescape(name),  # the snapshot's names are escaped
            lambda name=name: space.slice_figure(drawn, name, value_name),
            height=220,
        )
        for name in sliced
    ]
    return [*made, page.columns(slices, narrow=True)]


def _importances(study: optuna.Study) -> dict[str, float]:
    try:
        return space.importances(study)
    except Exception as error:  # Optuna's own: the page does without
        logger.debug("importances: %s", error)
        return {}


def _plotted(
    title: str, draw: Callable, caption: str = "", *, height: int, least_width: int = 0
) -> Html:
    """A figure; or a sentence where it can't be drawn, which must not cost the other figures."""
    why = "the trials there are don't span it"
    try:
        figure = draw()
    except Exception as error:
        logger.debug("figure %r", title, exc_info=True)
        figure, why = None, f"{type(error).__name__}: {error}"
    if figure is None:
        return page.note(f"{title}: can't be drawn ({why}).")
    return page.plot(title, figure, caption, height=height, least_width=least_width)


def _chosen(complete: Sequence[FrozenTrial], params: list[str]) -> str:
    names = {name for trial in complete for name in trial.params}
    if len(names) <= len(params):
        return "All hyperparameters."
    return (
        f"{len(params)} of {len(names)} hyperparameters: those that differ, that most trials have, "
        "and that matter most. None: a trial without it."
    )
