"""Runs that are killed, stopped and starved: what is lost.

    python benchmarks/killed/run.py

Kills 200 runs of a tiny model at random moments, and one at every file operation; fills the disk at
every operation that needs room. `tests/experiments.py` is the laboratory, and runs 40 of these shots
with every change.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"

from bars import Bar, write_record

from experiments import failures, kills, shots
from faults import Lab

QUESTION = "What is lost when a run is killed at any moment, or its disk is full?"


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shots", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    shutil.rmtree(work, ignore_errors=True)
    full, quick = Lab(work / "full", quick=False), Lab(work / "quick")
    printed, sys.stdout = sys.stdout, sys.stderr
    full.prepare()
    shot = shots(full, chosen.shots, seed=chosen.seed)
    quick.prepare()
    points = {
        "killed at every file operation": kills(quick, overwrite=False),
        "killed at every file operation, replacing a finished output": kills(quick, overwrite=True),
        "disk full from every operation on": failures(quick, overwrite=False, code=errno.ENOSPC),
        "disk full from every operation on, replacing a finished output": failures(
            quick, overwrite=True, code=errno.ENOSPC
        ),
        "every fsync failing once, replacing a finished output": failures(
            quick, overwrite=True, code=errno.EIO
        ),
    }
    sys.stdout = printed
    record(shot, points, chosen.shots)
    shutil.rmtree(work)


def record(shot: dict[str, Any], points: dict[str, dict[str, Any]], count: int) -> None:
    """One row per kind of fault, one for each number of layers that were kept when a shot fell."""
    shots_right = [row for row in shot["rows"] if row["same"] and not row["wrong"]]
    rows = [_row(f"killed at {shot['cases']} random moments", shot)]
    rows += [
        {
            "fault": f"of these, {kept} of 3 layers kept",
            "cases": len(
                some := [row for row in shot["rows"] if row["kept"] == kept and row["state"] == "old"]
            ),
            "while going on": sum(row["second"] for row in some),
        }
        for kept in range(4)
    ]
    rows += [_row(name, found) for name, found in points.items()]
    cases = sum(found["cases"] for found in points.values())
    for name, found in (("random moments", shot), *points.items()):
        for said in found["problems"]:
            print(f"{name}: {said}", file=sys.stderr)
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"a llama of 2 blocks, gptq W4A16 with embedding, exports gguf and folder; a run takes "
            f"{shot['run_s']:.2f} s of CPU, and half of them replace a finished output of 8 bits",
            "random: SIGKILL at a moment drawn evenly from that time, seed 1; a quarter of the runs is "
            "killed again while it goes on; then the same command is given again until it ends",
            "every operation: what the file system holds before each call that changes it, and half-way "
            "through each write, is copied; from each state that differs the same command is given again",
            "old or new: no output, or the old one byte by byte; or the new one byte by byte with a manifest "
            "that agrees; record.json equal but for its timing; files that hold timings by name",
            "left out: loading in transformers and llama.cpp, timings of latency (they write no files)",
            "fsync is counted and made to fail, not carried out: power loss is not simulated",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numpy", "gguf")},
        rows=rows,
        bars=[
            Bar(
                f"killed at {count} random moments: output old or new, and whole",
                100 * sum(row["state"] in ("old", "new") for row in shot["rows"]) / len(shot["rows"]),
                "%",
                "higher",
                100,
            ),
            Bar(
                f"killed at {count} random moments: layers done twice, at most",
                max(row["redone"] for row in shot["rows"]),
                "layers",
                "lower",
                1,
            ),
            Bar(
                f"killed at {count} random moments: nothing lost, ended with the same bytes",
                100 * len(shots_right) / len(shot["rows"]),
                "%",
                "higher",
                100,
            ),
            Bar(
                "killed or out of space at every file operation: old or new, goes on, same bytes",
                100 * (1 - sum(len(found["problems"]) for found in points.values()) / cases),
                "%",
                "higher",
                100,
            ),
        ],
    )


def _row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "fault": name,
        "cases": found["cases"],
        "old": found["states"]["old"],
        "new": found["states"]["new"],
        "went on from": found["resumed"],
        "wrong": len(found["problems"]),
    }


if __name__ == "__main__":
    main()
