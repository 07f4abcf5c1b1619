"""The command line from outside: what it prints and how it exits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from search.cli import main
from tests.command import ROOT

COMMANDS = (
    *("studies", "show", "dashboard", "retrain", "export", "train", "predict", "repair", "repeat"),
    "doctor",
    "report",
)
QUICK = ["-m", "search"]


def run(*arguments: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_holds_an_example(command):
    done = run(*QUICK, *command, "--help")
    assert done.returncode == 0
    assert "Example:\n    fmnist-search" in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['fmnist-search', '--help']\n"
        "from search.cli import main\n"
        "try: main()\n"
        "finally: print({'keras', 'tensorflow', 'optuna', 'numpy', 'rich'} & set(sys.modules))"
    )
    assert run("-c", code).stdout.splitlines()[-1] == "set()"


def test_the_coordinators_modules_import_no_keras():
    code = (
        "import sys, search.coordinator, search.journey\n"
        "import search.view.listing, search.winners.export\n"
        "print({'keras', 'tensorflow', 'keras_tuner', 'jax'} & set(sys.modules))"
    )
    assert run("-c", code).stdout == "set()\n"


def test_studies_are_listed_with_their_question():
    done = run(*QUICK, "studies")
    assert done.returncode == 0
    assert "quickstart" in done.stdout
    assert "cnn" in done.stdout
    assert "Fashion-MNIST" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--study", "cn"], 2, ["'cn'", "Did you mean 'cnn'", "quickstart"]),
        (["--study", "../../x"], 2, ["'../../x'", "1 to 64"]),
        (["--study", "a\nb\x1b[31m"], 2, [r"'a\nb\x1b[31m'"]),
        (["--study", "x" * 5000], 2, ["1 to 64"]),
        (["--study", ""], 2, ["Received: ''"]),
        (["--study", "none.py"], 2, ["'none.py'"]),
        (["--study", "cnn", "--dataset", "fashion"], 2, ["'fashion'", "digits", "fashion_mnist"]),
        (["--study", "cnn", "--trials", "-4"], 2, ["--trials", "-4"]),
        (["--study", "cnn", "--epochs", "0"], 2, ["--epochs", "0"]),
        (["--study", "cnn", "--epochs", "nan"], 2, ["--epochs", "nan"]),
        (["--study", "cnn", "--workers", "0"], 2, ["--workers", "'0'"]),
        (["--study", "cnn", "--workers", "many"], 2, ["--workers", "'many'"]),
        (["--study", "cnn", "--time-budget", "90"], 2, ["'90'", "90m"]),
        (["--study", "cnn", "--sampler", "cma"], 2, ["--sampler", "cma", "tpe"]),
        (["--study", "cnn", "--storage", "postgresql://me:secret@h/db"], 2, ["PGPASSFILE"]),
        (["--study", "cnn", "--out", "file"], 1, ["--out file"]),
        (["--study", "cnn", "--out", "file/below"], 1, ["--out file/below"]),
        (["dashboard", "--study", "cnn"], 1, ["no run of 'cnn'"]),
        (["dashboard", "--study", "cnn", "--port", "0"], 2, ["--port", "0"]),
        (["show", "--study", "cnn"], 1, ["no run of 'cnn'", "fmnist-search --study cnn"]),
        (["retrain", "--study", "cnn"], 1, ["no run of 'cnn'"]),
        (["export", "--study", "cnn"], 1, ["no run of 'cnn'"]),
        (["export", "--study", "cnn", "--top", "3", "--trial", "5"], 2, ["--trial exclude each"]),
        (["--bogus"], 2, ["--bogus"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, arguments, code, words
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fmnist-search", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert len(said.splitlines()) == 1, said
    assert all(word in said for word in words), said
    assert "secret" not in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "file"]


def test_bad_input_ends_the_process_with_its_code(tmp_path):
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    for arguments, code in ((["--study", "cn"], 2), (["show", "--study", "cnn"], 1)):
        done = run("-P", *QUICK, *arguments, **options)
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.fault("S6")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    # Root may write anywhere on a disk, but not into a kernel's file system.
    done = run(*QUICK, "--study", "quickstart", "--out", "/proc/run")
    assert done.returncode == 1
    assert "/proc/run" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1 / 0\nstudy = Study(name='mine', space=print)", ["ZeroDivisionError", "x = 1 / 0"]),
        ("study = Study(name='mine', space=print, epochs=-3)", ["epochs is a number", "-3"]),
        ("study = Study(name='mine', objective=print, trials=0)", ["trials", "0"]),
    ],
)
def test_a_study_that_raises_shows_its_own_traceback(tmp_path, source, words):
    file = tmp_path / "mine.py"
    file.write_text(f"from studies.study import Study\n{source}\n")
    done = run(*QUICK, "--study", str(file), "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert "can't be loaded" in done.stderr.splitlines()[-1]
    assert all(word in done.stderr for word in words)
    assert "search/workers/worker.py" not in done.stderr


@pytest.mark.fault("S6")
@pytest.mark.parametrize("name", ["search.log", "logs"])
def test_something_else_in_the_place_of_a_log_is_refused(tmp_path, name):
    (tmp_path / name).mkdir() if name == "search.log" else (tmp_path / name).touch()
    done = run(*QUICK, "--study", "quickstart", "--out", str(tmp_path))
    assert done.returncode == 1
    assert f"--out {tmp_path} can't be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_study_is_refused_and_left_alone(tmp_path):
    (tmp_path / "study.db").write_bytes(b"no database at all" * 100)
    done = run(*QUICK, "--study", "quickstart", "--out", str(tmp_path))
    assert done.returncode == 4
    assert "damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "study.db").read_bytes() == b"no database at all" * 100


@pytest.mark.slow
def test_no_network_and_no_data(tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "KERAS_HOME": str(tmp_path / "home")}
    # A proxy that is not there: the same for every machine, with a network or without.
    environment |= {"https_proxy": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    done = run("-P", *QUICK, "--study", "cnn", "-q", cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "quickstart"):
        assert word in done.stderr
    assert list((tmp_path / "home").rglob("*.gz")) == []
