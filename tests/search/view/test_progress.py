"""The live view: rendered at any size from a state made up, and the real command in a terminal."""

from __future__ import annotations

import errno
import io
import logging
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from search import results
from search.view.live import Picture, frame, seconds_left
from search.view.progress import View
from search.view.time_left import Finished
from search.workers.devices import Device
from search.workers.slots import Slot, Task
from tests.terminal import CLEARED, Terminal, frames

SLEEPER = """
import time
from studies.study import Study

def objective(trial):
    x = trial.suggest_float("x", 0.0, 1.0)
    for step in range(1, 6):
        time.sleep(0.1)
        trial.report(x * step / 5, step)
    return x

study = Study(name="sleeper", objective=objective, trials=12)
"""


def slot(index, **status):
    given = Slot(index, Device(threads=1))
    given.ready = True
    given.status = status
    return given


def busy(index, trial, seconds, **status):
    given = slot(index, what=f"trial {trial}", **status)
    given.task = Task(trial, 1, {}, started=time.monotonic() - seconds)
    return given


def picture():
    made = Picture("searching", 100, 20, best=(0.9303, 12), saved=0.71)
    made.counts = {"complete": 12, "pruned": 21, "fail": 1}
    made.bests = [0.5 + number / 100 for number in range(34)]
    made.finished = [Finished(number, 30.0 if number % 3 else 120.0, 4) for number in range(34)]
    made.events.append(
        "15:20:31 trial 33 pruned (behind at report 4) after 4 reports, 31 s; 34 of 100"
    )
    return made


def slots(count=2):
    return [
        busy(i, 34 + i, 20.0, step=4, value=0.8912, images_per_second=5230.4) for i in range(count)
    ]


def rendered(made, workers, width, height=24, **options):
    console = Console(file=io.StringIO(), width=width, height=height, **options)
    console.print(frame(made, workers, console.options))
    return console.file.getvalue().splitlines()


def test_a_wide_terminal_shows_all():
    lines = rendered(picture(), slots(), 100)
    assert lines[0].split() == ["worker", "does", "report", "accuracy", "images/s"]
    assert lines[1].split() == ["0", "(1", "cpu)", "trial", "34", "4/20", "0.8912", "5,230"]
    assert re.match(r"searching: 34 of 100  ━+─+  about \d+ min left$", lines[3])
    assert lines[4].startswith("best 0.9303 (trial 12)  ▁")
    assert lines[4].endswith("█")
    assert lines[5] == "12 complete, 21 pruned, 1 fail, 71% of the epochs saved by pruning"
    assert "trial 33 pruned" in lines[6]


@pytest.mark.parametrize("width", [20, 30, 40, 47, 48, 60, 71, 72, 80, 200])
@pytest.mark.parametrize("workers", [1, 2, 64])
def test_no_line_is_wider_than_the_terminal_and_none_is_broken(width, workers):
    lines = rendered(picture(), slots(workers), width)
    assert max(map(len, lines)) <= width
    assert len(lines) == (1 + min(workers, 24 - 7) + (workers > 17) + 4)
    assert len(lines) < 24  # the cursor's line is left


def test_a_narrow_terminal_leaves_columns_out():
    assert rendered(picture(), slots(), 60)[0].split() == ["worker", "does", "report", "accuracy"]
    assert rendered(picture(), slots(), 40)[0].split() == ["worker", "does", "report"]


def test_a_low_terminal_leaves_workers_out():
    lines = rendered(picture(), slots(8), 80, height=10)
    assert len(lines) < 10
    assert "... and 5 more" in lines


def test_before_anything_is_known():
    lines = rendered(Picture("searching", 12, 9), [slot(0), Slot(1, Device(1))], 80)
    assert [line.split()[-1] for line in lines[1:3]] == ["ready", "starting"]
    assert lines[3].rstrip() == "searching: 0 of 12  " + "─" * 24
    assert len(lines) == 4


def test_while_the_workers_start():
    lines = rendered(Picture("starting workers"), [Slot(0, Device(1))], 80)
    assert [line.strip() for line in lines[1:]] == ["0 (1 cpu)  starting", "starting workers"]
    assert rendered(Picture(), [], 80) == []


def test_where_only_ascii_can_be_written():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, height=24)
    console.print(frame(picture(), slots(), console.options))
    console.file.flush()
    assert b"########" in console.file.buffer.getvalue()


def test_the_users_markup_is_text():
    made = picture()
    made.events.append("15:20:32 trial 3 fail ([/bold] ValueError: [red]) after 0 reports")
    assert "([/bold] ValueError: [red])" in "\n".join(rendered(made, slots(), 100))


def test_the_time_left_knows_the_budget_and_what_is_cleared_up():
    made, workers = picture(), slots()
    left = seconds_left(made, workers)
    assert 10 * 60 < left < 60 * 60
    made.deadline = time.monotonic() + 60
    assert seconds_left(made, workers) == pytest.approx(60, abs=1)
    done = Picture("searching", 1, 20, finished=[Finished(34, 30.0, 20)])
    done.counts["complete"] = 1
    assert seconds_left(done, workers[:1]) == 0


