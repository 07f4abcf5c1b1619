import json
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from search.errors import Interrupted, SearchError
from search.workers import pool as pools
from search.workers import slots
from search.workers.devices import Device
from search.workers.local import LocalEngine, environment
from search.workers.pool import Pool
from search.workers.protocol import Channel

OPENING = {"type": "open", "file": "mine.py"}
MB = 2**20

# Notes what it finds when it is loaded, before anything that comes after that.
STUDY = """
import json, os, sys
from pathlib import Path

NAMES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
found = {{name: os.environ[name] for name in NAMES}}
found["heavy"] = sorted({{"keras", "tensorflow", "optuna"}} & set(sys.modules))
Path(__file__).with_name("found.json").write_text(json.dumps(found))

from studies.study import Study

{body}

study = Study(name="mine", space=build)
"""


class Worker:
    """A worker whose end of the socket the test holds."""

    pid = 1
    host = "here"
    log = Path("worker.log")

    def __init__(self, device):
        ours, theirs = socket.socketpair()
        theirs.settimeout(5)
        self.channel = Channel(ours)
        self.device = device
        self.killed = False
        self.ending = 0  # as subprocess says it: below 0 is a signal
        self._theirs = Channel(theirs)

    def say(self, type_, **content):
        self._theirs.send({"type": type_, **content})

    def hear(self):
        return self._theirs.receive()

    def die(self, ending=-9):
        self.ending = ending
        self._theirs.close()

    def die_unheard(self):
        """A child of it lives on and holds its socket."""
        self.ending = -9

    def babble(self):
        self._theirs._socket.sendall(b"no sense\n")

    def is_alive(self):
        return not self.ending

    def was_killed(self):
        return self.ending < 0

    def ran_out_of_memory(self):
        return False

    def be_ready(self, rss=100 * MB):
        self.say("described", name="mine")
        self.say("ready", rss=rss, space=[])

    def kill(self):
        self.killed = True
        self.channel.close()

    def post_mortem(self):
        return "ended by signal 9\nlast words"


class Engine:
    has_wide_workers = True

    def __init__(self):
        self.started = []
        self.joining = []

    def provide(self, settings):
        return settings | {"there": True}

    def joined(self):
        joined, self.joining = self.joining, []
        return joined

    def start(self, device, slot):
        self.started.append(Worker(device))
        return self.started[-1]


@pytest.fixture
def make():
    """A pool of so many workers, entered."""
    entered = []

    def make(num_workers=1):
        engine = Engine()
        pool = Pool(engine, [Device(threads=1)] * num_workers, OPENING)
        entered.append((pool, engine))
        return pool.__enter__(), engine

    yield make
    for pool, engine in entered:
        pool.__exit__()
        for worker in engine.started:
            worker.die()


@pytest.fixture
def busy(make):
    """A pool with one worker at its second attempt at trial 4."""
    pool, engine = make()
    (worker,) = engine.started
    worker.be_ready()
    assert heard(pool) == []
    pool.give(pool.slots[0], 4, 2, {"task": "trial"})
    worker.hear()
    return SimpleNamespace(pool=pool, engine=engine, worker=worker, slot=pool.slots[0])


def heard(pool):
    return list(pool.poll(0.2))


def listen(pool, until=None):
    """Time in which nobody listens is not the worker's: a second of polls, or until it is so."""
    end, events, polls = time.monotonic() + 30, [], 0
    while not until() if until else polls < 5:
        events += heard(pool)
        polls += 1
        assert time.monotonic() < end
    return events


def talking(make, num_workers):
    """A pool of workers that are all at a trial, and what one says."""
    pool, engine = make(num_workers)
    for worker in engine.started:
        worker.be_ready()
    listen(pool, lambda: len(pool.idle()) == num_workers)
    for number, slot in enumerate(pool.slots):
        pool.give(slot, number, 1, {"task": "trial"})
    return pool, lambda of: engine.started[of].say("progress", trial=of, attempt=1, note="")


