"""The README's pictures, from a real run: the terminal, the report and the dashboard.

    python -m tests.pictures --after 30m -- --study cnn --trials 100 --seeds 1

Runs (or goes on with) `fmnist-search` with those options in a terminal of its own, photographs it
after that time, and when the run has ended its report and its dashboard. Needs Chromium.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from pathlib import Path

import click
from PIL import Image
from rich.console import Console
from rich.text import Text

from search.cli.options import Duration
from tests.browser import browse
from tests.terminal import ROOT, Terminal

FOLDER = ROOT / ".pictures"
COLUMNS = 96
# Of the report: the answer, and how the search went.
REPORT_SIZE = (1200, 2000)
DASHBOARD_SIZE = (1200, 1100)
LAST = 100_000  # characters: the run's last words are among them
COLOURS = 128  # a palette: a tenth of the bytes, and nothing that shows


@click.command()
@click.option("--after", type=Duration(), default="60s", help="When the terminal is photographed.")
@click.option("--to", "folder", type=click.Path(path_type=Path), default=FOLDER)
@click.argument("options", nargs=-1, required=True)
def main(after: float, folder: Path, options: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    terminal = Terminal(*options, columns=COLUMNS)
    try:
        terminal.read(after)
        screen = last_frame(terminal.text)
        while terminal.process.poll() is None:
            terminal.read(60)
            terminal.text = terminal.text[-LAST:]  # an hour of frames is many megabytes
        terminal.read(1)
    finally:
        terminal.close()
    if terminal.process.returncode:
        raise click.ClickException(terminal.text[-2000:])
    photograph_text(f"$ fmnist-search {' '.join(options)}\n{screen}", folder / "terminal.png")
    report = re.search(r"report: (\S+)", terminal.text)
    assert report is not None, terminal.text[-2000:]
    photograph((ROOT / report[1]).as_uri(), folder / "report.png", REPORT_SIZE)
    photograph_dashboard(options, folder / "dashboard.png")


def last_frame(text: str) -> str:
    """What the live view showed last, with its colours."""
    # Before each frame it goes up and clears the lines of the one before.
    return re.split(r"(?:\x1b\[2K|\x1b\[1A|\r(?!\n))+", text.rstrip())[-1].replace("\r", "")


def photograph_dashboard(options: tuple[str, ...], path: Path) -> None:
    """Of the run that the options name."""
    named = [
        part
        for name, value in itertools.pairwise(options)
        if name in ("--study", "--out", "--storage")
        for part in (name, value)
    ]
    served = Terminal("dashboard", *named, "--no-browser", columns=200)
    try:
        said = served.read(60, until="/dashboard")
        address = re.search(r"http://[\d.]+:\d+", said)
        assert address is not None, said
        photograph(f"{address[0]}/dashboard/studies/1", path, DASHBOARD_SIZE)
    finally:
        served.close()


def photograph_text(text: str, path: Path) -> None:
    """A terminal with this text, colours included."""
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Text.from_ansi(text))
    svg = console.export_svg(title="fmnist-search")
    width, height = (float(part) for part in re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f"<style>body {{margin: 0}} svg {{width: 100%}}</style>{svg}")
        shown = 1000, round(1000 * height / width) + 8
        photograph(page.as_uri(), path, shown)


def photograph(url: str, path: Path, size: tuple[int, int]) -> None:
    width, height = size
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        browse(url, Path(folder), f"--screenshot={shot}", f"--window-size={width},{height}")
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
