"""Which GPUs and cores there are, and how they are shared out among workers. No Keras import."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from search.errors import EXIT_USAGE, SearchError
from search.workers import cgroup

logger = logging.getLogger("search")

MOST_PER_GPU = 16  # workers

_WORKERS = "FMNIST_SEARCH_WORKERS"  # in a worker's environment
_SHARE = "FMNIST_SEARCH_GPU_SHARE"
# Of the memory of a GPU that workers share: each has a CUDA context beside what is counted.
_FOR_ALL = 0.9
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


@dataclass(frozen=True)
class Device:
    """What one worker may use."""

    threads: int
    gpu: str | None = None  # as CUDA_VISIBLE_DEVICES names it
    workers: int = 1  # that share the machine's memory, as far as is known
    share: float = 1.0  # of the GPU's memory

    @property
    def label(self) -> str:
        return f"gpu {self.gpu}" if self.gpu is not None else f"{self.threads} cpu"

    def environment(self) -> dict[str, str]:
        """What must stand in the worker's environment before Keras is imported."""
        threads = str(self.threads)
        # JAX reads one of two names, and refuses both.
        fraction = f"{_FOR_ALL * self.share:.3f}"
        shared = {"XLA_CLIENT_MEM_FRACTION": fraction, "XLA_PYTHON_CLIENT_MEM_FRACTION": ""}
        return {
            _WORKERS: str(self.workers),
            _SHARE: str(self.share),
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
            **(shared if self.share < 1.0 else {}),
        }


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use: CUDA_VISIBLE_DEVICES if set, else all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return _names(ask_driver("-L"))


def ask_driver(*arguments: str) -> str:
    """What `nvidia-smi` says; nothing where there is none, or it fails."""
    if not (command := shutil.which("nvidia-smi")):
        return ""
    try:
        asked = [command, *arguments]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("the GPUs' driver does not answer: %s", error)
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


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


def gpu_share() -> float:
    """The share of its GPU's memory that this process, a worker, may take."""
    return float(os.environ.get(_SHARE, "1"))


def gpu_memory() -> int:
    """Megabytes that this process, a worker, may take on a GPU that it shares; 0 where it has the
    GPU for itself, or the driver does not say how many there are."""
    share = gpu_share()
    if share == 1.0:
        return 0
    fields = ["--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = ask_driver(*fields, f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
    if not said.isdecimal():
        logger.warning("the GPU's driver does not say how much memory it has: %r", said)
        return 0
    return int(_FOR_ALL * share * int(said))


def share_out(workers: str, per_gpu: int = 1) -> list[Device]:
    """One device for each worker.

    Args:
        workers: "auto" for so many per GPU, or one per core where there is no GPU; or a number.
        per_gpu: with "auto".

    Raises:
        SearchError: if it is neither, or a number above four for each core or GPU; or if there is
            no GPU to share.
    """
    found, available = gpus(), cores()
    check_per_gpu(workers, per_gpu, len(found))
    if workers == "auto":
        count = len(found) * per_gpu or available
    elif workers.isdecimal() and 1 <= int(workers) <= 4 * max(len(found), available):
        count = int(workers)
    else:
        raise SearchError(
            f"--workers is auto, or a number from 1 to {4 * max(len(found), available)} on this "
            f"machine ({available} cores, {len(found)} GPUs). Received: {workers!r}",
            exit_code=EXIT_USAGE,
        )
    threads = max(1, available // count)
    if not found:
        return [Device(threads, None, count)] * count
    each = [count // len(found) + (gpu < count % len(found)) for gpu in range(len(found))]
    at = (i % len(found) for i in range(count))
    return [Device(threads, found[gpu], count, 1 / each[gpu]) for gpu in at]


def asked_for(options: Mapping[str, Any]) -> tuple[str, int]:
    """How many workers, and how many for each GPU, as `share_out` takes them."""
    per_gpu = options.get("per_gpu")
    return str(options.get("workers") or "auto"), 1 if per_gpu is None else per_gpu


def check_per_gpu(workers: str, per_gpu: int, num_gpus: int) -> None:
    """Raises SearchError where --per-gpu can't apply."""
    if not (isinstance(per_gpu, int) and 1 <= per_gpu <= MOST_PER_GPU):
        raise SearchError(
            f"--per-gpu is a number from 1 to {MOST_PER_GPU}. Received: {per_gpu!r}",
            exit_code=EXIT_USAGE,
        )
    if per_gpu > 1 and workers != "auto":
        raise SearchError(
            f"--workers {workers} is their number, so --per-gpu {per_gpu} can't apply. Give one of "
            "the two",
            exit_code=EXIT_USAGE,
        )
    if per_gpu > 1 and not num_gpus:
        raise SearchError(
            f"--per-gpu {per_gpu} can't apply: there is no GPU. Leave it out: there is one worker "
            "for each core, or give their number with --workers",
            exit_code=EXIT_USAGE,
        )


def has_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 natively (elsewhere it is slower)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
