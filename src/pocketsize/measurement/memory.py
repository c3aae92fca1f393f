"""How much memory this process may still take: the machine's, or what its container leaves of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# Version 2 of cgroups, then version 1: limit, usage, and the usage that is only cached files.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def total_bytes() -> int:
    """The memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """What may still be taken without swapping, or meeting a container's limit; None if nobody says."""
    left = [*_of_machine(proc), *_of_containers(proc, cgroup)]
    return max(0, min(left)) if left else None


def _of_machine(proc: Path) -> Iterator[int]:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _of_containers(proc: Path, cgroup: Path) -> Iterator[int]:
    """What each limit on the way from this process's group to the root leaves."""
    for folder in _groups(proc, cgroup):
        for limit, usage, cached in _FILES:
            if (most := _number(folder / limit)) is None or (used := _number(folder / usage)) is None:
                continue
            yield most - used + _stat(folder / "memory.stat", cached)


def _groups(proc: Path, cgroup: Path) -> Iterator[Path]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = cgroup if number == "0" else cgroup / "memory"
        inner = root / path.lstrip("/")
        # Inside a container the path is often that of the host; the root is then the own group.
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, as in `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _stat(path: Path, key: str) -> int:
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == key), 0)
