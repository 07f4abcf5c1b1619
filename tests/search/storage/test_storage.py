import errno
import fcntl
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing

import optuna
import pytest

from search.errors import EXIT_DAMAGED, EXIT_STORAGE_LOST, EXIT_USAGE, SearchError
from search.storage import sqlite_file, storage
from tests.command import ROOT

# Holds a lock until it is told to go on, or killed.
HOLDER = """
import sys
from contextlib import closing
from pathlib import Path
from search.storage import sqlite_file, storage

with storage.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def hold():
    """Starts a process that holds a lock."""
    processes = []

    def hold(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def with_trials(url, num_trials, name="mine"):
    study = storage.at(url).open(name)
    for number in range(num_trials):
        trial = study.ask()
        trial.report(0.25, 1)
        study.tell(trial, trial.suggest_float("x", 0.0, 1.0) + number)
    study._storage.remove_session()
    study._storage._backend.engine.dispose()
    return study


@pytest.mark.parametrize(
    ("pragma", "value"), [("journal_mode", "wal"), ("synchronous", 1), ("busy_timeout", 1_000)]
)
def test_settings_reach_every_connection(url, pragma, value):
    engine = storage.at(url).open("mine")._storage._backend.engine
    # The first is the pool's own, the second can only be a new one.
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value


def test_a_study_is_made_once_and_then_found(url):
    with_trials(url, 2)
    study = storage.at(url).open("mine")
    assert [trial.number for trial in study.trials] == [0, 1]
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert storage.at(url).open("other").trials == []


def test_folders_are_made_for_a_new_study(tmp_path):
    storage.at(f"sqlite:///{tmp_path}/a/b/study.db").open("mine")
    assert (tmp_path / "a" / "b" / "study.db").is_file()


@pytest.mark.fault("X4")
@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:secret@host/studies",
        "SQLITE:///secret.db",
        "sqlite://user:secret@host/file",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:////data/study.db?password=secret",
        "user:secret@host",
        "",
    ],
)
def test_any_other_url_is_refused_without_its_password(url, tmp_path):
    message = r"kept in sqlite:///FILE, .*Write for example --storage sqlite:///runs"
    for use in (storage.at, lambda url: storage.url_in(tmp_path, url or " ")):
        with pytest.raises(SearchError, match=message) as caught:
            use(url)
        assert caught.value.exit_code == EXIT_USAGE
        assert "secret" not in str(caught.value)


def test_without_a_url_the_study_lies_in_the_run_s_folder(tmp_path):
    assert storage.url_in(tmp_path, None) == f"sqlite:///{tmp_path}/study.db"
    assert storage.url_in(tmp_path, "sqlite:///other.db") == "sqlite:///other.db"
    assert storage.at(storage.url_in(tmp_path, None)).path == tmp_path / "study.db"


def test_runs_that_share_a_database_lock_their_own_study(tmp_path, url):
    database = storage.at(url)
    with database.lock("a"), database.lock("b"):
        assert {path.name for path in tmp_path.iterdir()} == {
            ".study.db.a.lock",
            ".study.db.b.lock",
        }


def test_a_database_that_another_run_has_made_meanwhile_is_kept(tmp_path, url):
    """Both have found none; their studies, and so their locks, have different names."""
    with_trials(url, 2)
    sqlite_file._create(tmp_path / "study.db")
    assert len(storage.read_study(url, "mine").trials) == 2
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.fault("K8")
def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path, hold):
    path = tmp_path / "run" / ".lock"
    holder = hold(path)
    named = f"is being run by process {holder.pid} on {socket.gethostname()}; wait for it"
    with pytest.raises(SearchError, match=named) as caught, storage.lock(path):
        pass
    assert caught.value.exit_code == EXIT_USAGE
    assert path.exists()  # the refused one has not removed the holder's
    holder.communicate("go on\n", timeout=10)
    assert not path.exists()
    with storage.lock(path):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not path.exists()


def test_a_killed_holder_holds_nothing(tmp_path, hold):
    path = tmp_path / ".lock"
    holder = hold(path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.exists()
    with storage.lock(path):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not path.exists()


def test_a_lock_is_freed_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), storage.lock(tmp_path / ".lock"):
        _ = 1 / 0
    with storage.lock(tmp_path / ".lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    flock, calls = fcntl.flock, []

    def slow(descriptor, operation):
        if not calls:  # between opening and locking the holder ends
            path.unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with storage.lock(path):
        assert len(calls) == 2
        with pytest.raises(SearchError, match="is being run by process"), storage.lock(path):
            pass


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(SearchError, match=r"can't be locked .*No locks available.*--out"):
        storage.lock(tmp_path / ".lock").__enter__()


def test_a_lock_is_not_taken_through_a_symbolic_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(SearchError, match=r"can't be locked .*symbolic links.*--out"):
        storage.lock(tmp_path / ".lock").__enter__()
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a sound study file."""
    path = tmp_path_factory.mktemp("whole") / "study.db"
    with_trials(f"sqlite:///{path}", 5)
    return path.read_bytes()


