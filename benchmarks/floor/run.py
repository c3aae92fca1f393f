"""How far GPTQ of SmolLM2 is from what its matrix products alone would take.

    python benchmarks/floor/run.py

Times the whole quantization in a process of its own, on one thread and on two, and in the same process the
rate of bfloat16 matrix products. Finished runs are kept in `work/` and reused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bars import ratio_bars, write_record
from contest import ROOT, fetched

QUESTION = "How far is GPTQ of SmolLM2-135M from the time that its matrix products alone take?"
LENGTH, TARGET = 512, 1.3
RUNS = ((16, 1), (64, 1), (16, 2), (64, 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    model = fetched("sample:smollm2-135m")
    runs = [run for run in RUNS if run[1] in chosen.threads]
    found = {run: timed(model, chosen.work, *run) for run in runs}
    if len(runs) < len(RUNS):
        raise SystemExit(f"{len(runs)} of {len(RUNS)} runs are there; the record needs all")
    record([row(*run, cost) for run, cost in found.items()])


def timed(model: Path, work: Path, sequences: int, threads: int) -> dict[str, float]:
    """What one quantization took; done if that is not known."""
    known = work / f"{sequences}x{LENGTH}-{threads}.json"
    if not known.exists():
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{Path(__file__).parents[1]}"}
        env |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(model), str(known)]
        subprocess.run([*command, str(sequences), str(LENGTH)], env=env, check=True)
    return json.loads(known.read_text())


def row(sequences: int, threads: int, cost: Mapping[str, float]) -> dict[str, object]:
    """One run beside its floor: two passes and the Gram products, at the rate measured around it."""
    tokens = sequences * LENGTH
    single, floor = (
        (passes * cost["forward_flop"] + cost["gram_flop"]) / cost["flop_per_s"] for passes in (1, 2)
    )
    return {
        "tokens": tokens,
        "threads": threads,
        "wall_s": cost["wall_s"],
        "floor_s": round(floor, 2),
        "ratio": round(cost["wall_s"] / floor, 4),
        "ratio_single": round(cost["wall_s"] / single, 4),
        "gflop_per_s": round(cost["flop_per_s"] / 1e9, 1),
        "parts_s": cost["parts_s"],
    }


def record(rows: Sequence[Mapping[str, object]]) -> None:
    """The rows, and a bar for each."""
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            "GPTQ W4A16, group 64, all linears, embedding left alone; wall seconds from the opened folder to "
            "the last matrix, compilation included, nothing written",
            "floor: two bfloat16 passes through all linears and a triangle of each Gram matrix, at the best "
            "rate of bfloat16 products of the model's own shapes, taken before and after in the same process",
            "single: the same with one pass, which is what this walk makes",
            "parts: seconds inside the named calls; rest is norms, activations, reading and Python",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numba", "numpy")},
        rows=rows,
        bars=ratio_bars(
            {
                f"quantization against its floor, {one['tokens']} tokens, threads: {one['threads']}": one
                for one in rows
            },
            TARGET,
        ),
    )


if __name__ == "__main__":
    main()
