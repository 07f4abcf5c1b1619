"""The page in a browser, and made by a run of the product."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from search.report import report
from tests import made_up_run
from tests.browser import browse, in_a_browser
from tests.command import ROOT


def complaints(log):
    return [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    study = made_up_run.study_of(100)
    made_up_run.write_metrics(study, folder, top=2)
    report.write(study, folder, folder / "report.html", "Which is best?")
    return folder / "report.html"


@pytest.mark.slow
@in_a_browser
def test_every_figure_is_drawn_and_nothing_leaves_the_machine(page, tmp_path):
    log = tmp_path / "net.json"
    dom, errors = browse(page.as_uri(), tmp_path, "--dump-dom", f"--log-net-log={log}")
    num_charts = len(re.findall(r'<div class="chart', dom))
    assert num_charts > 20
    assert f'data-drawn="{num_charts}"' in dom
    charts = re.split(r'<div class="chart', dom)[1:]
    assert all('class="main-svg"' in chart for chart in charts)
    assert complaints(errors) == []
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
    # The browser's own errands: it is told to keep still, and does not wholly.
    assert not [url for url in asked if not re.search(r"google|gvt1|chrom", url)], asked


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", ["--window-size=1200,4000"]),
        ("dark", ["--window-size=1200,4000", "--blink-settings=preferredColorScheme=0"]),
        ("narrow", ["--window-size=400,6000"]),
    ],
)
def test_it_is_shown_in_each_theme_and_width(page, tmp_path, name, options):
    shot = tmp_path / f"{name}.png"
    _, errors = browse(page.as_uri(), tmp_path, f"--screenshot={shot}", *options)
    assert complaints(errors) == []
    from PIL import Image

    with Image.open(shot) as image:
        corner = image.convert("L").getpixel((3, 3))
        assert image.width == (400 if name == "narrow" else 1200)
    assert corner < 60 if name == "dark" else corner > 220


@pytest.mark.slow
def test_a_run_ends_with_its_report_which_can_be_made_again(tmp_path):
    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "search", *arguments, "--out", str(tmp_path / "run")],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["--study", "quickstart", "--trials", "4", "--epochs", "1", "--seeds", "2"]
    path = tmp_path / "run" / "report.html"
    assert f"report: {path}" in command(*small)
    content = path.read_text()
    for heading in (
        "Learning curves",
        "Misclassified images",
        "First-layer filters",
        "Calibration",
    ):
        assert f"<h3>{heading}</h3>" in content or heading == "Misclassified images"
    assert "The whole journey in a few minutes" in content
    drawn = path.stat().st_mtime_ns
    command(*small)
    assert path.stat().st_mtime_ns == drawn  # nothing had changed
    path.unlink()
    command(*small)
    assert path.is_file()  # all else was done

    other = tmp_path / "elsewhere" / "page.html"
    other.parent.mkdir()
    environment = os.environ | {"KERAS_HOME": str(tmp_path / "no-data")}
    done = subprocess.run(
        [sys.executable, "-m", "search", "report", "--study", "quickstart",
         "--out", str(tmp_path / "run"), "--file", str(other)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment,
    )  # fmt: skip
    assert done.stdout == f"{other}\n"
    assert other.read_text() == path.read_text()


def test_a_report_that_cannot_be_drawn_costs_the_run_nothing(tmp_path, monkeypatch, caplog):
    from search import catalogue, journey

    monkeypatch.setattr(report, "html", lambda run: 1 / 0)
    study = made_up_run.study_of(3)
    self = object.__new__(journey._Journey)
    self._study, self._folder = study, tmp_path
    self._entry = catalogue.Entry("made-up", tmp_path / "made_up.py", "Which?")
    self._report()
    assert "report.html could not be written: division by zero" in caplog.text
    assert not (tmp_path / "report.html").exists()
