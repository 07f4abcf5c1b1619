import hashlib
import os
import signal
import subprocess
import sys

import pytest

from search import artifacts
from search.errors import EXIT_DAMAGED, EXIT_USER_ERROR, SearchError
from tests.command import ROOT

# Says what it has done and waits, so that it can be killed exactly there.
WRITER = """
import sys
from search import artifacts

def reached(point):
    print(point, flush=True)
    sys.stdin.readline()

with artifacts.write_atomically(sys.argv[1]) as temporary:
    reached("begun")
    with open(temporary, "wb") as stream:
        for _ in range(2):
            stream.write(b"new" * 50_000)
            stream.flush()
            reached("written")
    reached("complete")
reached("replaced")
"""

ON_A_FULL_DISK = """
import resource, sys
from search import artifacts
from search.errors import SearchError

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    artifacts.write_text(sys.argv[1], "x" * 5000)
except SearchError as error:
    print(error)
"""


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    final = tmp_path / "new" / "best.keras"
    with artifacts.write_atomically(final) as temporary:
        assert temporary.parent == final.parent
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".keras"
        temporary.write_bytes(b"weights")
        assert not final.exists()
    assert final.read_bytes() == b"weights"
    assert names(final.parent) == ["best.keras"]


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        real_fsync(descriptor)

    def replace(source, target):
        calls.append(("replace", os.stat(source).st_ino))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    artifacts.write_text(tmp_path / "a.txt", "text")
    file, folder = (tmp_path / "a.txt").stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("fsync", file), ("replace", file), ("fsync", folder)]


@pytest.mark.parametrize(
    ("raised", "seen"), [(ValueError("no"), ValueError), (OSError("no"), SearchError)]
)
def test_an_error_leaves_the_old_file(tmp_path, raised, seen):
    final = tmp_path / "a.txt"
    final.write_text("old")

    def write():
        with artifacts.write_atomically(final) as temporary:
            temporary.write_text("half")
            raise raised

    with pytest.raises(seen, match="no"):
        write()
    assert final.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.fault("A1")
@pytest.mark.parametrize(
    ("num_steps", "point", "content"),
    [(0, "begun", b"old"), (1, "written", b"old"), (2, "written", b"old"),
     (3, "complete", b"old"), (4, "replaced", b"new" * 100_000)],
)  # fmt: skip
def test_sigkill_leaves_the_old_or_the_new_file(tmp_path, num_steps, point, content):
    final = tmp_path / "a.bin"
    final.write_bytes(b"old")
    with start(WRITER, final) as writer:
        for _ in range(num_steps):
            writer.stdout.readline()
            writer.stdin.write("\n")
            writer.stdin.flush()
        assert writer.stdout.readline().strip() == point
        writer.send_signal(signal.SIGKILL)
    assert final.read_bytes() == content
    artifacts.remove_partials(tmp_path)
    assert names(tmp_path) == ["a.bin"]


def test_only_the_folder_s_own_partial_files_are_removed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / ".folder.partial").mkdir()
    for name in (".a.1234.partial.bin", "other/.download.partial", "kept.bin"):
        (tmp_path / name).touch()
    artifacts.remove_partials(tmp_path)
    assert names(tmp_path) == [".folder.partial", "kept.bin", "other"]
    assert names(tmp_path / "other") == [".download.partial"]


@pytest.mark.fault("S4")
def test_a_full_disk_is_one_line_with_path_and_bytes(tmp_path):
    final = tmp_path / "a.txt"
    final.write_text("old")
    message, _ = start(ON_A_FULL_DISK, final).communicate(timeout=120)
    assert f"{final} could not be written: File too large. It needs 5000 bytes" in message
    assert message.count("\n") == 1
    assert final.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchError, match=f"make the folder {tmp_path}/file/new writable"):
        artifacts.write_text(tmp_path / "file" / "new" / "a.txt", "text")


@pytest.mark.fault("X2")
@pytest.mark.parametrize("link", ["a.txt", "folder", "dangling"])
def test_nothing_is_written_through_a_symlink(tmp_path, link):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    (outside / "a.txt").write_text("theirs")
    if link == "folder":
        (run / "folder").symlink_to(outside)
        final = run / "folder" / "a.txt"
    else:
        final = run / "a.txt"
        final.symlink_to(outside / ("a.txt" if link == "a.txt" else "none"))
    with pytest.raises(
        SearchError, match=f"Received: {final}.*symbolic link|symbolic links.*{final}"
    ):
        artifacts.write_text(final, "ours", inside=run)
    assert (outside / "a.txt").read_text() == "theirs"
    assert names(outside) == ["a.txt"]


def test_the_runs_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    artifacts.write_text(tmp_path / "runs" / "cnn" / "a.txt", "text", inside=tmp_path / "runs")
    assert (tmp_path / "disk" / "cnn" / "a.txt").read_text() == "text"


def test_json_without_nan(tmp_path):
    artifacts.write_json(tmp_path / "a.json", {"loss": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "loss": 0.5\n}\n'


def test_a_hash_is_of_the_bytes_and_a_missing_file_has_none(tmp_path):
    path = tmp_path / "best.keras"
    path.write_bytes(b"model")
    assert artifacts.sha256(path) == hashlib.sha256(b"model").hexdigest()
    path.unlink()
    with pytest.raises(SearchError, match=f"{path} cannot be read: No such file") as caught:
        artifacts.sha256(path)
    assert caught.value.exit_code == EXIT_DAMAGED


def test_an_error_is_one_line():
    error = SearchError("first\nsecond")
    assert (str(error), error.exit_code) == ("first second", EXIT_USER_ERROR)
