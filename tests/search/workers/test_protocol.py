import fcntl
import math
import os
import resource
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from search.workers.protocol import Channel, Diverged, RemoteTrial, TrialEnded
from tests.command import ROOT

# A worker in the middle of something; its one argument says of what.
WORKER = """
import socket, sys, time
from search.workers.protocol import Channel, WorkerConnection

connection = WorkerConnection(Channel(socket.socket(fileno=int(sys.argv[1]))))
connection.send({"type": "begun"})
if sys.argv[2] == "training":
    time.sleep(60)
while sys.argv[2] == "waiting":
    connection.receive()
while sys.argv[2] == "telling":
    connection.send({"type": "progress"})
"""

# What a study's objective does to its trial, through the connection that workers have.
OBJECTIVE = """
import socket, sys
from search.workers.protocol import Channel, RemoteTrial, WorkerConnection

connection = WorkerConnection(Channel(socket.socket(fileno=int(sys.argv[1]))))
trial = RemoteTrial(connection, number=3, attempt=2)
trial.report(trial.suggest_float("x", 0.0, 1.0), 1)
connection.send({"type": "finished", "pruned": trial.should_prune()})
connection.receive()
"""


@pytest.fixture
def pair():
    """Two sockets that are joined; a test that waits for what never comes fails soon."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def start(pair):
    """Starts a process that holds the other end."""
    ours, theirs = pair
    processes = []

    def start(script, *arguments):
        theirs.settimeout(None)  # the process would inherit a descriptor that does not wait
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(theirs.fileno()), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        processes.append(process)
        return process, Channel(ours)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


class Connection:
    """The worker's end without the thread that would end the tests' own process."""

    def __init__(self, sock):
        self._channel = Channel(sock)

    def send(self, message):
        self._channel.send(message)

    def receive(self):
        (message,) = self._channel.receive()
        return message


class Coordinator(threading.Thread):
    """Gives the prepared answers, one for each message, and keeps what it heard."""

    def __init__(self, sock, answers):
        super().__init__()
        self._channel = Channel(sock)
        self._answers = list(answers)
        self.heard = []

    def run(self):
        while self._answers:
            try:
                messages = self._channel.receive()
            except TimeoutError:
                return
            for message in messages:
                self.heard.append(message)
                self._channel.send({"type": "answer", **self._answers.pop(0)})


@pytest.mark.parametrize("step", [-1, 2**31, 10**30])
def test_a_step_that_no_database_stores_is_the_objective_s_error(remote, step):
    trial, coordinator = remote()
    with pytest.raises(ValueError, match=rf"from 0 to 2\*\*31 - 1. Received: {step}"):
        trial.report(0.5, step)
    assert coordinator.heard == []


@pytest.fixture
def remote(pair):
    """A trial in a worker, and the coordinator that gives it these answers."""
    threads = []

    def remote(*answers):
        coordinator = Coordinator(pair[0], answers)
        coordinator.start()
        threads.append(coordinator)
        return RemoteTrial(Connection(pair[1]), number=7, attempt=2), coordinator

    yield remote
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"type": "open", "file": "a folder/mein Küchenplan.py"},
        {"text": 'two\nlines, a tab\t and a "quote"', "none": None, "yes": True},
        {"value": 0.1 + 0.2, "tiny": 5e-324, "large": 2**63, "list": [1, [2.5, "x"]]},
        {"long": "x" * 100_000},
    ],
)
def test_a_message_arrives_as_it_was(pair, message):
    sender = threading.Thread(target=Channel(pair[0]).send, args=(message,))
    sender.start()
    receiver, received = Channel(pair[1]), []
    while not received:  # a long one takes more than one read
        received = receiver.receive()
    sender.join()
    assert received == [message]


def test_one_read_gives_all_that_is_there(pair):
    for number in range(3):
        Channel(pair[0]).send({"number": number})
    assert Channel(pair[1]).receive() == [{"number": 0}, {"number": 1}, {"number": 2}]


@pytest.mark.parametrize("cut", [1, 5, 10, 16])
def test_half_a_line_waits_for_its_other_half(pair, cut):
    line = '{"name": "ä"}\n'.encode() + b'{"next": 1}\n'
    receiver = Channel(pair[1])
    pair[0].sendall(line[:cut])
    first = receiver.receive()
    pair[0].sendall(line[cut:])
    assert first + receiver.receive() == [{"name": "ä"}, {"next": 1}]
    assert len(first) == (cut > len('{"name": "ä"}\n'))


@pytest.mark.parametrize("left_unread", [False, True])
def test_a_closed_socket_is_the_end(pair, left_unread):
    if left_unread:  # the kernel then says "connection reset" instead
        Channel(pair[1]).send({"type": "start"})
    Channel(pair[0]).close()
    receiver = Channel(pair[1])
    with pytest.raises(EOFError):
        receiver.receive()
    with pytest.raises(OSError, match="Broken pipe"):
        receiver.send({"type": "answer"})


def test_words_before_the_end_are_still_heard(pair):
    Channel(pair[0]).send({"type": "finished"})
    pair[0].close()
    receiver = Channel(pair[1])
    assert receiver.receive() == [{"type": "finished"}]
    with pytest.raises(EOFError):
        receiver.receive()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_json_is_refused_and_nothing_is_sent(pair, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Channel(pair[0]).send({"value": value})
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        Channel(pair[1]).receive()


@pytest.mark.parametrize(
    ("ask", "kind", "arguments"),
    [
        (
            lambda trial: trial.suggest_float("p", 0.1, 0.9),
            "float",
            {"low": 0.1, "high": 0.9, "step": None, "log": False},
        ),
        (
            lambda trial: trial.suggest_float("p", 1e-4, 1e-1, log=True),
            "float",
            {"low": 1e-4, "high": 1e-1, "step": None, "log": True},
        ),
        (
            lambda trial: trial.suggest_int("p", 8, 64, step=8),
            "int",
            {"low": 8, "high": 64, "step": 8, "log": False},
        ),
        (
            lambda trial: trial.suggest_categorical("p", ("a", 2, None)),
            "categorical",
            {"choices": ["a", 2, None]},
        ),
    ],
)
def test_a_suggestion_is_asked_of_the_coordinator(remote, ask, kind, arguments):
    trial, coordinator = remote({"value": "what it said"})
    assert ask(trial) == "what it said"
    assert trial.params == {"p": "what it said"}
    stamp = {"trial": 7, "attempt": 2}
    asked = {"type": "suggest", **stamp, "name": "p", "kind": kind, "arguments": arguments}
    assert coordinator.heard == [asked]


def test_a_report_brings_the_answer_whether_to_stop(remote):
    trial, coordinator = remote({"value": False}, {"value": True})
    assert not trial.should_prune()
    trial.report(0.5, 1)
    assert not trial.should_prune()
    trial.report(np.float32(0.75), np.int64(2), {"loss": np.float32(1.5)}, images_per_second=90.0)
    assert trial.should_prune()
    report = {"type": "report", "trial": 7, "attempt": 2}
    assert coordinator.heard == [
        {**report, "value": 0.5, "step": 1, "metrics": {}, "progress": {}},
        {
            **report,
            "value": 0.75,
            "step": 2,
            "metrics": {"loss": 1.5},
            "progress": {"images_per_second": 90.0},
        },
    ]


def test_a_figure_beside_the_value_that_is_no_finite_number_is_left_out(remote):
    trial, coordinator = remote({"value": False})
    odd = {"nan": math.nan, "inf": np.float32("inf"), "note": "x", "none": None, "two": [1, 2]}
    trial.report(0.5, 1, {"accuracy": 0.6, **odd}, speed=np.float32(2), huge=10**400, **odd)
    assert coordinator.heard[0]["metrics"] == {"accuracy": 0.6}
    assert coordinator.heard[0]["progress"] == {"speed": 2.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_value_that_is_not_finite_is_never_sent(remote, value):
    trial, coordinator = remote({"value": False})
    with pytest.raises(Diverged, match=f"value reported at step 4 is {value}"):
        trial.report(value, 4)
    trial.report(0.5, 5)
    assert [message["step"] for message in coordinator.heard] == [5]


def test_an_attribute_is_stored_by_the_coordinator(remote):
    trial, coordinator = remote({"value": None})
    trial.set_user_attr("parameters", 123)
    attribute = {"type": "attribute", "trial": 7, "attempt": 2}
    assert coordinator.heard == [{**attribute, "key": "parameters", "value": 123}]


def test_an_error_answer_is_raised_where_it_was_asked(remote):
    trial, _ = remote({"error": "low <= high must hold"})
    with pytest.raises(ValueError, match="low <= high must hold"):
        trial.suggest_float("p", 1.0, 0.0)
    assert trial.params == {}


@pytest.mark.parametrize(
    "ask",
    [
        lambda trial: trial.suggest_float("p", 0.0, 1.0),
        lambda trial: trial.set_user_attr("key", 1),
    ],
)
def test_a_trial_that_has_ended_answers_no_more(remote, ask):
    trial, _ = remote({"ended": True})
    with pytest.raises(TrialEnded):
        ask(trial)
    assert trial.params == {}


@pytest.mark.parametrize("says", [None, "words", "an end"])
def test_whether_there_is_something_to_receive(pair, says):
    if says == "words":
        pair[0].sendall(b"{")
    if says == "an end":
        pair[0].close()
    assert Channel(pair[1]).is_readable() == (says is not None)


def test_a_descriptor_may_have_a_large_number(pair):
    """Of many workers, and Ray raises the limit."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        large = fcntl.fcntl(pair[1], fcntl.F_DUPFD_CLOEXEC, 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    with socket.socket(fileno=large) as sock:
        assert not Channel(sock).is_readable()
        pair[0].sendall(b"{")
        assert Channel(sock).is_readable()


def test_a_trial_in_a_process_of_its_own(start):
    process, channel = start(OBJECTIVE)
    heard = []
    for answer in (0.25, True):
        heard += channel.receive()
        channel.send({"type": "answer", "value": answer})
    heard += channel.receive()
    assert [message["type"] for message in heard] == ["suggest", "report", "finished"]
    assert heard[1]["value"] == 0.25
    assert heard[2]["pruned"] is True
    assert process.poll() is None


@pytest.mark.parametrize("doing", ["training", "waiting"])
def test_a_worker_ends_when_its_coordinator_dies(start, doing):
    process, channel = start(WORKER, doing)
    assert channel.receive() == [{"type": "begun"}]
    assert process.poll() is None
    channel.close()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_a_worker_that_nobody_hears_ends_without_a_traceback(start, pair):
    process, channel = start(WORKER, "telling")
    assert channel.receive()[0] == {"type": "begun"}
    pair[0].shutdown(socket.SHUT_RD)  # its reading thread learns nothing of this
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
