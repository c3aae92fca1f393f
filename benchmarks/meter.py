"""What one call costs: CPU seconds, wall seconds and the peak memory of its process.

Imported by workers that run in the peers' environments too, so it needs nothing but Python.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


def cpu_seconds() -> float:
    """User and system seconds of this process and of the children it has waited for."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident.

    Linux's VmHWM, because ru_maxrss starts at what the parent held when it forked.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM; this benchmark needs Linux")


def forget_peak() -> None:
    """From here on the peak begins anew, at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass(slots=True)
class Cost:
    """Filled when the metered call ends; `rss_before` is the peak up to its start."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    rss_before: int = 0
    rss_peak: int = 0
    load_1min: float = field(default_factory=lambda: os.getloadavg()[0])

    def as_dict(self) -> dict[str, float]:
        """The figures, rounded to what they can carry."""
        return {
            "cpu_s": round(self.cpu_s, 2),
            "wall_s": round(self.wall_s, 2),
            "rss_before": self.rss_before,
            "rss_peak": self.rss_peak,
            "load_1min": round(self.load_1min, 2),
        }


@contextmanager
def metered() -> Iterator[Cost]:
    """Measure the body of a `with`."""
    cost = Cost(rss_before=peak_rss_bytes())
    cpu, wall = cpu_seconds(), time.perf_counter()
    yield cost
    cost.cpu_s, cost.wall_s = cpu_seconds() - cpu, time.perf_counter() - wall
    cost.rss_peak = peak_rss_bytes()


def today() -> str:
    """The date of a figure."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def write_json(path: Path, value: object) -> None:
    """Write beside, then rename: a killed run leaves no half result."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
