"""Where a result comes from: versions, commit, hardware. No Keras import."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from search.workers import devices

_PACKAGES = (
    "fmnist-search",
    "jax",
    "jaxlib",
    "keras",
    "keras-tuner",
    "numpy",
    "optuna",
    "scikit-learn",
    "scipy",
    "tensorflow",
)


def collect() -> dict[str, Any]:
    """What a reader needs to do it again, ready for JSON."""
    return {
        "versions": versions(),
        "backend": os.environ.get("KERAS_BACKEND", "tensorflow"),
        "commit": _commit(),
        "hardware": {
            "processor": processor(),
            "cores": devices.cores(),
            "gpus": len(devices.gpus()),
        },
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # TensorFlow is absent where another backend is used
    return found


def _commit() -> str | None:
    """The commit of a checkout, with a + where files differ from it; None for an installed copy."""
    here = Path(__file__).parents[1]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def processor() -> str:
    """Its name, as its maker gives it where the system says so."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
