"""One recipe, run as `pocketsize run` would; what each of its stages took is written down.

    python worker.py RECIPE OUT RESULT

The high-water mark of memory is set back at the start of each stage, so that each has its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from meter import cpu_seconds, peak_rss_bytes, write_json

import pocketsize.recipes.run as running
from pocketsize import api
from pocketsize.recipes.recipe import read_recipe


def main() -> None:
    recipe, out, result = map(Path, sys.argv[1:])
    stages: list[dict[str, object]] = []
    announce = running.Clock.phase

    @contextmanager
    def phase(clock: running.Clock, name: str, **how: bool) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")
        cpu, wall, before = cpu_seconds(), time.perf_counter(), resident()
        with announce(clock, name, **how):
            yield
        stages.append(
            {
                "name": name,
                "wall_s": round(time.perf_counter() - wall, 2),
                "cpu_s": round(cpu_seconds() - cpu, 2),
                "rss_before": before,
                "rss_peak": peak_rss_bytes(),
                "rss_after": resident(),
            }
        )
        write_json(result, {"stages": stages})

    running.Clock.phase = phase  # type: ignore[method-assign]
    wall = time.perf_counter()
    api.run(read_recipe(recipe), out=out)
    facts = {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(cpu_seconds(), 2)}
    write_json(result, {"stages": stages} | facts)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS; this benchmark needs Linux")


if __name__ == "__main__":
    main()
