"""What the README shows works as shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.broken_builds import BREAKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = (
    *("studies", "show", "dashboard", "retrain", "export", "train", "predict", "doctor", "report"),
    *("repair", "repeat", "move", ""),
)


def test_every_command_and_option_exists():
    shown = re.findall(r"fmnist-search ([a-z]+)?", README)
    assert shown
    helps = {}
    for command in {name for name in shown if name in COMMANDS}:
        done = subprocess.run(
            [sys.executable, "-m", "search", *filter(None, [command]), "--help"],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0
        helps[command] = done.stdout
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {
        "--help",
        "--logdir",
        "--no-deps",
        *("--nodes", "--ntasks-per-node", "--gpus-per-task", "--cpus-per-task", "--time"),  # Slurm
        "--min-nodes",  # ray symmetric-run
        *(
            "--all",
            "--minutes",
            "--table",
            "--reports",
            "--run",
        ),  # python -m tests.faults, tests.benchmarks.*
    }:
        whole = re.compile(rf"{option}(?![\w-])")  # not --seeds for --seed
        assert any(whole.search(text) for text in helps.values()), option


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with the README's mine.py and its notebook as a script."""
    folder = tmp_path_factory.mktemp("readme")
    space, notebook = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (folder / "mine.py").write_text(space)
    (folder / "notebook.py").write_text(notebook)
    return folder


@pytest.mark.slow
def test_its_space_and_study_run(mine):
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", str(mine / "mine.py"), "--out",
         str(mine / "run"), "--trials", "2", "--epochs", "1", "--seeds", "1", "--workers", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2 trials finished" in done.stdout
    assert (mine / "run" / "configs" / "best.yaml").exists()


@pytest.mark.slow
def test_its_notebook_runs_as_a_script(mine):
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=mine, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Total params" in done.stdout
    assert (mine / "runs" / "from_python" / "study.py").exists()


def test_its_layout_names_every_file():
    for folder in ("search", "spaces", "studies"):
        for file in (ROOT / folder).rglob("*.py"):
            if not file.name.startswith("__"):
                assert file.name in README, file


def test_its_packages_for_jax_are_all_but_tensorflow():
    (line,) = [line for line in README.splitlines() if "--no-deps" in line]
    named = set(line.partition("&&")[0].split()) - {"pip", "install", "jax"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split("[<>=]", dependency)[0] for dependency in project["dependencies"]}
    assert named | {"tensorflow"} == needed


def test_each_broken_build_finds_what_it_breaks():
    places = [(ROOT / broken.file).read_text().count(broken.old) for broken in BREAKS]
    assert places == [1] * 21
