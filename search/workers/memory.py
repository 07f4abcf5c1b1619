"""Whether the kernel has killed for memory: the one evidence that a SIGKILL leaves."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def oom_kills() -> int:
    """Processes of this one's cgroup that were killed for memory so far; 0 where nobody counts."""
    for path in _counters():
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _counters() -> list[Path]:
    """Version 2 first, then 1; in a container the own group is the root of what is mounted."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, group in groups:
        below = group.lstrip("/")
        if not controllers:
            found += [_ROOT / below / "memory.events", _ROOT / "memory.events"]
        if "memory" in controllers.split(","):
            version_1 = _ROOT / "memory"
            found += [version_1 / below / "memory.oom_control", version_1 / "memory.oom_control"]
    return found