def test_what_many_say_within_a_moment_is_heard_at_once(make, monkeypatch):
    monkeypatch.setattr("search.workers.pool._MANY", 1)
    monkeypatch.setattr("search.workers.pool._GATHERING", 0.5)
    pool, say = talking(make, 2)
    say(0)
    threading.Timer(0.1, say, [1]).start()
    assert sorted(event.task.trial for event in heard(pool)) == [0, 1]


def test_a_death_without_a_word_is_seen_while_others_talk(make):
    pool, say = talking(make, 2)
    pool.slots[1].worker.die_unheard()
    end, events = time.monotonic() + 10, []
    while not any(event.lost for event in events):
        say(0)
        events += heard(pool)
        assert time.monotonic() < end


def test_a_worker_is_opened_described_prepared_and_ready(make):
    pool, engine = make()
    (worker,) = engine.started
    assert worker.hear() == [OPENING]
    worker.say("described", name="mine", epochs=5)
    assert pool.wait_for_description()["epochs"] == 5
    assert pool.idle() == []
    pool.prepare({"seed": 1})
    settings = {"seed": 1, "there": True}  # as the engine provides
    assert worker.hear() == [{"type": "prepare", "settings": settings, "search": True}]
    worker.say("ready", rss=1, space=[{"name": "x"}])
    assert pool.wait_for_space()["space"] == [{"name": "x"}]
    assert pool.idle() == pool.slots


def test_a_late_worker_is_prepared_when_it_describes_itself(make):
    pool, engine = make(2)
    for worker in engine.started:
        worker.hear()
    engine.started[0].say("described", name="mine")
    pool.wait_for_description()
    pool.prepare({"seed": 1})
    engine.started[1].say("described", name="other")
    assert heard(pool) == []
    assert engine.started[1].hear() == [
        {"type": "prepare", "settings": {"seed": 1, "there": True}, "search": True}
    ]
    assert pool.described["name"] == "mine"  # the first one's word stands


def test_a_task_is_given_answered_and_finished(busy):
    pool, worker, slot = busy.pool, busy.worker, busy.slot
    assert pool.busy() == [slot]
    assert pool.idle() == []
    worker.say("suggest", trial=4, attempt=2, name="x")
    (event,) = heard(pool)
    assert (event.slot, event.message["name"], event.lost) == (slot, "x", None)
    pool.answer(slot, value=0.5)
    assert worker.hear() == [{"type": "answer", "trial": 4, "attempt": 2, "value": 0.5}]
    worker.say("finished", trial=4, attempt=2, rss=100 * MB, outcome="complete")
    (event,) = heard(pool)
    assert (event.task.trial, event.task.attempt) == (4, 2)
    assert pool.idle() == [slot]


@pytest.mark.fault("K5")
@pytest.mark.parametrize(
    ("message", "overdue"),
    [
        ({"type": "report", "step": 1, "value": 0.5}, "said nothing for 601 s"),
        ({"type": "progress", "step": 1, "of": 9}, "said nothing for 601 s"),  # a winner's
        ({"type": "progress", "note": "computing activations"}, ""),  # no rhythm to go by
    ],
)
def test_a_worker_that_is_silent_for_ten_times_its_interval_hangs(monkeypatch, message, overdue):
    task = slots.Task(0, 1, {})
    for now in (10.0, 70.0, 130.0):
        monkeypatch.setattr(pools.time, "monotonic", lambda now=now: now)
        task.hear(message)
    assert task.overdue(None, 130.0 + 599) == ""
    assert task.overdue(None, 130.0 + 601) == overdue