def damaged(kind, whole):
    return {
        "empty": b"",
        "garbage": b"this was never a database\n" * 500,
        "short": whole[: len(whole) // 2],
        "zeros": bytes(len(whole)),
        "head": b"\xff" * 100 + whole[100:],
        "page": whole[:4096] + b"\xa5" * 4096 * 3 + whole[4096 * 4 :],
    }[kind]


@pytest.mark.fault("S5")
@pytest.mark.parametrize("kind", ["empty", "garbage", "short", "zeros", "head", "page"])
@pytest.mark.parametrize("open_", [storage.Database.open, storage.Database.read])
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path, whole, kind, open_):
    path = tmp_path / "study.db"
    content = damaged(kind, whole)
    path.write_bytes(content)
    rule = f"the study file {path} is damaged .*puts the newest snapshot back"
    with pytest.raises(SearchError, match=rule) as caught:
        open_(storage.at(f"sqlite:///{path}"), "mine")
    assert caught.value.exit_code == EXIT_DAMAGED
    assert path.read_bytes() == content


@pytest.mark.parametrize("open_", [storage.Database.open, storage.Database.read])
def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path, open_):
    (tmp_path / "study.db").mkdir()
    with pytest.raises(SearchError, match=r"study\.db is damaged") as caught:
        open_(storage.at(f"sqlite:///{tmp_path}/study.db"), "mine")
    assert caught.value.exit_code == EXIT_DAMAGED


def test_the_command_line_says_so_in_one_line(tmp_path):
    (tmp_path / "study.db").write_bytes(b"garbage" * 1000)
    shown = subprocess.run(
        [sys.executable, "-m", "search", "show", "--study", "quickstart", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (shown.returncode, shown.stdout) == (EXIT_DAMAGED, "")
    assert shown.stderr.startswith("fmnist-search: the study file ")
    assert shown.stderr.count("\n") == 1


@pytest.mark.fault("S5")
def test_a_study_that_is_read_cannot_be_written(tmp_path, url):
    with_trials(url, 2)
    before = (tmp_path / "study.db").read_bytes()
    study = storage.read_study(url, "mine")
    assert [trial.number for trial in study.trials] == [0, 1]
    for write in (
        lambda: study.set_user_attr("key", 1),
        lambda: study._storage._backend.delete_study(study._study_id),
    ):
        with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
            write()
        assert "readonly database" in str(caught.value.__cause__)
    assert (tmp_path / "study.db").read_bytes() == before


def test_a_study_is_read_while_it_is_written(url):
    study = storage.at(url).open("mine")
    trial = study.ask()
    reader = storage.read_study(url, "mine")
    assert len(reader.trials) == 1
    study.tell(trial, 0.5)
    assert reader.best_value == 0.5


def test_what_is_not_there_is_not_read(tmp_path, url):
    assert storage.read_study(url, "mine") is None
    assert list(tmp_path.iterdir()) == []
    with_trials(url, 1)
    assert storage.read_study(url, "another") is None


@pytest.mark.parametrize("name", ["a b", "ü", "a&b=c", "a'b", "a:b", "~"])
def test_a_folder_may_have_an_odd_name(tmp_path, name):
    url = f"sqlite:///{tmp_path}/{name}/study.db"
    with_trials(url, 3)
    assert len(storage.read_study(url, "mine").trials) == 3
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a#b", "a%41b", "a?b", "{a}", "{}"])
def test_a_folder_that_no_url_can_name_is_refused(tmp_path, name):
    with pytest.raises(SearchError, match="another --out") as caught:
        storage.url_in(tmp_path / name, None)
    assert caught.value.exit_code == EXIT_USAGE


def test_another_program_s_database_is_no_study(tmp_path, url):
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("CREATE TABLE notes (text TEXT)")
    with pytest.raises(SearchError, match="is no Optuna study: another program") as caught:
        storage.read_study(url, "mine")
    assert caught.value.exit_code == EXIT_DAMAGED


def test_a_new_study_appears_whole(tmp_path, url, monkeypatch):
    """Killed just before it takes its name, and then started again."""

    def die(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as at_the_link:
        at_the_link.setattr(os, "link", die)
        with pytest.raises(KeyboardInterrupt):
            storage.at(url).open("mine")
    assert storage.read_study(url, "mine") is None
    assert storage.at(url).open("mine").trials == []
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"study.db", "study.db-wal", "study.db-shm"}


def test_what_the_database_raises_becomes_one_line(tmp_path, url):
    with_trials(url, 1)
    study = storage.read_study(url, "mine")
    rule = r"study\.db can't be written: attempt to write a readonly database; free space"
    with pytest.raises(SearchError, match=rule) as caught, storage.at(url).failures_named():
        study.set_user_attr("key", 1)
    assert caught.value.exit_code == EXIT_STORAGE_LOST
    with pytest.raises(KeyError), storage.at(url).failures_named():
        raise KeyError("not the storage's")


def test_reports_after_a_step_are_dropped_from_that_trial_alone(url):
    study = storage.at(url).open("mine")
    trials = [study.ask(), study.ask()]
    for trial in trials:
        for step in range(1, 6):
            trial.report(step / 10, step)
    storage.drop_reports_after(study, trials[0]._trial_id, 2)
    stored = [trial.intermediate_values for trial in study.trials]
    assert stored[0] == {1: 0.1, 2: 0.2}
    assert list(stored[1]) == [1, 2, 3, 4, 5]
    study.tell(trials[0], 0.2)
    assert storage.read_study(url, "mine").trials[0].last_step == 2
