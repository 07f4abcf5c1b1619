"""A real browser without a window, for tests and pictures."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(_NAMES)} is installed"
)


def browse(url: str, folder: Path, *options: str) -> tuple[str, str]:
    """What Chromium says on standard output and error when it shows a page.

    Args:
        folder: for its profile.
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


def evaluate(page: Path, expression: str, folder: Path, *options: str, width: int = 1200) -> Any:
    """What JavaScript says in a report whose figures are drawn, through JSON.

    Args:
        page: the report, of which a copy is shown.
        width: of what it is shown in, in CSS pixels; a window is never as narrow as a phone.
    """
    probe = (
        "const probe = () => {"
        "if (document.documentElement.dataset.drawn === undefined) return setTimeout(probe, 50);"
        f"parent.postMessage(JSON.stringify({expression}), '*');"
        "}; probe();"
    )
    before, end, after = page.read_text().rpartition("</body>")
    (folder / "probed.html").write_text(f"{before}<script>{probe}</script>{end}{after}")
    frame = folder / "frame.html"
    frame.write_text(
        "<!doctype html><script>addEventListener('message', ({ data }) => "
        "document.documentElement.append(Object.assign(document.createElement('pre'), "
        "{ id: 'probe', textContent: data })));</script>"
        f'<iframe src="probed.html" style="border: 0; width: {width}px; height: 2000px"></iframe>'
    )
    dom, errors = browse(frame.as_uri(), folder, "--dump-dom", *options)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, errors
    return json.loads(html.unescape(found[1]))


def complaints(log: str) -> list[str]:
    """What the page has said on the console."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def asked_elsewhere(net_log: Path) -> set[str]:
    """Addresses of other machines that were asked for (--log-net-log=FILE)."""
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', net_log.read_text()))
    # The browser's own errands: it is told to keep still, and does not wholly.
    own = r"https?://127\.0\.0\.1[:/]|google|gvt1|chrom"
    return {url for url in asked if not re.search(own, url)}
