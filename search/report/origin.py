"""The last two sections: the data, and how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from search import run_record
from search.report import images, page, theme
from search.report.page import Html, label
from search.report.source import Run
from search.winners import export


def data_parts(run: Run) -> list[Html]:
    dataset = run.dataset
    if dataset is None:
        return [page.note("This study has an objective of its own: its data are not known here.")]
    names = dataset["class_names"]
    height, width, channels = dataset["input_shape"]
    made = [
        page.pairs(
            [
                ("data set", dataset["name"]),
                ("images", f"{height}x{width}, {channels} channel{'s' * (channels != 1)}"),
                ("classes", len(names)),
                ("training images", f"{run.started.get('num_images', 0):,}"),
            ]
        ),
        page.pairs([("SHA-256 of the content", dataset["sha256"])], wide=True),
    ]
    pictures = run.pictures(run.winners[0]) if run.winners else {}
    if counts := class_counts(run, pictures):
        made.append(
            page.plot(
                "Class distribution",
                distribution_figure(counts, names),
                "Images of each class.",
                height=min(900, 90 + 34 * len(names)),
            )
        )
    if pictures:
        made += [
            page.heading("Samples of each class", "The first training images of each."),
            images.of_classes(pictures, names),
        ]
    else:
        made.append(page.note("Sample images come with the first winner that is measured."))
    return made


def class_counts(run: Run, pictures: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Images of each class, of the training and the test set, as far as they are known."""
    counts = {}
    if "train_counts" in pictures:
        counts["training"] = [int(count) for count in pictures["train_counts"]]
    if run.winners:
        per_class = run.winners[0]["seeds"][0]["test"]["per_class"]
        counts["test"] = [int(figures["support"]) for figures in per_class.values()]
    return counts


def distribution_figure(counts: Mapping[str, Sequence[int]], names: Sequence[str]) -> go.Figure:
    figure = go.Figure()
    for (part, of), color in zip(counts.items(), (theme.ACCENT, theme.ORANGE), strict=False):
        figure.add_bar(
            x=list(of),
            y=list(range(len(of))),
            name=part,
            orientation="h",
            marker={"color": color},
            hovertemplate=f"%{{x:,}} {part} images<extra></extra>",
        )
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[label(name) for name in names],
        autorange="reversed",
        showgrid=False,
    )
    return theme.styled(figure, x="images", legend=True, bargap=0.3)


def again_parts(run: Run) -> list[Html]:
    made = [
        page.heading("The same run", "In another folder: add --out."),
        page.code(command(run)),
    ]
    if run.metrics:
        config = run.folder / "configs" / "best.yaml"
        made += [
            page.heading("The winner alone", "Trains its config again and compares the figures."),
            page.code(shlex.join(["fmnist-search", "train", str(config)])),
            page.folded(
                "Its config, configs/best.yaml",
                [page.code(export.to_yaml(export.config(dict(run.winners[0]), dict(run.metrics))))],
            ),
        ]
    return [*made, *_made_with(run)]


def command(run: Run) -> str:
    """The command line that does the run again, with what it began with."""
    words = ["fmnist-search", "--study", run.started["file"] or run.name]
    words += run_record.options(run.started)
    if workers := run.started["told"]["workers"]:
        words += ["--workers", str(workers)]
    return shlex.join(words)


def origins(run: Run) -> list[tuple[str, Mapping[str, Any]]]:
    """What it was made with, in the order of time, and how each part is called; a part that was
    made with the same as the one before is left out."""
    found = [("Made with", one) for one in run.started["made_with"]]
    found[1:] = [("Gone on with", one) for _, one in found[1:]]
    if run.metrics and found[-1][1] != run.metrics["provenance"]:
        found.append(("The winners were measured with", run.metrics["provenance"]))
    return found


def _made_with(run: Run) -> list[Html]:
    """Versions, hardware and commit, then seeds and data."""
    made: list[Html] = []
    before: dict[str, Any] = {}
    for name, provenance in origins(run):
        short, wide = _described(provenance)
        made.append(page.heading(name, "What differs from above." if before else ""))
        for values, is_wide in ((short, False), (wide, True)):
            if changed := [(n, v) for n, v in values.items() if before.get(n) != v]:
                made.append(page.pairs(changed, wide=is_wide))
        before |= short | wide
    told = run.started["told"]
    short = {"precision": told["precision"], "workers": told["workers"]}
    short["seed of the study"] = run.started["fixed"]["seed"]
    made.append(
        page.pairs((name, value) for name, value in short.items() if value not in (None, ""))
    )
    wide = {}
    if run.winners:
        seeds = run.winners[0]["seeds"]
        wide["seeds of the winner"] = ", ".join(str(seed["seed"]) for seed in seeds)
    if run.dataset:
        wide["data, SHA-256"] = run.dataset["sha256"]
    return [*made, page.pairs(wide.items(), wide=True)] if wide else made


def _described(provenance: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its short values and its long ones, by their names."""
    hardware = provenance["hardware"]
    short = {**provenance["versions"], "backend": provenance["backend"]}
    short |= {"cores": hardware["cores"], "GPUs": hardware["gpus"]}
    commit = provenance["commit"] or "an installed copy"
    return short, {"processor": hardware["processor"], "commit": commit}
