"""Studies in a real PostgreSQL: what differs from a file."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import optuna
import pytest

from search.errors import EXIT_STORAGE_LOST, EXIT_USAGE, SearchError
from search.storage import moving, storage
from search.view import notes
from tests import invariants
from tests.command import ROOT, Command
from tests.server import server

pytest.importorskip("psycopg", reason="pip install '.[test]' brings psycopg")


@pytest.fixture(scope="module")
def postgres():
    with server() as running:
        yield running


@pytest.fixture
def url(postgres):
    return postgres.database()


def add_trials(url, number=3, name="mine"):
    database = storage.at(url)
    with database.lock(name):
        study = database.open(name)
        study.set_user_attr("run", {"seed": 1, "text": "ü\u0000"})
        study._storage.set_study_system_attr(study._study_id, "inner", [1.5])
        for _ in range(number):
            trial = study.ask()
            x = trial.suggest_float("x", 1e-9, 1.0, log=True)
            trial.suggest_categorical("kind", ["a", "b", None])
            for step in (1, 2):
                trial.report(x / step, step)
            trial.set_user_attr("seconds", 0.1)
            study.tell(trial, x)
        pruned = study.ask()
        pruned.report(float("inf"), 1)
        study.tell(pruned, state=optuna.trial.TrialState.PRUNED)
        study.enqueue_trial({"x": 0.5}, user_attrs={"known_point": 0})
        study.ask()
        study.enqueue_trial({"x": 0.25})


def content(url):
    study = storage.read_study(url, "mine")
    trials = [
        (t.number, t.state, t.params, t.distributions, t.values, t.intermediate_values,
         t.user_attrs, t.system_attrs, t.datetime_start, t.datetime_complete)
        for t in study.trials
    ]  # fmt: skip
    inner = study._storage.get_study_system_attrs(study._study_id)
    found = trials, study.user_attrs, inner, study.directions
    study._storage._backend.engine.dispose()
    return found


def test_a_study_is_made_read_and_not_written_by_a_reader(url):
    assert storage.read_study(url, "mine") is None
    add_trials(url)
    study = storage.read_study(url, "mine")
    assert [trial.number for trial in study.trials] == list(range(6))
    with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
        study.set_user_attr("key", 1)
    assert "read-only transaction" in str(caught.value.__cause__)
    assert storage.read_study(url, "another") is None
    with study._storage._backend.engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW timezone").scalar() == "UTC"


HOLDER = """
import sys
from search.storage import storage
with storage.at(sys.argv[1]).lock("mine"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.fault("K8")
def test_a_lock_names_its_holder_and_dies_with_it(url):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with storage.at(url).lock("another"):
        pass
    rule = f"being run by process {holder.pid} on .*another --storage"
    with pytest.raises(SearchError, match=rule) as caught, storage.at(url).lock("mine"):
        pass
    assert caught.value.exit_code == EXIT_USAGE
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with storage.at(url).lock("mine"):
        pass


@pytest.mark.fault("S2")
@pytest.mark.slow
def test_s2_a_writer_takes_its_lock_again_after_an_outage(postgres, url):
    database = storage.at(url)
    with database.lock("mine"):
        study = database.open("mine")
        for _ in range(2):
            postgres.control("restart", "-m", "immediate")
            study.ask()
            with pytest.raises(SearchError, match="is being run by"), storage.at(url).lock("mine"):
                pass
        assert [trial.number for trial in study.trials] == [0, 1]


@pytest.mark.fault("S2")
def test_s2_a_writer_whose_study_was_taken_meanwhile_writes_nothing(postgres, url):
    database, other = storage.at(url), storage.at(url)
    with database.lock("mine"):
        study = database.open("mine")
        postgres.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name LIKE 'fmnist-search%'"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, url], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SearchError, match=f"is being run by process {holder.pid}"):
            study.ask()
        holder.communicate("\n")
    assert len(other.read("mine").trials) == 0


def restarted(command, url, num_trials, disturb):
    arguments = ("--trials", str(num_trials), "--workers", "2", "--pruner", "none")
    process = command.start_slowly(*arguments)
    disturb()
    command.hurry()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    invariants.check(command.folder, command.log, num_trials, url)
    for trial in command.study().trials:
        assert len(trial.user_attrs["attempts"]) == 1
    return output


@pytest.mark.fault("S2")
@pytest.mark.slow
def test_s2_restarted_at_once_five_times(postgres, url, tmp_path):
    def disturb():
        for _ in range(5):
            time.sleep(0.5)
            postgres.control("restart", "-m", "immediate")

    command = Command(tmp_path, url=url)
    restarted(command, url, 20, disturb)
    code, output = command.run("--trials", "20", "--workers", "2")
    assert (code, "20 of 20 trials finished" in output) == (0, True), output


@pytest.mark.fault("S2")
@pytest.mark.slow
def test_s2_away_for_a_minute(postgres, url, tmp_path):
    def disturb():
        postgres.control("stop", "-m", "immediate")
        time.sleep(60)
        postgres.control("start")

    output = restarted(Command(tmp_path, url=url), url, 8, disturb)
    assert "does not answer" in output
    assert "the study answers again" in output


@pytest.fixture
def guarded(postgres, url):
    """A database's URL whose user needs the password s3cr3t@{}; its server asks for it."""
    if postgres.own is None:
        pytest.skip("rules of another's server are not changed")
    rules = postgres.own.pgdata / "pg_hba.conf"
    before = rules.read_text()
    if not postgres.execute("SELECT 1 FROM pg_roles WHERE rolname = 'me'"):
        postgres.execute("CREATE ROLE me SUPERUSER LOGIN PASSWORD 's3cr3t@{}'")
    rules.write_text(f"local all me scram-sha-256\n{before}")
    postgres.execute("SELECT pg_reload_conf()")
    yield url.replace("postgres@", "me@")
    rules.write_text(before)
    postgres.execute("SELECT pg_reload_conf()")


@pytest.mark.fault("X4")
@pytest.mark.parametrize("how", [pytest.param("PGPASSWORD", marks=pytest.mark.slow), "PGPASSFILE"])
def test_x4_a_password_is_taken_from_where_it_is_safe(guarded, tmp_path, monkeypatch, how):
    file = tmp_path / "passwords"
    file.write_text("*:*:*:*:s3cr3t@{}\n")
    file.chmod(0o600)
    monkeypatch.setenv(how, "s3cr3t@{}" if how == "PGPASSWORD" else str(file))
    command = Command(tmp_path, url=guarded, DUMMY_SLEEP="0.01")
    code, output = command.run("--trials", "2", "-vv", "--workers", "1")
    assert code == 0, output
    written = [path.read_text() for path in command.folder.rglob("*.log")]
    assert "s3cr3t" not in output + "".join(written)
    file.chmod(0o644)
    if how == "PGPASSFILE":
        with pytest.raises(SearchError, match=f"others may read .*chmod 600 {file}"):
            storage.read_study(guarded, "dummy")


@pytest.mark.fault("X4")
def test_x4_what_keeps_it_from_being_reached_is_one_line(guarded, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "wr0ng")
    folder = guarded.partition("host=")[2]
    for url, rule in (
        (guarded, "can't be used: .*password authentication failed.*PGPASSFILE"),
        (guarded.replace("/fmnist_", "/no_fmnist_").replace("me@", "postgres@"), "does not exist"),
        (guarded.replace(folder, "/nowhere"), "/nowhere.*failed"),
        ("postgresql://me@127.0.0.1:9/db", "127.0.0.1.*refused"),
    ):
        with pytest.raises(SearchError, match=rule) as caught:
            storage.read_study(url, "mine")
        assert caught.value.exit_code == EXIT_STORAGE_LOST
        assert "wr0ng" not in str(caught.value)


@pytest.mark.fault("X4")
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cr3t@host/db",
        "postgresql://me@host/db?password=s3cr3t",
        "postgresql://me@host/db?options=s3cr3t",
        "postgresql://me:s3/cr3t@host/db",
        "postgresql://me:s3cr3t",
        "postgresql+psycopg://me:{s3cr3t}@host/db",
        "postgresql://",
    ],
)
def test_x4_a_password_in_a_url_is_refused_unseen(url):
    with pytest.raises(SearchError, match="PostgreSQL") as caught:
        storage.at(url)
    assert caught.value.exit_code == EXIT_USAGE
    assert "s3" not in str(caught.value)


