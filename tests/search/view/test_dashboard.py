"""The dashboard command over real sockets: what it shows, and what it refuses."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest

from search import run_record
from search.errors import SearchError
from search.report import dashboard_plots, source
from search.storage import storage
from search.view import dashboard, notes
from tests import made_up_run
from tests.browser import asked_elsewhere, browse, complaints, in_a_browser
from tests.command import ROOT

PARAMS = {
    "filters": optuna.distributions.IntDistribution(8, 64),
    "rate": optuna.distributions.FloatDistribution(0.0, 1.0),
}


def start(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The command, and what it says when it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "search", "dashboard", "--study", "quickstart",
         "--out", str(folder), "--no-browser", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, process.stdout.readline()


def end(process: subprocess.Popen[str]) -> str:
    """After Ctrl-C; what it has said since, on both streams."""
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    return output + errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with a study of six trials."""
    folder = tmp_path_factory.mktemp("run")
    study = storage.at(f"sqlite:///{folder}/study.db").open("quickstart")
    study.set_user_attr(
        "run", {"format": run_record.FORMAT, "num_reports": 3, "fixed": {"kind": "search"}}
    )
    for number in range(6):
        value = 0.5 + number / 20
        study.add_trial(
            optuna.trial.create_trial(
                value=value,
                params={"filters": 8 + number, "rate": number / 10},
                distributions=PARAMS,
                intermediate_values={1: value - 0.1, 2: value},
                user_attrs={"seconds": 3.5, "parameters": 10_000 + number},
            )
        )
    notes.save_missing(study)
    made_up = made_up_run.study_of(12)
    made_up_run.write_metrics(made_up, folder, seeds=1)
    notes.save_plots(study, dashboard_plots.of(source.read(made_up, folder)))
    study._storage._backend.engine.dispose()
    return folder


@pytest.fixture(scope="module")
def served(folder):
    process, said = start(folder, "--port", "18080")
    assert "read only" in said
    yield re.search(r"http://127\.0\.0\.1:\d+", said)[0]
    assert end(process) == ""


def ask(url: str, method: str = "GET", headers=(), body: bytes | None = None):
    """Status, and the answer's text."""
    request = urllib.request.Request(url, body, dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def content(folder: Path) -> str:
    return hashlib.sha256((folder / "study.db").read_bytes()).hexdigest()


def test_its_pages_are_shown(served):
    for path in ("/", "/dashboard", "/dashboard/studies/1", "/dashboard/studies/1/trials"):
        status, text = ask(served + path)
        assert (status, "<html" in text) == (200, True)
    (script,) = re.findall(r'src="(/static/[^"]*\.js)"', text)
    assert ask(served + script)[0] == 200
    assert ask(served + "/dashboard", "HEAD") == (200, "")


def test_its_interface_tells_the_study_with_its_notes(served):
    (study,) = json.loads(ask(served + "/api/studies")[1])["study_summaries"]
    assert study["study_name"] == "quickstart"
    detail = json.loads(ask(f"{served}/api/studies/{study['study_id']}")[1])
    assert len(detail["trials"]) == 6
    assert "10,003" in detail["trials"][3]["note"]["body"]
    assert "trial 5" in detail["note"]["body"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/meta",
        "/api/studies/1/param_importances",
        "/csv/1",
        "/favicon.ico",
        *(f"/api/studies/1/plot/{kind}" for kind in ("slice", "edf", "timeline", "contour")),
    ],
)
def test_all_that_it_asks_for_works_on_a_study_that_cannot_be_written(served, folder, path):
    before = content(folder)
    assert ask(served + path)[0] == 200
    assert content(folder) == before


@pytest.mark.fault("X5")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/api/studies/1"),
        ("POST", "/api/studies"),
        ("POST", "/api/studies/1/rename"),
        ("PUT", "/api/studies/1/note"),
        ("PUT", "/api/studies/1/1/note"),
        ("POST", "/api/trials/1/tell"),
        ("POST", "/api/trials/1/user-attrs"),
        ("POST", "/incompatible-rdb-schema"),
        ("PATCH", "/api/studies/1"),
        ("OPTIONS", "/api/studies"),
    ],
)
def test_nothing_but_looking_is_allowed(served, folder, method, path):
    before = content(folder)
    body = json.dumps({"study_name": "x", "directions": ["minimize"], "version": 9}).encode()
    status, text = ask(served + path, method, body=body * 2000)  # also a long one gets its answer
    assert (status, "read only" in json.loads(text)["reason"]) == (405, True)
    assert content(folder) == before


