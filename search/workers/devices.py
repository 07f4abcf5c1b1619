"""Which GPUs and cores there are, and how they are shared out among workers. No Keras import."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from search.errors import EXIT_USAGE, SearchError
from search.workers import cgroup

logger = logging.getLogger("search")

_WORKERS = "FMNIST_SEARCH_WORKERS"  # in a worker's environment
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


@dataclass(frozen=True)
class Device:
    """What one worker may use."""

    threads: int
    gpu: str | None = None  # as CUDA_VISIBLE_DEVICES names it
    workers: int = 1  # that share the machine's memory, as far as is known

    @property
    def label(self) -> str:
        return f"gpu {self.gpu}" if self.gpu is not None else f"{self.threads} cpu"

    def environment(self) -> dict[str, str]:
        """What must stand in the worker's environment before Keras is imported."""
        threads = str(self.threads)
        return {
            _WORKERS: str(self.workers),
            # An empty list hides every GPU, so that a CPU worker does not take memory on one.
            "CUDA_VISIBLE_DEVICES": self.gpu or "",
            "OMP_NUM_THREADS": threads,
            "TF_NUM_INTRAOP_THREADS": threads,
            "TF_NUM_INTEROP_THREADS": threads,
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # TensorFlow leaves oneDNN off on processors without AVX-512 VNNI, where it pays too:
            # training steps 1.7x (small network) and 1.4x (deep) as fast on AVX2, float32.
            "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1"),
            # JAX: no share of a GPU set aside at once; one thread or as many as there are cores.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_FLAGS": " ".join(
                [os.environ.get("XLA_FLAGS", ""), *[_ONE_THREAD] * (self.threads == 1)]
            ).strip(),
        }


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use: CUDA_VISIBLE_DEVICES if set, else all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not (command := shutil.which("nvidia-smi")):
        return []
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        logger.warning("nvidia-smi does not answer; the search runs on cores")
        return []
    return _names(listing.stdout) if listing.returncode == 0 else []


def _names(listing: str) -> list[str]:
    """What `nvidia-smi -L` lists, as CUDA_VISIBLE_DEVICES takes it: GPUs by their index, but the
    instances (MIG) of one that is divided by their UUIDs."""
    by_gpu: list[list[str]] = []
    for line in listing.splitlines():
        if line.startswith("GPU "):
            by_gpu.append([])
        elif by_gpu and (instance := re.search(r"\(UUID: (MIG-[^)]+)\)", line)):
            by_gpu[-1].append(instance[1])
    return [name for gpu, instances in enumerate(by_gpu) for name in instances or [str(gpu)]]


def cores() -> int:
    """The cores that this process may run on: its affinity, and its container's quota."""
    allowed = len(psutil.Process().cpu_affinity() or []) if hasattr(os, "sched_getaffinity") else 0
    allowed = allowed or os.cpu_count() or 1
    quota = cgroup.cores()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def memory() -> int:
    """Bytes that this process may have: the machine's, or its container's limit."""
    total = int(psutil.virtual_memory().total)
    return min(total, cgroup.memory() or total)


def workers() -> int:
    """How many workers share this machine's memory, this process among them."""
    return int(os.environ.get(_WORKERS, "1"))


def share_out(workers: str) -> list[Device]:
    """One device for each worker.

    Args:
        workers: "auto" for one per GPU, or one per core where there is no GPU; or a number.

    Raises:
        SearchError: if it is neither, or more than four workers would share a core or a GPU.
    """
    found, available = gpus(), cores()
    if workers == "auto":
        count = len(found) or available
    elif workers.isdecimal() and 1 <= int(workers) <= 4 * max(len(found), available):
        count = int(workers)
    else:
        raise SearchError(
            f"--workers is auto, or a number from 1 to {4 * max(len(found), available)} on this "
            f"machine ({available} cores, {len(found)} GPUs). Received: {workers!r}",
            exit_code=EXIT_USAGE,
        )
    threads = max(1, available // count)
    return [Device(threads, found[i % len(found)] if found else None, count) for i in range(count)]


def has_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 natively (elsewhere it is slower)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
