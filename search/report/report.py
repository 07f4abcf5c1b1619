"""A run as one HTML file: the answer, the search, the winners, the data, how to do it again.

    report.write(study, Path("runs/cnn"), Path("runs/cnn/report.html"), "Which is best?")

Made from the study, metrics.json and evaluation/*.npz alone, at any time: what is not there yet is
said to be missing. No Keras import.
"""

from __future__ import annotations

from pathlib import Path

import optuna

from search import artifacts
from search.report import answer, origin, page, search_section, source, winner_section

NAME = source.NAME


def write(study: optuna.Study, folder: Path, file: Path, question: str = "") -> None:
    """Writes the report of a run.

    Args:
        study: only read.
        folder: of the run.
        file: the HTML file; replaced whole.
        question: what the study asks, one line.

    Raises:
        SearchError: if nothing has begun, metrics.json can't be read, or the file not be written.
    """
    artifacts.write_text(file, html(source.read(study, folder, question)))


def html(run: source.Run) -> str:
    """The whole page."""
    sections = [("answer", "The answer", answer.parts(run))]
    if not run.is_comparison:
        sections.append(("search", "How the search went", search_section.parts(run)))
    if run.kind != "objective":
        sections += [
            (
                "winners",
                "The models" if run.is_comparison else "The winners",
                winner_section.parts(run),
            ),
            ("data", "The data", origin.data_parts(run)),
        ]
    sections.append(("again", "How to do it again", origin.again_parts(run)))
    return page.document(run.name, run.question, sections, run.mark)
