"""Who may not read a study's file, or not write beside it, is told so: nothing is damaged."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from search.cli import again
from search.errors import EXIT_STORAGE_LOST, SearchError
from search.storage import snapshots, sqlite_file, storage
from search.view import listing

NOBODY = 65534


@pytest.fixture
def folder():
    """Not tmp_path, into which pytest lets only the owner."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)
        Path(folder).chmod(0o777)


@contextmanager
def nobody():
    """Permissions don't bind root."""
    user = os.geteuid()
    os.seteuid(user or NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def add_trial(folder):
    """Of a study that stays open: its -wal and -shm stay, too."""
    study = storage.at(f"sqlite:///{folder}/study.db").open("mine")
    study.tell(study.ask(), 0.5)
    return study


def close(study):
    study._storage.remove_session()
    study._storage._backend.engine.dispose()


def values(folder):
    study = storage.read_study(f"sqlite:///{folder}/study.db", "mine")
    return [trial.value for trial in study.get_trials(deepcopy=False)]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("locked", "why"), [("study.db", "unable to open database"), (".", "Permission denied")]
)
def test_what_may_not_be_read_is_not_replaced_by_a_snapshot(folder, locked, why):
    close(add_trial(folder))
    snapshots.Snapshots(folder / "study.db").take()
    close(add_trial(folder))
    mode = (folder / locked).stat().st_mode
    (folder / locked).chmod(0o000)
    for use in (lambda: values(folder), lambda: snapshots.restore(folder / "study.db")):
        with nobody(), pytest.raises(SearchError, match=why) as raised:
            use()
        assert raised.value.exit_code == EXIT_STORAGE_LOST
        assert f"{folder}/study.db can't be read" in str(raised.value)
        assert "repair" not in str(raised.value)
    (folder / locked).chmod(mode)
    assert values(folder) == [0.5, 0.5]


def test_a_study_in_a_read_only_folder_is_read(folder):
    close(add_trial(folder))
    before = content(folder)
    assert before.keys() == {"study.db"}
    folder.chmod(0o555)
    with nobody():
        assert sqlite_file.problem_of(folder / "study.db") == ""
        assert values(folder) == [0.5]
    assert content(folder) == before


def test_a_study_that_another_user_writes_in_a_read_only_folder_is_read_live(folder):
    close(add_trial(folder))
    folder.chmod(0o555)
    with nobody():
        read = storage.read_study(f"sqlite:///{folder}/study.db", "mine")
        assert len(read.trials) == 1
    folder.chmod(0o777)
    study = add_trial(folder)
    folder.chmod(0o555)
    with nobody():
        assert len(read.trials) == 2
        assert values(folder) == [0.5, 0.5]
    folder.chmod(0o777)
    close(study)


def test_a_log_that_can_not_be_read_in_a_read_only_folder_is_no_damage(folder):
    """What a killed run's folder is without the file that SQLite makes anew."""
    study = add_trial(folder)
    killed, copy = folder / "killed", folder / "copy"
    killed.mkdir()
    for name in ("study.db", "study.db-wal"):
        shutil.copy(folder / name, killed)
    close(study)
    before = content(killed)
    killed.chmod(0o555)
    with nobody(), pytest.raises(SearchError, match=r"read .*copy the folder") as raised:
        values(killed)
    assert raised.value.exit_code == EXIT_STORAGE_LOST
    killed.chmod(0o777)
    assert content(killed) == before
    shutil.copytree(killed, copy)
    assert values(copy) == [0.5]


def test_what_a_reader_keeps_out_of_the_file_is_not_said_to_be_safe(folder):
    study = add_trial(folder)
    database = storage.at(f"sqlite:///{folder}/study.db")
    engine = study._storage._backend.engine
    reader = sqlite3.connect(folder / "study.db")
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM trials").fetchone()
    study.tell(study.ask(), 0.75)
    with pytest.raises(SearchError, match="is being read by another process"):
        database.settle(engine)
    reader.close()
    database.settle(engine)
    close(study)


@pytest.mark.fault("S1")
def test_a_disk_that_is_away_for_a_moment_is_no_damage(folder, monkeypatch):
    close(add_trial(folder))
    connect, tries = sqlite3.connect, []

    def away(*arguments, **named):
        tries.append(1)
        if len(tries) < 3:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error
        return connect(*arguments, **named)

    monkeypatch.setattr(sqlite3, "connect", away)
    assert sqlite_file.problem_of(folder / "study.db") == ""
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(SearchError, match=r"has not answered .*disk I/O error"):
        sqlite_file.problem_of(folder / "study.db", patience=0)


def test_repair_and_the_list_of_studies_say_what_they_may_not_do(folder):
    close(add_trial(folder))
    assert listing._run_of(folder, "mine") == "1 trials, best 0.5000"
    folder.chmod(0o555)
    with nobody():
        done = CliRunner().invoke(again.repair, ["--study", "quickstart", "--out", str(folder)])
    assert isinstance(done.exception, SearchError)
    assert "can't be written" in str(done.exception)
    (folder / "study.db").chmod(0)
    with nobody():
        assert listing._run_of(folder, "mine") == "can't be read"
    (folder / "study.db").chmod(0o600)
    (folder / "study.db").write_bytes(b"no database" * 500)
    assert listing._run_of(folder, "mine") == "damaged"
