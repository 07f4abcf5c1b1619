"""Snapshots of a study, and what a damaged file costs."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from search import folders
from search.errors import EXIT_DAMAGED, SearchError
from search.storage import snapshots, sqlite_file, storage
from search.storage.snapshots import KEPT, Snapshots, restore
from tests import made_up_run
from tests.command import ROOT


def add_trials(url, number):
    study = storage.at(url).open("mine")
    for _ in range(number):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    study._storage._backend.engine.dispose()


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "study.db"
    add_trials(f"sqlite:///{path}", 4)
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_a_page(path):
    content = bytearray(path.read_bytes())
    content[4096 : 3 * 4096] = bytes(2 * 4096)
    path.write_bytes(content)


DAMAGES = {
    "truncated": truncate,
    "a page zeroed": zero_a_page,
    "a garbage header": lambda path: path.write_bytes(b"garbage!" * 20 + path.read_bytes()[160:]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.fault("S5")
@pytest.mark.parametrize("damage", DAMAGES)
def test_s5_the_newest_sound_snapshot_is_put_back(database, damage):
    url = f"sqlite:///{database}"
    Snapshots(database).take()
    add_trials(url, 2)  # lost with the file
    DAMAGES[damage](database)
    before = database.read_bytes() if database.exists() else None
    restored = restore(database)
    assert restored.num_trials == 4
    assert (restored.aside and restored.aside.read_bytes()) == before
    study = storage.read_study(url, "mine")
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3]
    add_trials(url, 1)  # it can be gone on with
    assert len(storage.read_study(url, "mine").trials) == 5


@pytest.mark.fault("S5")
def test_s5_where_a_snapshot_has_no_room_the_damaged_study_stays(database, monkeypatch):
    Snapshots(database).take()
    truncate(database)
    before = database.read_bytes()

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(SearchError, match=r"No space left|is full|free"):
            restore(database)
    assert database.read_bytes() == before
    assert restore(database).num_trials == 4


@pytest.mark.fault("S5")
def test_s5_a_missing_study_is_not_begun_anew_beside_its_snapshots(database):
    Snapshots(database).take()
    database.unlink()
    for use in (storage.Database.open, storage.Database.read):
        with pytest.raises(SearchError, match=r"is missing, though.*repair.*anew") as caught:
            use(storage.at(f"sqlite:///{database}"), "mine")
        assert caught.value.exit_code == EXIT_DAMAGED
    assert not database.exists()


def test_a_study_is_not_begun_beside_what_a_lost_one_had_still_to_write(database):
    wal = database.with_name("study.db-wal")
    database.unlink()
    wal.write_bytes(b"frames")
    with pytest.raises(SearchError, match=r"missing, though its study.db-wal is there") as caught:
        storage.at(f"sqlite:///{database}").open("mine")
    assert caught.value.exit_code == EXIT_DAMAGED
    assert not database.exists()


def test_somebody_else_s_file_among_the_snapshots_is_no_reason_to_end(database, monkeypatch):
    monkeypatch.setattr(snapshots, "_now", iter(["20260101-000000", "20260102-000000"]).__next__)
    Snapshots(database).take()
    (database.parent / "snapshots" / "study-99999999-999999.db").touch()
    Snapshots(database).take()
    assert len(list((database.parent / "snapshots").iterdir())) == 3


def test_a_damaged_snapshot_is_passed_over(database, monkeypatch):
    stamps = iter(["20260101-000000", "20260102-000000"])
    monkeypatch.setattr(snapshots, "_now", lambda: next(stamps, "20260103-000000"))
    for _ in range(2):
        Snapshots(database).take()
    truncate(database.parent / "snapshots" / "study-20260102-000000.db")
    truncate(database)
    assert restore(database).snapshot.name == "study-20260101-000000.db"


def test_a_sound_study_is_left_alone(database):
    Snapshots(database).take()
    before = database.read_bytes()
    with pytest.raises(SearchError, match="is sound: there is nothing to repair"):
        restore(database)
    assert database.read_bytes() == before


def test_without_a_snapshot_it_says_so(database):
    truncate(database)
    with pytest.raises(SearchError, match=r"no sound snapshot lies in .*snapshots"):
        restore(database)


def test_the_newest_are_kept(database, monkeypatch):
    stamps = iter(f"2026010{day}-000000" for day in range(1, 7))
    monkeypatch.setattr(snapshots, "_now", lambda: next(stamps))
    for _ in range(6):
        Snapshots(database).take()
    kept = sorted(path.name for path in (database.parent / "snapshots").iterdir())
    assert kept == [f"study-2026010{day}-000000.db" for day in (4, 5, 6)]
    assert len(kept) == KEPT


@pytest.mark.parametrize("damage", [zero_a_page, Path.unlink])
def test_what_is_damaged_takes_no_sound_snapshot_s_place(database, damage, caplog):
    """The search's writer reads from memory, and goes on."""
    taken = Snapshots(database)
    taken.take()
    damage(database)
    for _ in range(KEPT):
        taken.take()
    assert caplog.text.count("no snapshot of the study") == KEPT
    (kept,) = (database.parent / "snapshots").iterdir()
    restored = restore(database)
    assert (restored.snapshot, restored.num_trials) == (kept, 4)