@pytest.mark.parametrize("interval", [0.1, 1.0, 30.0])
def test_a_worker_of_quick_reports_has_five_minutes(monkeypatch, interval):
    task = slots.Task(0, 1, {})
    for report in range(3):
        now = 10.0 + report * interval
        monkeypatch.setattr(pools.time, "monotonic", lambda now=now: now)
        task.hear({"type": "report", "step": report + 1, "value": 0.5})
    assert task.overdue(None, now + 299) == ""
    assert task.overdue(None, now + 301) == "said nothing for 301 s"


@pytest.mark.parametrize("stamp", [{"trial": 4, "attempt": 1}, {"trial": 3, "attempt": 2}])
@pytest.mark.parametrize("type_", ["suggest", "report", "attribute", "progress", "finished"])
def test_what_an_old_attempt_says_is_dropped(busy, type_, stamp):
    busy.worker.say(type_, **stamp, rss=900 * MB)
    assert heard(busy.pool) == []
    assert busy.pool.busy() == [busy.slot]
    busy.worker.say("report", trial=4, attempt=2)
    assert [event.message["type"] for event in heard(busy.pool)] == ["report"]


def test_what_is_said_after_the_end_is_dropped(busy):
    busy.worker.say("finished", trial=4, attempt=2, rss=1)
    busy.worker.say("report", trial=4, attempt=2)
    assert [event.message["type"] for event in heard(busy.pool)] == ["finished"]
    busy.pool.answer(busy.slot, value=True)  # to nobody
    busy.worker.say("report", trial=4, attempt=2)
    assert heard(busy.pool) == []


def test_a_dead_worker_is_lost_and_replaced(busy):
    busy.worker.say("report", trial=4, attempt=2, value=0.5)
    busy.worker.die()
    events = heard(busy.pool) + heard(busy.pool)
    assert [event.message["type"] for event in events] == ["report", "lost"]
    assert events[1].lost == "ended by signal 9\nlast words"
    assert (events[1].task.trial, events[1].task.attempt) == (4, 2)
    assert busy.worker.killed  # its process is reaped
    new = busy.engine.started[1]
    assert busy.slot.worker is new
    assert new.hear() == [OPENING]
    assert busy.pool.idle() == busy.pool.busy() == []
    new.be_ready()
    assert heard(busy.pool) == []
    assert busy.pool.idle() == [busy.slot]


def test_a_worker_that_dies_idle_is_replaced_without_a_word(make):
    pool, engine = make()
    engine.started[0].be_ready()
    heard(pool)
    engine.started[0].die()
    assert heard(pool) == []
    assert len(engine.started) == 2


def test_a_task_given_to_a_worker_that_has_just_died_is_lost(make):
    pool, engine = make()
    engine.started[0].be_ready()
    heard(pool)
    engine.started[0].die()
    pool.give(pool.slots[0], 0, 1, {"task": "trial"})
    assert [event.message["type"] for event in heard(pool)] == ["lost"]


def test_a_dead_worker_is_lost_though_its_socket_is_open(busy):
    busy.worker.say("report", trial=4, attempt=2, value=0.5)
    busy.worker.die_unheard()
    events = heard(busy.pool) + heard(busy.pool)
    assert [event.message["type"] for event in events] == ["report", "lost"]
    assert len(busy.engine.started) == 2


@pytest.mark.parametrize("nonsense", ["babble", "say"])
def test_a_worker_that_speaks_no_sense_is_lost(busy, nonsense):
    if nonsense == "say":
        busy.worker.say("report")  # of which trial?
    else:
        busy.worker.babble()
    assert [event.message["type"] for event in heard(busy.pool)] == ["lost"]
    assert busy.worker.killed


def test_what_made_sense_before_the_nonsense_counts(busy):
    busy.worker.say("finished", trial=4, attempt=2, rss=MB)
    busy.worker._theirs.send({})
    events = heard(busy.pool) + heard(busy.pool)
    assert [event.message["type"] for event in events] == ["finished"]
    assert busy.worker.killed
    assert len(busy.engine.started) == 2


