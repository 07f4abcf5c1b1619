"""A real browser without a window, for tests and pictures."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(_NAMES)} is installed"
)


def browse(url: str, folder: Path, *options: str) -> tuple[str, str]:
    """What Chromium says on standard output and error when it shows a page.

    Args:
        folder: for its profile; a new one at each call.
        options: its own, such as --dump-dom or --screenshot=FILE.
    """
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=30000",
         f"--user-data-dir={folder / 'browser'}", *options, url],
        capture_output=True, text=True, timeout=240, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