@pytest.mark.fault("X5")
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST", 200),
        ("[::1]:{port}", 200),
        ("localhost:9000", 200),  # through a tunnel that begins at another port
        ("evil.example:{port}", 403),
        ("127.0.0.1.evil.example:{port}", 403),
        ("localhost.evil.example", 403),
        ("evil.example@127.0.0.1", 403),
        ("0.0.0.0:{port}", 403),
        ("", 403),
    ],
)
def test_only_this_machines_names_are_answered(served, host, status):
    port = served.rpartition(":")[2]
    assert ask(served + "/api/meta", headers={"Host": host.format(port=port)})[0] == status


@pytest.mark.fault("X5")
def test_without_a_host_nothing_is_answered(served):
    connection = http.client.HTTPConnection(served.removeprefix("http://"), timeout=20)
    connection.putrequest("GET", "/api/studies", skip_host=True)
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()


def test_many_pages_at_once(served):
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: ask(f"{served}/api/studies/1"), range(24)))
    assert {status for status, _ in answers} == {200}


def test_a_trial_that_ends_meanwhile_is_shown(served, folder):
    study = storage.at(f"sqlite:///{folder}/study.db").open("quickstart")
    trial = study.ask()
    trial.suggest_int("filters", 8, 64)
    study.tell(trial, 0.9)
    for _ in range(50):  # the dashboard looks every two seconds
        if len(json.loads(ask(f"{served}/api/studies/1")[1])["trials"]) == 7:
            break
        time.sleep(0.2)
    else:
        raise AssertionError("the new trial is never shown")
    study._storage._backend.engine.dispose()


@pytest.mark.slow
def test_a_second_one_takes_the_next_port_and_says_so(served, folder):
    port = int(served.rpartition(":")[2])
    process, said = start(folder, "--port", str(port))
    try:
        assert f"port {port} is taken" in said
        (other,) = re.findall(r"http://127\.0\.0\.1:(\d+)/dashboard/studies/1", said)
        assert int(other) > port
        assert ask(f"http://127.0.0.1:{other}/api/meta")[0] == 200
    finally:
        assert end(process) == ""


def test_a_run_that_is_not_there_is_one_line(tmp_path):
    process, said = start(tmp_path / "none")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert "no run of 'quickstart'" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_no_free_port_is_said(monkeypatch):
    monkeypatch.setattr(dashboard, "PORTS_TRIED", 1)
    with dashboard.bind(0) as server, pytest.raises(SearchError, match="no port from"):
        dashboard.bind(server.server_port)


@pytest.mark.slow  # a browser, which takes ten seconds beside two trainings
@in_a_browser
def test_a_browser_lists_the_trials(served, tmp_path):
    shown, _ = browse(f"{served}/dashboard/studies/1/trials", tmp_path, "--dump-dom")
    assert "quickstart" in shown
    assert all(f"Trial {number}" in shown for number in range(6))
    assert "10,00" in shown  # the note of the first one shown


@pytest.mark.slow
@in_a_browser
def test_a_browser_draws_the_winners_figures_and_asks_nobody_else(served, tmp_path):
    log, page = tmp_path / "net.json", f"{served}/dashboard/studies/1"
    shown, said = browse(page, tmp_path, "--dump-dom", f"--log-net-log={log}")
    for name in ("accuracy", "loss", "confusion"):
        plot = shown.partition(f'id="user-defined-plot:winner-1-{name}"')[2]
        assert "main-svg" in plot.partition("user-defined-plot:")[0]
    assert "accuracy while it trained" in shown
    assert complaints(said) == []
    assert asked_elsewhere(log) == set()
    shot = tmp_path / "dashboard.png"
    browse(page, tmp_path, f"--screenshot={shot}", "--window-size=1200,2400")
    from PIL import Image

    with Image.open(shot) as image:
        assert len(image.convert("L").getcolors()) > 50
