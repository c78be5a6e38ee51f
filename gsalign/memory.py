"""How much memory there is to have, before something large is begun."""

from __future__ import annotations

from pathlib import Path

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """The bytes that the system, or the container around this process, can still hand out.

    Returns:
        None where neither tells.
    """
    told = [limit for limit in (_of_the_system(), _of_the_container()) if limit is not None]
    return min(told) if told else None


def _of_the_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _of_the_container() -> int | None:
    """What is left of the control group's limit; cached files are given back, so they count."""
    try:
        limit = (_CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((_CONTROL_GROUP / "memory.current").read_text())
        held = (_CONTROL_GROUP / "memory.stat").read_text().splitlines()
        files = {name: int(size) for name, size in (line.split() for line in held)}
    except (OSError, ValueError):
        return None
    if not limit.isdecimal():
        return None
    return max(0, int(limit) - used + files.get("inactive_file", 0) + files.get("active_file", 0))