def test_a_clock_that_is_set_back_lets_no_snapshot_be_older_than_the_last(database, monkeypatch):
    for now in ("20260105-000000", "20260104-230000", "20260104-230500", "20260104-231000"):
        monkeypatch.setattr(snapshots, "_now", lambda now=now: now)
        Snapshots(database).take()
    kept = sorted(path.name for path in (database.parent / "snapshots").iterdir())
    assert kept == [f"study-20260105-00000{second}.db" for second in (1, 2, 3)]


def test_another_database_in_the_same_folder_has_snapshots_of_its_own(database, monkeypatch):
    stamps = iter(f"2026010{day}-000000" for day in range(1, 9))
    monkeypatch.setattr(snapshots, "_now", lambda: next(stamps))
    Snapshots(database).take()
    other = database.with_name("study-b.db")
    add_trials(f"sqlite:///{other}", 1)
    for _ in range(KEPT):
        Snapshots(other).take()
    for _ in range(KEPT - 1):
        Snapshots(database).take()
    assert len(list((database.parent / "snapshots").iterdir())) == 2 * KEPT
    truncate(database)
    restored = restore(database)
    assert (restored.snapshot.name, restored.num_trials) == ("study-20260106-000000.db", 4)


def test_a_snapshot_of_a_study_that_is_written_is_whole(database):
    with sqlite3.connect(database) as writer:
        writer.execute("PRAGMA journal_mode=wal")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE trials SET state = 'FAIL'")
        Snapshots(database).take()
        writer.rollback()
    (snapshot,) = (database.parent / "snapshots").iterdir()
    assert sqlite_file.problem_of(snapshot) == ""
    with sqlite3.connect(snapshot) as copy:
        assert copy.execute("SELECT count(*) FROM trials WHERE state = 'FAIL'").fetchone() == (0,)


def test_what_a_kill_has_left_of_a_snapshot_is_removed(database):
    Snapshots(database).take()
    (whole,) = (database.parent / "snapshots").iterdir()
    for end in ("", "-wal", "-shm"):
        whole.with_name(f".{whole.stem}.1234abcd.partial.db{end}").touch()
    folders.clean(database.parent)
    assert list(whole.parent.iterdir()) == [whole]


def test_one_is_taken_every_five_minutes(database, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now)
    made = Snapshots(database)
    taken = []
    monkeypatch.setattr(made, "take", lambda: taken.append(now))
    for now in (1299.0, 1301.0):  # noqa: B007 - the clock has it
        made.take_if_due()
    assert taken == [1301.0]


def test_a_snapshot_that_cannot_be_written_is_a_warning(database, caplog):
    (database.parent / "snapshots").write_text("in the way")
    Snapshots(database).take()
    assert "no snapshot of the study" in caplog.text


@pytest.mark.fault("S5")
def test_the_command_says_what_it_has_done(database):
    (database.parent / "mine.py").write_text(
        "from studies.study import Study\nstudy = Study(name='mine', objective=lambda trial: 1.0)\n"
    )
    study = storage.at(f"sqlite:///{database}").open("mine")
    run = made_up_run.run_attribute("objective")
    run["told"] |= {"trials": 300, "sampler": "random"}
    study.set_user_attr("run", run)
    study._storage._backend.engine.dispose()
    Snapshots(database).take()
    truncate(database)
    command = [
        sys.executable,
        "-m",
        "search",
        "repair",
        "--study",
        str(database.parent / "mine.py"),
    ]
    command += ["--out", str(database.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "with 4 finished trials" in done.stdout
    assert "the damaged file lies in" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        f"go on with: fmnist-search --study {database.parent}/mine.py --out {database.parent} "
        "--seed 0 --trials 300 --sampler random --pruner asha"
    )
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2
    assert "nothing to repair" in again.stderr