@pytest.mark.parametrize(("ending", "most"), [(-9, 12), (3, 3)])
def test_deaths_before_ready_end_the_run(make, ending, most):
    pool, engine = make()
    for number in range(most - 1):
        engine.started[number].die(ending)
        assert heard(pool) == []
    engine.started[most - 1].say("described", name="mine")  # that is not ready
    engine.started[most - 1].die(ending)
    rule = f"{most} workers in a row ended before they were ready; the last ended by signal 9"
    with pytest.raises(SearchError, match=rule) as caught:
        pool.wait_for_space()
    assert caught.value.detail == "ended by signal 9\nlast words"


def test_deaths_with_a_ready_worker_between_them_do_not(make):
    pool, engine = make()
    for number in range(6):
        if number % 2:
            engine.started[number].be_ready()
            heard(pool)
        engine.started[number].die(ending=3)
        heard(pool)
    assert len(engine.started) == 7


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(pools, "LONGEST_START", 0.5)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("described", [False, True])
def test_a_worker_that_never_becomes_ready_is_replaced(make, described):
    pool, engine = make()
    for number in range(2):
        if described:
            pool.prepare({})
            engine.started[number].say("described", name="mine")
        assert listen(pool, lambda number=number: engine.started[number].killed) == []
    doing = "preparing" if described else "loading the study"
    if described:
        engine.started[2].say("described", name="mine")
    rule = (
        rf"3 workers in a row .* ready; the last was still {doing} after \d s \(--silence .*\), see"
    )
    with pytest.raises(SearchError, match=rule) as caught:
        pool.wait_for_space()
    first, *last_words = caught.value.detail.splitlines()
    assert first.startswith("was still")
    assert last_words == ["last words"]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("why", ["the data are fetched", "a cluster has no room", "asked for"])
def test_who_is_not_late(make, why):
    pool, engine = make()
    (worker,) = engine.started
    if why == "the data are fetched":
        worker.say("described", name="mine")
    elif why == "a cluster has no room":
        worker.pid = 0
    else:
        pool._silence = 60.0  # by --silence
    assert listen(pool) == []
    assert not worker.killed
    if why != "asked for":  # from now on it is
        worker.pid = 1
        pool.prepare({})
        listen(pool, lambda: worker.killed)


@pytest.mark.usefixtures("hasty")
def test_a_task_that_waits_for_a_worker_that_is_never_ready_is_lost(sharing):
    pool, engine = sharing
    pool.give(pool.slots[1], 4, 2, {"task": "trial"}, alone=True)
    engine.started[-2].be_ready()  # the other, which was replaced too
    own = engine.started[-1]
    (event,) = listen(pool, lambda: own.killed)
    assert (event.task.trial, event.kind) == (4, "killed")
    assert event.lost.startswith("was still loading the study after")
    assert event.lost.endswith("\nlast words")


@pytest.mark.parametrize(("ending", "is_end"), [(-9, False), (3, True)])
def test_kills_once_a_worker_has_been_ready_are_somebody_else_s(make, ending, is_end):
    pool, engine = make()
    engine.started[0].be_ready()
    heard(pool)
    for number in range(3):
        engine.started[number].die(ending)
        heard(pool)
    engine.started[3].die(ending)
    if not is_end:
        assert heard(pool) == []
        assert len(engine.started) == 5
        return
    with pytest.raises(SearchError, match="3 workers in a row"):
        heard(pool)


