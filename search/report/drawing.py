"""A run drawn at its end: what can't be drawn costs the run nothing but that picture."""

from __future__ import annotations

import logging
from pathlib import Path

import optuna

from search import signals
from search.errors import Interrupted, SearchError
from search.report import source

logger = logging.getLogger("search")


def draw(study: optuna.Study, folder: Path, question: str, seconds: float | None = None) -> None:
    """Write the report of the run in a folder.

    Args:
        question: the first line of the study's file.
        seconds: that it may take; None for as long as it needs.

    Raises:
        Interrupted: at a signal, at once.
    """
    path = folder / source.NAME
    if seconds is not None:
        logger.info("drawing %s, %.0f s at most; Ctrl-C ends that, too", path, seconds)
    try:
        with signals.interruptible(seconds):
            from search.report import report  # plotly is only imported where it draws

            report.write(study, folder, path, question)
    except TimeoutError:
        logger.info("%s takes longer than that: the command `report` draws what there is", path)
    except Interrupted:
        raise
    except Exception as error:
        logger.warning("%s could not be written: %s", path, error)
        logger.debug("the report failed", exc_info=True)


def is_drawn(study: optuna.Study, folder: Path, question: str) -> bool:
    """Whether there is a report, which shows the run as it is."""
    try:
        now = source.read(study, folder, question)
    except SearchError:  # said when it is drawn
        return False
    return source.mark_of(folder / source.NAME) == now.mark


def plots(study: optuna.Study, folder: Path) -> dict[str, str]:
    """The winners' figures for the dashboard; none where they can't be drawn."""
    from search.report import dashboard_plots

    try:
        return dashboard_plots.of(source.read(study, folder))
    except Exception as error:
        logger.warning("the dashboard lacks the winners' figures: %s", error)
        logger.debug("the figures failed", exc_info=True)
        return {}
