"""When a run writes its report: however it ends, once it has begun, and never for long."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import SimpleNamespace

import pytest

from search import catalogue, journey, signals
from search.errors import (
    EXIT_DAMAGED,
    EXIT_NOTHING_USABLE,
    EXIT_STORAGE_LOST,
    Interrupted,
    SearchError,
)
from search.report import drawing, report, source
from tests import made_up_run
from tests.command import Command

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


def drawn(run):
    return f'{len(run.finished)} trials<meta name="made-from" content="{run.mark}">'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in progress, whose steps a test decides."""
    monkeypatch.setattr(journey, "_LAST_REPORT", 120.0)  # a busy machine's
    monkeypatch.setattr(report, "html", drawn)
    self = object.__new__(journey._Journey)
    self._study, self._folder, self._has_begun = made_up_run.study_of(3), tmp_path, True
    self._entry = catalogue.Entry("made-up", tmp_path / "made_up.py", "Which?")
    self._options = {}
    self._already_done = lambda final: None
    return self


def is_drawn(run):
    return drawing.is_drawn(run._study, run._folder, run._entry.summary)


def ends_with(run, error):
    def end(final):
        raise error

    run._run_what_is_missing = end
    with pytest.raises(type(error)) as raised:
        run.go(True)
    assert raised.value is error
    return (run._folder / "report.html").is_file()


@pytest.mark.parametrize(
    "error",
    [
        Interrupted(signal.SIGINT),
        SearchError("none is complete", exit_code=EXIT_NOTHING_USABLE),
        SearchError("the first 3 trials to end all failed with the same error"),
    ],
)
def test_a_run_that_ends_early_leaves_its_report(run, error):
    assert ends_with(run, error)


def test_a_run_that_ends_early_draws_no_longer_than_a_moment(run, monkeypatch):
    monkeypatch.setattr(journey, "_LAST_REPORT", 0.2)
    monkeypatch.setattr(report, "html", lambda run: time.sleep(60))
    began = time.monotonic()
    assert not ends_with(run, Interrupted(signal.SIGINT))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("code", [EXIT_STORAGE_LOST, EXIT_DAMAGED])
def test_of_a_study_that_is_lost_nothing_is_drawn(run, code):
    assert not ends_with(run, SearchError("it does not answer", exit_code=code))


def test_a_run_that_was_refused_draws_nothing(run):
    run._has_begun = False
    assert not ends_with(run, SearchError("epochs was 5 and is now 3", exit_code=2))
    assert not ends_with(run, Interrupted(signal.SIGINT))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [None, 100.0])
def test_a_signal_ends_the_drawing_at_once(run, monkeypatch, number, seconds):
    def draw(_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(report, "html", draw)
    before = [signal.getsignal(one) for one in SIGNALS]
    began = time.monotonic()
    with pytest.raises(Interrupted) as raised:
        run._report(seconds)
    assert raised.value.number == number
    assert time.monotonic() - began < 30
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_hangup_that_is_ignored_is_none(run, monkeypatch):
    """`nohup` has it ignored, so that a search outlives its terminal."""

    def draw(made):
        os.kill(os.getpid(), signal.SIGHUP)
        return drawn(made)

    monkeypatch.setattr(report, "html", draw)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run._report(100.0)
        pool = SimpleNamespace(interrupted=0)
        with signals.ending(pool):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert pool.interrupted == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert is_drawn(run)


def test_what_went_wrong_is_said_though_the_drawing_was_interrupted(run, monkeypatch):
    def draw(_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(report, "html", draw)
    assert not ends_with(run, SearchError("none is complete", exit_code=EXIT_NOTHING_USABLE))


def test_a_signal_that_comes_after_the_limit_is_one(run, monkeypatch):
    def draw(_):
        try:
            time.sleep(60)
        finally:  # it is over; the page is being left
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    monkeypatch.setattr(report, "html", draw)
    with pytest.raises(Interrupted):
        run._report(0.2)


def test_an_interrupted_run_draws_no_longer_than_a_moment(run, monkeypatch, caplog):
    path = run._folder / "report.html"
    path.write_text("of before")
    monkeypatch.setattr(report, "html", lambda run: time.sleep(60))
    began = time.monotonic()
    with caplog.at_level(logging.INFO):
        run._report(0.2)
    assert time.monotonic() - began < 30
    assert path.read_text() == "of before"
    assert "the command `report` draws what there is" in caplog.text
    assert not is_drawn(run)


def test_a_report_of_fewer_trials_is_drawn_again_when_all_is_done(run):
    """20 trials were drawn, 40 asked for and cut off at 30: 30 are then done already."""
    run._report()
    assert is_drawn(run)
    run._study.add_trials(made_up_run.study_of(2, seed=1).trials)
    assert not is_drawn(run)
    run._already_done = lambda final: "done"
    assert run.go(False) == "done"
    assert (run._folder / "report.html").read_text().startswith("5 trials")
    (run._folder / "metrics.json").write_text("{")
    assert not is_drawn(run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "raise"])
def test_the_command_leaves_a_report_of_what_there_is(tmp_path, fault):
    command = Command(tmp_path, DUMMY_FAULT=fault, DUMMY_SLEEP="0.3" if not fault else "0.01")
    process = command.start("--trials", "30", "--workers", "2", "--pruner", "none")
    if not fault:
        command.wait_for_report()
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (1 if fault else 130), output
    path = command.folder / "report.html"
    if not path.exists():  # a busy machine's Ctrl-C does not wait
        assert not fault
        assert "draws what there is" in output
        return
    shown = path.read_text()
    assert source.mark_of(path) is not None
    assert "--trials 30 --sampler tpe" in shown
    assert "--workers 2" in shown
    assert "Made with" in shown
