"""The page in a browser, and made by a run of the product."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import plotly.graph_objects as go
import pytest

from search.report import drawing, report, space
from search.report import page as html
from tests import made_up_run
from tests.browser import asked_elsewhere, browse, complaints, evaluate, in_a_browser
from tests.command import ROOT

OF_A_WINNER = {
    *("Accuracy while it trained", "Loss while it trained", "Training less validation accuracy"),
    *("Confusion matrix", "ROC curves", "Calibration"),
}
FIGURES = {
    "answer": {"Test accuracy beside others"},
    "search": {
        *("Best so far, by trials", "Best so far, by time", "Learning curves"),
        *("What the workers did", "Importances", "The two most important together"),
        "Parallel coordinates",
    },
    "winners": OF_A_WINNER,
    "data": {"Class distribution"},
    "again": set(),
}
# Of each figure: its section, its title, and for each trace whether it holds values.
DRAWN = """charts.map(({ div }) => {
  const filled = (values) => Array.from(values ?? []).flatMap(
    (value) => Array.isArray(value) || ArrayBuffer.isView(value) ? Array.from(value) : [value]
  ).some((value) => value !== null && value !== "");
  const traces = div._fullData.map((trace) => trace.dimensions
    ? trace.dimensions.every((one) => filled(one.values))
    : (trace.z ? [trace.z] : trace.values ? [trace.values] : [trace.x, trace.y]).every(filled));
  const section = div.closest("section").id;
  return { section, title: div.getAttribute("aria-label"), traces };
})"""


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
    assert asked_elsewhere(log) == set()


@pytest.mark.slow
@in_a_browser
def test_each_figure_of_each_section_holds_data(page, tmp_path):
    drawn = evaluate(page, DRAWN, tmp_path)
    empty = [one for one in drawn if not (one["traces"] and all(one["traces"]))]
    assert empty == []
    titles = {section: [] for section in FIGURES}
    for one in drawn:
        titles[one["section"]].append(one["title"])
    slices = set(titles["search"]) - FIGURES["search"]
    assert len(slices) == space.MOST_PARAMS
    conditional = {name for of in made_up_run.CONDITIONAL.values() for name in of}
    assert slices <= made_up_run.SPACE.keys() | conditional
    titles["search"] = [title for title in titles["search"] if title not in slices]
    num_winners = 2
    for section, expected in FIGURES.items():
        times = num_winners if section == "winners" else 1
        assert sorted(titles[section]) == sorted([*expected] * times)


@pytest.mark.slow
@in_a_browser
def test_a_figure_without_data_would_be_noticed(tmp_path):
    figures = [
        go.Figure(), go.Figure(go.Scatter(x=[], y=[])), go.Figure(go.Heatmap(z=[[]])),
        go.Figure(go.Bar(x=[None], y=[1])), go.Figure(go.Scatter(x=[1], y=[2])),
    ]  # fmt: skip
    parts = [html.plot(str(number), figure) for number, figure in enumerate(figures)]
    path = tmp_path / "page.html"
    path.write_text(html.document("empty", "", [("answer", "Empty", parts)], ""))
    drawn = evaluate(path, DRAWN, tmp_path)
    assert [bool(one["traces"]) and all(one["traces"]) for one in drawn] == [
        *[False] * 4, True
    ]  # fmt: skip


@pytest.mark.slow
@in_a_browser
def test_nothing_is_wider_than_a_phone(page, tmp_path):
    widths = "[innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(evaluate(page, widths, tmp_path, width=390)) <= 390


@pytest.mark.slow
@in_a_browser
def test_it_prints_on_several_pages_with_all_that_is_folded(page, tmp_path):
    path = tmp_path / "report.pdf"
    _, errors = browse(page.as_uri(), tmp_path, f"--print-to-pdf={path}", "--no-pdf-header-footer")
    assert complaints(errors) == []
    content = path.read_bytes()
    assert content.startswith(b"%PDF-")
    num_pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert 10 < num_pages < 60
    assert len(content) > 200_000


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
    assert "The whole journey in half a minute" in content
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
    monkeypatch.setattr(report, "html", lambda run: 1 / 0)
    drawing.draw(made_up_run.study_of(3), tmp_path, "Which?")
    assert "report.html could not be written: division by zero" in caplog.text
    assert not (tmp_path / "report.html").exists()