def test_a_slot_whose_workers_never_start_does_not_end_what_others_do(make, monkeypatch):
    """It is tried on, later and later; once nobody else is left, that is the end."""
    monkeypatch.setattr(pools, "_FIRST_PAUSE", 0.3)
    pool, engine = make(2)
    good, bad = engine.started
    good.be_ready()
    heard(pool)
    for _ in range(2):
        bad.die(ending=3)
        assert heard(pool) == []
        bad = engine.started[-1]
    bad.die(ending=3)
    heard(pool)
    assert (len(engine.started), pool.slots[1].worker) == (4, None)
    assert pool.idle() == [pool.slots[0]]
    time.sleep(0.3)
    heard(pool)
    assert len(engine.started) == 5
    engine.started[-1].be_ready()
    heard(pool)
    assert len(pool.idle()) == 2
    for worker in (good, engine.started[-1]):  # both end when they are idle, then never start
        worker.die(ending=3)

    def end_all():
        while True:
            heard(pool)
            for worker in engine.started[5:]:
                if not worker.killed:
                    worker.die(ending=3)

    with pytest.raises(SearchError, match="3 workers in a row ended before they were ready"):
        end_all()


def test_a_worker_that_can_t_begin_later_is_tried_again(make):
    pool, engine = make(2)
    engine.started[0].be_ready()
    heard(pool)
    engine.started[1].say("failed", message="the study can't be loaded: SyntaxError")
    assert heard(pool) == []
    assert engine.started[1].killed
    engine.started[2].be_ready()
    heard(pool)
    assert len(pool.idle()) == 2


def test_a_worker_with_another_space_ends_the_run(make):
    pool, engine = make(2)
    engine.started[0].be_ready()
    heard(pool)
    engine.started[1].say("described", name="mine")
    engine.started[1].say("ready", rss=MB, space=[{"name": "units"}])
    with pytest.raises(SearchError, match="the study's file has changed while it was run"):
        heard(pool)


def test_workers_of_another_precision_end_the_run(make):
    pool, engine = make(2)
    for worker, precision in zip(engine.started, ("bfloat16", "float32"), strict=True):
        worker.say("described", name="mine")
        worker.say("ready", rss=MB, space=[], precision=precision)
    with pytest.raises(SearchError, match=r"some train in .*others in .*Fix: give --precision"):
        heard(pool)


def test_a_worker_of_another_precision_that_comes_later_is_left_out(make, caplog):
    pool, engine = make(2)
    engine.started[0].say("described", name="mine")
    engine.started[0].say("ready", rss=MB, space=[], precision="float32")
    heard(pool)
    pool.give(pool.slots[0], 0, 1, {"task": "trial"})
    engine.started[1].say("described", name="mine")
    engine.started[1].say("ready", rss=MB, space=[], precision="bfloat16")
    assert heard(pool) == []
    assert engine.started[1].killed
    assert "some train in bfloat16, others in float32" in caplog.text


def test_workers_get_no_password_of_the_storage(monkeypatch):
    for name in ("PGPASSWORD", "PGPASSFILE", "PGUSER"):
        monkeypatch.setenv(name, "secret")
    given = environment(Device(threads=1))
    assert "PGUSER" in given
    assert not {"PGPASSWORD", "PGPASSFILE"} & given.keys()


def test_a_worker_that_cannot_be_started_leaves_none_behind():
    engine = Engine()
    start = engine.start

    def fails(device, slot):
        if engine.started:
            raise SearchError("no more processes")
        return start(device, slot)

    engine.start = fails
    with pytest.raises(SearchError, match="no more"):
        Pool(engine, [Device(threads=1)] * 2, OPENING).__enter__()
    assert engine.started[0].killed
    engine.started[0].die()


def test_a_coordinator_that_is_always_a_little_busy_excuses_nobody(busy):
    busy.pool._silence = 0.5
    end = time.monotonic() + 20
    while not busy.worker.killed and time.monotonic() < end:
        list(busy.pool.poll(0.0))
        time.sleep(0.05)  # it stores and asks
    assert busy.worker.killed


def test_the_time_in_which_the_coordinator_was_stopped_is_not_the_worker_s(busy, monkeypatch):
    busy.pool._silence = 0.5
    plain = busy.pool._selector.select

    def select(timeout):
        time.sleep(1)
        return plain(0)

    monkeypatch.setattr(busy.pool._selector, "select", select)
    assert heard(busy.pool) == heard(busy.pool) == []
    assert not busy.worker.killed


