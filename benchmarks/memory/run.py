"""Memory and time of a whole quantization, from shards on disk to shards on disk, as models grow.

    python benchmarks/memory/run.py

Writes llama folders of random weights (4 GB in all), quantizes each with GPTQ in a process of its own, on
the same number of tokens, and writes the folder. Finished sizes are kept in `work/` and reused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bars import Bar, write_record
from contest import ROOT, fetched
from folders import SIZES, Size, write_folder

QUESTION = "How do peak memory and time of a whole quantization grow with the model?"
SEQUENCES, LENGTH, THREADS = 16, 512, 1
BASE, STATES = 1.2e9, 256e6
# Seconds per parameter of the largest model over those of the smallest.
LINEAR = 1.25


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--sizes", nargs="+", default=[size.name for size in SIZES])
    parser.add_argument("--cpu", type=int, help="pin everything to this core")
    chosen = parser.parse_args()
    if chosen.cpu is not None:
        os.sched_setaffinity(0, {chosen.cpu})
    sizes = [size for size in SIZES if size.name in chosen.sizes]
    rows = [row(size, quantized(size, chosen.work)) for size in sizes]
    if len(rows) < len(SIZES):
        raise SystemExit(f"{len(rows)} of {len(SIZES)} sizes are there; the record needs all")
    record(rows)


def quantized(size: Size, work: Path) -> dict[str, float]:
    """What one quantization cost; done if that is not known."""
    known = work / f"{size.name}.json"
    if not known.exists():
        folder = work / size.name
        write_folder(folder, size, tokenizer=fetched("sample:smollm2-135m"))
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{Path(__file__).parents[1]}"}
        env |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder), str(known)]
        subprocess.run([*command, str(SEQUENCES), str(LENGTH)], env=env, check=True)
    return json.loads(known.read_text())


def row(size: Size, cost: dict[str, float]) -> dict[str, object]:
    """The figures of one size beside what it was promised."""
    allowed = BASE + size.embedding_bytes + 3 * size.block_bytes + 3 * size.gram_bytes
    return {
        "model": size.name,
        "parameters": size.parameters,
        "blocks": cost["blocks"],
        "peak_anonymous_bytes": cost["peak_anonymous_bytes"],
        "allowed_bytes": allowed,
        "of_allowed": round(cost["peak_anonymous_bytes"] / allowed, 4),
        "hidden_bytes": SEQUENCES * LENGTH * size.hidden * 2,
        "cpu_s": cost["cpu_s"],
        "ns_per_parameter": round(1e9 * cost["cpu_s"] / size.parameters, 1),
    }


def record(rows: Sequence[dict[str, object]]) -> None:
    """The rows and the bars."""
    small, large = SIZES[0], SIZES[-1]
    pace = [float(str(one["ns_per_parameter"])) for one in rows]
    bars = [
        Bar(
            f"{one['model']}: peak anonymous memory against what is allowed",
            float(str(one["of_allowed"])),
            "ratio",
            "lower",
            1,
        )
        for one in rows
    ]
    states = max(float(str(one["hidden_bytes"])) for one in rows)
    bars += [
        Bar("hidden states between blocks", states / 1e6, "MB", "lower", STATES / 1e6),
        Bar(
            f"CPU seconds per parameter, {large.name} against {small.name}",
            pace[-1] / pace[0],
            "ratio",
            "lower",
            LINEAR,
        ),
    ]
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=THREADS,
        protocol=[
            "random llama folders in bfloat16, shards of 1 GB; GPTQ W4A16 with group 64, "
            f"{SEQUENCES} x {LENGTH} tokens",
            "from the opened folder to the written one, journal included; a process of its own for each size",
            "peak anonymous memory: RssAnon, read every 20 ms",
            "allowed: 1.2 GB + embedding (bfloat16) + 3 blocks and 3 of the largest Gram matrix (float32)",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numba", "numpy")},
        rows=rows,
        bars=bars,
    )


if __name__ == "__main__":
    main()