@pytest.mark.parametrize(
    ("status", "seconds"),
    [
        ({"step": 10}, 30),  # its own ten reports
        ({"step": 10, "before": 0}, 30),
        # Nine of them were an earlier attempt's: it goes on at 30 s a report, and not at 3.
        ({"step": 10, "before": 9}, 300),
        ({"step": 12, "before": 9}, 80),
    ],
)
def test_the_time_left_of_a_trial_that_goes_on_is_at_its_pace_of_now(status, seconds):
    made, worker = Picture("searching", 1, 20), busy(0, 0, 30.0, of=20, **status)
    assert seconds_left(made, [worker]) == pytest.approx(seconds, rel=0.01)


def test_nothing_is_said_of_the_time_before_anything_is_known():
    assert seconds_left(Picture("searching", 10, 20), [slot(0)]) is None
    assert "left" not in "".join(rendered(Picture("searching", 10, 20), [slot(0)], 80))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3900, "65 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert results.duration(seconds) == text


@pytest.mark.parametrize(
    ("environment", "is_live"),
    [({}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, True)],
)
def test_what_a_terminal_can_do_is_respected(monkeypatch, environment, is_live):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True, write=print, flush=str))
    assert View()._is_live is is_live
    assert View()._live.console.no_color is ("NO_COLOR" in environment)


def test_its_parts_go_on_from_one_another():
    view = View(-1)
    view.begin("searching", 2, 5)
    view.finished("complete", 0, 0.5, reports=5, seconds=10.0)
    view.finished("pruned", 1, None, reports=1, seconds=2.0)
    view.said("an event")
    view.begin("training", 3)
    view.finished("complete", 0, None, seconds=9.0)
    made = view._picture
    assert (made.title, sum(made.counts.values()), made.finished) == (
        "training",
        1,
        [Finished(0, 9.0, 0)],
    )
    assert (made.best, made.bests) == ((0.5, 0), [0.5, 0.5])
    assert made.events[0].endswith("an event")


@pytest.fixture
def terminal(tmp_path):
    opened = []
    (tmp_path / "sleeper.py").write_text(SLEEPER)

    def start(*arguments, **options):
        command = ["--study", str(tmp_path / "sleeper.py"), "--out", str(tmp_path / "run")]
        opened.append(Terminal(*command, "--workers", "2", *arguments, **options))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.mark.slow  # two workers start, some trials of half a second
def test_a_terminal_that_is_made_narrower_meanwhile(terminal):
    shown = terminal("--trials", "1000", columns=100)  # it is ended below
    wide = shown.read(until="best 0.")
    assert "images/s" in wide
    assert max(map(len, frames(wide))) <= 100
    shown.resize(60)
    assert CLEARED in shown.read(until=CLEARED)  # the new width is seen
    shown.read(until="of 1000")
    shown.read(seconds=1)
    narrow = shown.text.rpartition(CLEARED)[2]
    assert "of 1000" in narrow
    assert max(map(len, frames(narrow))) <= 60
    assert "images/s" not in narrow
    shown.process.send_signal(signal.SIGINT)
    shown.read()
    assert shown.process.wait(timeout=20) == 130
    assert "the same command goes on" in shown.text


@pytest.mark.slow  # as above
@pytest.mark.parametrize(
    ("environment", "codes"),
    [({"NO_COLOR": "1"}, r"\x1b\[[0-9;]*3[0-7][;m]"), ({"TERM": "dumb"}, r"\x1b")],
)
def test_no_colours_and_no_tricks_where_they_are_not_wanted(terminal, environment, codes):
    shown = terminal(columns=80, **environment)
    text = shown.read()
    assert shown.process.wait(timeout=20) == 0
    assert not re.search(codes, text), repr(text[:500])
    assert "12 of 12 trials finished" in text


def test_a_terminal_that_is_gone_costs_the_picture_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")

    class Terminal(io.StringIO):
        is_gone = False

        def isatty(self):
            return True

        def write(self, text):
            if self.is_gone:  # as Linux has it
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with View() as view:
        assert view._is_live
        view.said("an event")
        terminal.is_gone = True
        logging.getLogger("search").info("trial 3 has ended")
        view.refresh(slots())
        assert not view._is_live
    assert sys.stderr is terminal  # and nothing of the picture's


def test_a_caller_s_own_handlers_are_shown_nothing_and_get_back_their_logger():
    logger, told = logging.getLogger("search"), []
    before = logger.level, logger.propagate

    class Handler(logging.Handler):
        def emit(self, record):
            told.append(record)

    handler = Handler()
    logging.getLogger().addHandler(handler)
    try:
        with View(-1):
            logger.info("a trial has ended")
    finally:
        logging.getLogger().removeHandler(handler)
    assert not told
    assert (logger.level, logger.propagate) == before
