"""A process, its children and the folders it writes, looked at from outside until it ends."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

EVERY_S = 0.1


@dataclass(slots=True)
class Seen:
    """The most that was seen: of each child alone, of the whole family at once, on the disk."""

    children: dict[int, int] = field(default_factory=dict)
    family_bytes: int = 0
    disk_bytes: int = 0
    returncode: int = 0

    @property
    def child_bytes(self) -> int:
        """The largest child's high-water mark."""
        return max(self.children.values(), default=0)


def watched(command: Sequence[str], folders: Sequence[Path], environment: dict[str, str]) -> Seen:
    """Run a command; `folders` are those whose files count as its disk."""
    seen = Seen()
    process = subprocess.Popen(command, env=environment)
    ticks = 0
    while process.poll() is None:
        family = list(_family(process.pid))
        for pid in family[1:]:
            seen.children[pid] = max(seen.children.get(pid, 0), _status(pid, "VmHWM"))
        seen.family_bytes = max(seen.family_bytes, sum(_status(pid, "VmRSS") for pid in family))
        if ticks % 5 == 0:
            seen.disk_bytes = max(seen.disk_bytes, sum(map(folder_bytes, folders)))
        ticks += 1
        time.sleep(EVERY_S)
    seen.returncode = process.returncode
    return seen


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(where, name)).st_size
            except FileNotFoundError:  # renamed meanwhile
                continue
    return total


def _family(pid: int) -> Iterator[int]:
    """A process, then all that descend from it."""
    parents: dict[int, list[int]] = {}
    for one in filter(str.isdigit, os.listdir("/proc")):
        try:
            told = Path("/proc", one, "stat").read_text()
        except OSError:  # ended meanwhile
            continue
        parents.setdefault(int(told.rpartition(")")[2].split()[1]), []).append(int(one))
    left = [pid]
    while left:
        yield left[0]
        left += parents.get(left.pop(0), [])


def _status(pid: int, key: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