@pytest.mark.fault("K7")
def test_a_signal_that_reached_the_workers_too_costs_no_attempt(busy, monkeypatch):
    """It comes while the coordinator waits for them."""
    plain = busy.pool._selector.select

    def select(timeout):
        busy.worker.die(ending=-15)
        busy.pool.interrupted = 15
        return plain(timeout)

    monkeypatch.setattr(busy.pool._selector, "select", select)
    with pytest.raises(Interrupted):
        heard(busy.pool)


@pytest.mark.parametrize(("grown", "num_started"), [(0, 1), (pools.MAX_GROWTH, 1),
                                                    (pools.MAX_GROWTH + MB, 2)])  # fmt: skip
def test_a_worker_that_has_grown_is_replaced(busy, grown, num_started):
    # The first task's end is the measure, not the worker's start: Keras fills its caches.
    for attempt, rss in ((2, 600 * MB), (3, 600 * MB + grown)):
        busy.worker.say("finished", trial=4, attempt=attempt, rss=rss)
        assert [event.task.attempt for event in heard(busy.pool)] == [attempt]
        assert len(busy.engine.started) == (num_started if attempt == 3 else 1)
        if attempt == 2:
            busy.pool.give(busy.slot, 4, 3, {"task": "trial"})
    assert busy.worker.killed == (num_started == 2)
    assert (busy.pool.idle() == []) == (num_started == 2)


def test_a_signal_ends_the_polling(busy):
    busy.worker.say("report", trial=4, attempt=2)
    busy.pool.interrupted = 15
    with pytest.raises(Interrupted, match="interrupted by signal 15") as caught:
        heard(busy.pool)
    assert caught.value.number == 15


def test_a_study_that_fails_to_load_ends_the_run(make):
    pool, engine = make()
    engine.started[0].say("failed", message="the study can't be loaded: x", traceback="the frames")
    with pytest.raises(SearchError, match="can't be loaded: x") as caught:
        pool.wait_for_description()
    assert caught.value.detail == "the frames"


def test_other_threads_need_another_worker(make):
    pool, engine = make()
    pool.give_threads(pool.slots[0], 1)
    assert len(engine.started) == 1
    pool.give_threads(pool.slots[0], 4)
    assert [worker.device.threads for worker in engine.started] == [1, 4]
    assert engine.started[0].killed


def test_a_task_that_is_alone_finds_no_memory_kept_by_the_others(make):
    pool, engine = make(2)
    for worker in engine.started:
        worker.be_ready()
    while len(pool.idle()) < 2:
        heard(pool)
    pool.give(pool.slots[1], 4, 1, {"task": "trial"}, alone=True)
    assert [worker.killed for worker in engine.started] == [True, False, False]
    assert pool.busy() == [pool.slots[1]]
    assert pool.idle() == []


def test_a_task_that_is_alone_leaves_other_hosts_alone(make):
    pool, engine = make(2)
    engine.started[0].host = "there"
    for worker in engine.started:
        worker.be_ready()
    while len(pool.idle()) < 2:
        heard(pool)
    pool.give(pool.slots[1], 4, 1, {"task": "trial"}, alone=True)
    assert [worker.killed for worker in engine.started] == [False, False]


@pytest.fixture
def sharing(make):
    """A pool of two workers, idle, with half of a GPU's memory each."""
    pool, engine = make(2)
    for slot in pool.slots:
        slot.device = Device(1, "0", share=0.5)
    for worker in engine.started:
        worker.be_ready()
    while len(pool.idle()) < 2:
        heard(pool)
    return pool, engine