@pytest.mark.parametrize("make", ["postgres", "sqlite"])
def test_tables_of_a_newer_version_are_one_line(request, tmp_path, make):
    if make == "postgres":
        url = request.getfixturevalue("url")
        add_trials(url, 1)
        request.getfixturevalue("postgres").execute(
            "UPDATE alembic_version SET version_num = 'v99.0.0'", url
        )
    else:
        import sqlite3

        url = f"sqlite:///{tmp_path}/study.db"
        add_trials(url, 1)
        with sqlite3.connect(tmp_path / "study.db") as connection:
            connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0'")
        connection.close()
    for use in (storage.at(url).open, storage.at(url).read):
        with pytest.raises(SearchError, match="is not of this Optuna"):
            use("mine")


def test_without_psycopg_it_says_what_to_install(tmp_path):
    script = "import sys; sys.modules['psycopg'] = None\nfrom search.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "show", "--study", "quickstart",
         "--storage", "postgresql://me@host/db"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "fmnist-search: --storage postgresql://... needs psycopg: pip install '.[postgres]'\n"
    )


def test_repair_is_for_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "search", "repair", "--study", "cnn", "--out", str(tmp_path),
         "--storage", "postgresql://me@host/db"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == EXIT_USAGE
    assert "snapshots are taken of SQLite files alone" in done.stderr


