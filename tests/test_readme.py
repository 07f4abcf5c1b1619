"""What the README shows works as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_command_and_option_exists():
    shown = re.findall(r"fmnist-search ([a-z]+)?", README)
    assert shown
    helps = {}
    for command in {name for name in shown if name in ("studies", "show", "retrain", "export", "")}:
        done = subprocess.run(
            [sys.executable, "-m", "search", *filter(None, [command]), "--help"],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0
        helps[command] = done.stdout
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--help"}:
        assert any(option in text for text in helps.values()), option


def test_its_space_and_study_run(tmp_path):
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    file = tmp_path / "mine.py"
    file.write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", str(file), "--out", str(tmp_path / "run"),
         "--trials", "2", "--epochs", "1", "--seeds", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2 trials finished" in done.stdout
    assert (tmp_path / "run" / "configs" / "best.yaml").exists()


def test_its_layout_names_every_file():
    for folder in ("search", "spaces", "studies"):
        for file in (ROOT / folder).rglob("*.py"):
            if not file.name.startswith("__"):
                assert file.name in README, file