def test_a_task_that_is_alone_has_its_gpu_s_whole_memory(sharing):
    pool, engine = sharing
    slot = pool.slots[1]
    pool.give(slot, 4, 2, {"task": "trial"}, alone=True)
    other, own = engine.started[2:]
    assert (other.device.share, own.device.share) == (0.5, 1.0)
    assert own.hear() == [OPENING]  # not ready to be told more
    own.be_ready()
    heard(pool)
    assert own.hear() == [{"type": "start", "trial": 4, "attempt": 2, "task": "trial"}]
    own.say("finished", trial=4, attempt=2, outcome="complete", rss=1)
    (event,) = heard(pool)
    assert event.message["outcome"] == "complete"
    assert own.killed
    assert engine.started[-1].device.share == 0.5


def test_a_task_that_waits_for_its_worker_is_not_late(sharing):
    pool, engine = sharing
    pool.give(pool.slots[1], 4, 2, {"task": "trial"}, timeout=0.3, alone=True)
    time.sleep(0.4)
    assert heard(pool) == []
    engine.started[-1].be_ready()
    assert heard(pool) == []  # its time begins now
    events = []
    while not events:
        events = heard(pool)
    assert events[0].kind == "timeout"


def test_one_that_may_not_take_all_of_its_gpu_s_memory_may_fit_alone(make):
    pool, _ = make(1)
    pool.slots[0].device = Device(1, "0", share=0.5)
    assert pool.shares_memory(pool.slots[0])


@pytest.mark.parametrize("how", ["dies", "fails"])
def test_a_task_that_waits_for_its_worker_is_lost_with_it(sharing, how):
    pool, engine = sharing
    pool.give(pool.slots[1], 4, 2, {"task": "trial"}, alone=True)
    own = engine.started[-1]
    if how == "dies":
        own.die()
    else:
        pool.space = {"space": []}
        own.say("failed", message="no device")
    (event,) = heard(pool)
    assert (event.task.trial, event.lost is not None) == (4, True)
    assert engine.started[-1].device.share == 0.5


@pytest.mark.parametrize(
    ("gpus", "hosts", "shares"),
    [
        ((None, None), ("here", "here"), True),  # the host's memory
        (("0", "0"), ("here", "here"), True),
        (("0", "1"), ("here", "here"), False),
        (("0", "0"), ("here", "there"), False),
    ],
)
def test_who_shares_a_gpu(make, gpus, hosts, shares):
    pool, engine = make(2)
    for slot, worker, gpu, host in zip(pool.slots, engine.started, gpus, hosts, strict=True):
        slot.device, worker.host = Device(1, gpu), host
        worker.be_ready()
    while len(pool.idle()) < 2:
        heard(pool)
    assert [pool.shares_memory(slot) for slot in pool.slots] == [shares] * 2


def test_a_device_that_joins_gets_a_worker(make):
    pool, engine = make()
    engine.joining = [Device(threads=2)]
    heard(pool)
    heard(pool)
    assert [worker.device.threads for worker in engine.started] == [1, 2]
    engine.started[1].be_ready()
    while not pool.idle():
        heard(pool)
    assert pool.idle() == [pool.slots[1]]


def test_tasks_that_nobody_waits_for_are_dropped_with_their_worker(make):
    pool, engine = make(2)
    for worker in engine.started:
        worker.be_ready()
    while len(pool.idle()) < 2:
        heard(pool)
    pool.give(pool.slots[1], 4, 1, {"task": "trial"})
    pool.drop_tasks()
    assert pool.busy() == []
    assert [worker.killed for worker in engine.started] == [False, True, False]


def test_all_workers_end_with_the_pool():
    engine = Engine()
    with Pool(engine, [Device(threads=1)] * 3, OPENING) as pool:
        engine.started[1].die()
        heard(pool)
    assert [worker.killed for worker in engine.started] == [True] * 4
    for worker in engine.started:
        worker.die()


# Real processes


def real_pool(folder, body, device=None):
    file = folder / "mine.py"
    file.write_text(STUDY.format(body=body))
    return Pool(
        LocalEngine(folder / "logs"),
        [device or Device(threads=1)],
        {"type": "open", "file": str(file)},
    )


