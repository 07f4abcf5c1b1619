"""What the kernel's control groups say of this process: its share of the cores, its limit of
memory, and whether it has killed for memory, which is the one evidence that a SIGKILL leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
_V1_PERIOD = 100_000  # microseconds; the kernel's default, which hardly anybody changes
_NO_LIMIT = 2**60  # version 1 says so by a number near 2**63


def cores() -> float | None:
    """As many as may be busy all the time; None where there is no quota."""
    quotas = []
    for text in _contents("cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota, *period = text.split()
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period[0] if period else _V1_PERIOD))
    return min(quotas, default=None)


def memory() -> int | None:
    """Bytes that the processes of the own group may have together; None where there is no limit."""
    limits = [
        int(text)
        for text in _contents("memory", "memory.max", "memory.limit_in_bytes")
        if text.strip() != "max"
    ]
    limit = min(limits, default=_NO_LIMIT)
    return limit if limit < _NO_LIMIT else None


def oom_kills() -> int:
    """Processes of the own group that were killed for memory so far; 0 where nobody counts."""
    for text in _contents("memory", "memory.events", "memory.oom_control"):
        for line in text.splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


class OomKills:
    """Tells whether one has come. There is one of it for all workers that share a count, so that a
    kill is evidence for a single one of them.

    Args:
        count: of `oom_kills`, before the first worker.
    """

    def __init__(self, count: int):
        self._count = count

    def has_grown(self, count: int) -> bool:
        """Whether it is more than when this was last asked."""
        before, self._count = self._count, count
        return count > before


def _contents(controller: str, version_2: str, version_1: str) -> Iterator[str]:
    """A file of the own group, then of those above it: limits of all of them hold. In a container
    the own group is the root of what is mounted."""
    try:
        groups = [line.split(":", 2) for line in GROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in groups:
        if not controllers:
            root, name = ROOT, version_2
        elif controller in controllers.split(","):
            root, name = ROOT / controller, version_1
        else:
            continue
        own = root / group.lstrip("/")
        for folder in (own, *(above for above in own.parents if above.is_relative_to(root))):
            try:
                yield (folder / name).read_text()
            except OSError:
                continue