# A study carried from one to the other


@pytest.fixture
def file(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


def test_a_study_goes_to_postgresql_and_back_with_everything(url, file):
    add_trials(file)
    before = content(file)
    assert moving.move("mine", storage.at(file), storage.at(url)) == 6
    assert content(url) == before
    with pytest.raises(SearchError, match=r"was moved from .*study\.db to postgresql://"):
        storage.read_study(file, "mine")
    with pytest.raises(SearchError, match="was moved"):
        storage.at(file).open("mine")
    assert moving.move("mine", storage.at(url), storage.at(file)) == 6
    assert content(file) == before
    database = storage.at(file)
    with database.lock("mine"):
        study = database.open("mine")
        assert study.ask().number == 5  # the one that was enqueued
        assert study.ask().number == 6


def test_a_note_goes_with_its_trial_whatever_its_key_is_there(url, file):
    add_trials(url, name="another")  # so that keys differ
    add_trials(file)
    with storage.at(file).lock("mine"):
        notes.save_missing(storage.at(file).open("mine"))
    bodies = [note_of(file, number) for number in range(3)]
    moving.move("mine", storage.at(file), storage.at(url))
    assert [note_of(url, number) for number in range(3)] == bodies
    moving.move("mine", storage.at(url), storage.at(file))
    assert [note_of(file, number) for number in range(3)] == bodies


def note_of(at, number):
    """Its first piece, as the dashboard finds it."""
    study = storage.read_study(at, "mine")
    key = study.trials[number]._trial_id
    attrs = study._storage.get_study_system_attrs(study._study_id)
    return attrs[f"dashboard:{key}:note_str:0"]


def test_a_target_that_holds_the_study_is_refused_and_nothing_changes(url, file):
    for at in (url, file):
        add_trials(at)
    before = content(url), content(file)
    with pytest.raises(SearchError, match="holds a study 'mine' of 6 trials") as caught:
        moving.move("mine", storage.at(file), storage.at(url))
    assert caught.value.exit_code == EXIT_USAGE
    assert (content(url), content(file)) == before


@pytest.mark.parametrize(
    "at", ["_write", pytest.param("_clear", marks=pytest.mark.slow), "_leave_note"]
)
def test_a_move_that_is_cut_off_is_finished_by_the_same_command(url, file, monkeypatch, at):
    add_trials(file)
    before = content(file)
    whole = getattr(moving, at)

    def die(connection, *arguments):
        # _clear is called for the target first, which holds nothing yet.
        if at != "_clear" or connection.dialect.name == "sqlite":
            if at == "_write":
                whole(connection, *arguments)
            raise KeyboardInterrupt
        whole(connection, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(moving, at, die)
        with pytest.raises(KeyboardInterrupt):
            moving.move("mine", storage.at(file), storage.at(url))
    assert content(file) == before
    assert moving.move("mine", storage.at(file), storage.at(url)) == 6
    assert content(url) == before


def test_a_copy_that_differs_is_taken_back(url, file, monkeypatch):
    add_trials(file)
    whole = moving._write

    def lose_a_row(connection, name, content):
        trials = content["trial_params"]
        whole(connection, name, {**content, "trial_params": trials[1:]})

    with monkeypatch.context() as broken:
        broken.setattr(moving, "_write", lose_a_row)
        with pytest.raises(SearchError, match="nothing was moved"):
            moving.move("mine", storage.at(file), storage.at(url))
    assert storage.read_study(url, "mine") is None
    assert len(content(file)[0]) == 6


def test_a_study_that_runs_is_not_moved(url, file):
    add_trials(file)
    with storage.at(file).lock("mine"), pytest.raises(SearchError, match="is being run by"):
        moving.move("mine", storage.at(file), storage.at(url))


@pytest.mark.slow
def test_a_run_goes_on_where_its_study_was_moved(tmp_path, url):
    command = Command(tmp_path, DUMMY_SLEEP="0.01")
    code, output = command.run("--trials", "3", "--workers", "1")
    assert code == 0, output
    moved = subprocess.run(
        [sys.executable, "-m", "search", "move", "--study", str(ROOT / "tests/dummy.py"),
         "--from", f"sqlite:///{command.folder}/study.db", "--to", url],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "DUMMY_LOG": "unused"},
    )  # fmt: skip
    assert moved.returncode == 0, moved.stderr
    assert "dummy: 3 trials moved from" in moved.stdout
    assert f"--out {command.folder} --storage {shlex.quote(url)} --seed 0" in moved.stdout
    code, output = command.run("--trials", "4", "--workers", "1")
    assert code == EXIT_USAGE
    assert f"--storage {url}" in output
    command = Command(tmp_path, url=url, DUMMY_SLEEP="0.01")
    code, output = command.run("--trials", "5", "--workers", "1")
    assert code == 0, output
    invariants.check(command.folder, command.log, 5, url)