@pytest.mark.parametrize(
    ("device", "gpus", "threads"),
    [(Device(threads=1, gpu="1"), "1", "1"), (Device(threads=3), "", "3")],
)
@pytest.mark.slow
def test_a_worker_has_its_devices_before_keras_is_imported(
    tmp_path, monkeypatch, device, gpus, threads
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with real_pool(tmp_path, "def build(hp): ...", device) as pool:
        assert pool.wait_for_description()["kind"] == "space"
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "CUDA_VISIBLE_DEVICES": gpus,
        "OMP_NUM_THREADS": threads,
        "TF_NUM_INTRAOP_THREADS": threads,
        "heavy": [],
    }


@pytest.mark.slow
def test_a_killed_process_is_lost_and_reaped(tmp_path):
    with real_pool(tmp_path, "def build(hp): ...") as pool:
        pool.wait_for_description()
        first = pool.slots[0].worker
        first.process.kill()
        while pool.slots[0].worker is first:
            assert heard(pool) == []
        assert first.process.returncode == -9
        assert first.post_mortem().splitlines()[0] == "ended by signal 9"
        first.log.unlink()  # somebody has cleaned up
        assert first.post_mortem() == "ended by signal 9"


@pytest.mark.fault("K6")
@pytest.mark.slow
def test_a_process_that_hangs_while_it_loads_is_replaced(tmp_path, monkeypatch):
    body = """
hung = Path(__file__).with_name("hung")
if not hung.exists():
    hung.touch()
    import time; time.sleep(600)
def build(hp): ...
"""
    with real_pool(tmp_path, body) as pool:
        while not (tmp_path / "hung").exists():
            heard(pool)
        hung = pool.slots[0].worker
        monkeypatch.setattr(pools, "LONGEST_START", 0.5)
        while pool.slots[0].worker is hung:
            heard(pool)
        monkeypatch.setattr(pools, "LONGEST_START", 600.0)
        assert pool.wait_for_description()["name"] == "mine"
        assert hung.process.returncode == -9


def test_workers_that_die_while_loading_end_the_run_with_their_last_words(tmp_path):
    body = "print('last words', file=sys.stderr, flush=True); os._exit(3)"
    rule = f"3 workers in a row .* ended with exit code 3, see {re.escape(str(tmp_path))}"
    with (
        real_pool(tmp_path, body) as pool,
        pytest.raises(SearchError, match=rule) as caught,
    ):
        pool.wait_for_description()
    assert caught.value.detail == "ended with exit code 3\nlast words"


def test_an_error_in_the_study_s_file_is_shown_with_the_user_s_frames(tmp_path):
    with (
        real_pool(tmp_path, "import no_such_module") as pool,
        pytest.raises(SearchError, match="can't be loaded: ModuleNotFoundError: No mod") as caught,
    ):
        pool.wait_for_description()
    assert f'File "{tmp_path}/mine.py"' in caught.value.detail
    assert "catalogue.py" not in caught.value.detail


@pytest.mark.parametrize("how", ["coordinator", "kill"])
def test_a_worker_ends_with_all_that_it_has_started(tmp_path, how):
    file = tmp_path / "mine.py"
    child = "import subprocess; child = subprocess.Popen(['sleep', '60'])"
    file.write_text(f"{child}; raise ValueError(child.pid)")
    worker = LocalEngine(tmp_path).start(Device(threads=1), 0)
    worker.channel.send({"type": "open", "file": str(file)})
    (message,) = worker.channel.receive()
    process = psutil.Process(int(message["message"].rpartition(" ")[2]))
    if how == "kill":
        worker.kill()
    worker.channel.close()
    end = time.monotonic() + 20
    while worker.is_alive() or is_alive(process):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert worker.was_killed()


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
