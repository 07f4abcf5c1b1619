"""Options that several commands take, and how their values are read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

from search.workers.devices import MOST_PER_GPU

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
PRECISIONS = ["auto", "float32", "bfloat16"]
_BYTES = {"": 0, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS = {"s": 1, "m": 60, "h": 3600}
_YEAR = 366 * 24 * 3600


class Duration(click.ParamType):
    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        text = f"{value}s" if isinstance(value, int | float) else str(value)  # run() gives seconds
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
        seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
        if not 0 < seconds <= _YEAR:
            self.fail(
                "a time is a number and s, m or h, such as 90m, of a year at most. "
                f"Received: {str(value)[:40]!r}"
            )
        return seconds


class Size(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT]?)", str(value))
        is_bytes = isinstance(value, int)  # as run() gives them
        if not match or not (match[2] or is_bytes or float(match[1]) == 0):
            self.fail(
                f"a size is a number and M, G or T, such as 8G, or 0. Received: {str(value)[:40]!r}"
            )
        return int(float(match[1]) * (1 if is_bytes else _BYTES[match[2]]))


class Epochs(click.FloatRange):
    def __init__(self) -> None:
        super().__init__(min=0, min_open=True, max=10_000)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"epochs are a number above 0. Received: {value!r}")
        return number


study = click.option("--study", metavar="NAME|FILE.py", required=True, help="Which study.")
out = click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<study>]"
)
storage = click.option(
    "--storage",
    metavar="URL",
    help="sqlite:///FILE or postgresql://USER@HOST/DATABASE.  [default: study.db in "
    "the run's folder]",
)


def _options(*options: Any) -> Any:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


run = _options(study, out, storage)  # the options that name one
verbosity = _options(
    click.option("-v", "--verbose", count=True, help="Every event beside the live view."),
    click.option("-q", "--quiet", is_flag=True, help="Warnings and the result only."),
)
working = _options(
    click.option("--workers", default="auto", help="auto (one per GPU, or per core) or a number."),
    click.option("--per-gpu", type=click.IntRange(1, MOST_PER_GPU), default=1, show_default=True,
                 help="Workers on each GPU, where --workers is auto; they share its memory."),
    click.option("--max-attempts", type=click.IntRange(1, 1000), default=3, show_default=True,
                 help="Of a trial whose worker dies."),
    click.option("--silence", type=Duration(),
                 help="After which a worker that says nothing is replaced.  [default: 10 times its "
                 "longest interval, 5m at least; 10m to load the study and its data]"),
    click.option("--weights", metavar="imagenet|none|FILE",
                 help="Pretrained ones, where the study begins from some; none: random."),
    click.option("--cache-size", type=Size(), help="On disk, of what frozen layers give, such as "
                 "500M; 0: none.  [default: 8G]"),
)  # fmt: skip
cluster = _options(
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local",
                 show_default=True, help="Where workers run."),
    click.option("--address", metavar="auto|HOST:PORT|ray://HOST:PORT",
                 help="Of a Ray cluster.  [default: one on this machine, for this run]"),
    click.option("--shared", type=click.Path(path_type=Path, file_okay=False, exists=True),
                 help="Folder that all nodes have: a trial goes on elsewhere from its checkpoint."),
    click.option("--allow-insecure-ray", is_flag=True,
                 help="Use a cluster that asks nobody for a token."),
)  # fmt: skip
running = _options(
    working,
    cluster,
    click.option("--precision", type=click.Choice(PRECISIONS),
                 help="[default: auto; to retrain, the search's]"),
    click.option("--top", type=click.IntRange(1, 1000),
                 help="Winners to retrain.  [default: 1, or what the run was told before]"),
    click.option("--seeds", type=click.IntRange(1, 1000),
                 help="Trainings of each winner.  [default: 3, or what the run was told before]"),
    click.option("--final-epochs", type=Epochs(),
                 help="Of a winner's training.  [default: the study's, else as served it best; to "
                 "retrain, the run's]"),
    click.option("--log", type=click.Choice(["tensorboard", "csv"]),
                 help="Each trial's curve, for other tools."),
    verbosity,
)  # fmt: skip
