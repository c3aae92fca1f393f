"""Time and memory of quantization as models grow, in width and in depth.

    python benchmarks/scaling/run.py

Writes llama folders of random weights (5 GB in all) and quantizes each by every step in a process of its own,
on the same tokens. Finished runs are kept in `work/` and reused; `plot.py` draws what is recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bars import Bar, write_record
from contest import ROOT, fetched
from folders import SIZES, Size, write_folder
from plot import write_plot

QUESTION = "How do time and memory of each way to quantize grow with the model, in width and in depth?"
# Windows longer than half a batch: so few make the four batches of which learning holds one out.
SEQUENCES, LENGTH, THREADS = 4, 1088, 1
GRID = {"scheme": "W4A16", "group": 64, "embeddings": None}
STEPS = {
    "gptq": {"gptq": GRID},
    "awq": {"awq": GRID},
    "hqq": {"hqq": GRID | {"iterations": 2}},
    "gptq, learned": {"gptq": GRID | {"learn": 4}},
}
LEARNED = "gptq, learned"
SMALL = Size("small", 128, 256, 2, 2, 1)
WIDER, DEEPER = "width", "depth"
DEPTHS = (12, 24, 48)
# Learning takes five times as long: it is given so few blocks of each width, and grows from there to 12.
BLOCKS_LEARNED = 2
# What the heap may keep in gaps before it is told to give them back, and what is held of a block and its
# Gram matrices in float32; of a block that is learned also places, means and squares of gradients.
GAPS, HELD, HELD_LEARNED = 176e6, 3, 8
POWER, FLAT = 1.1, 1.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    chosen = parser.parse_args()
    known = {step: list(grown(step)) for step in STEPS}
    wanted = [(size, step) for step in chosen.steps for _, size in known[step]]
    for size, step in sorted(wanted, key=lambda one: weights(one[0])):
        quantized(size, step, chosen.work)
    whole = [
        step for step in STEPS if all(result(size, step, chosen.work).exists() for _, size in known[step])
    ]
    if not whole:
        raise SystemExit("no step has all its runs: nothing to record")
    if missing := sorted(STEPS.keys() - whole):
        print(f"left out: {', '.join(missing)} not finished", file=sys.stderr)
    rows = [
        (step, way, size, quantized(size, step, chosen.work)) for step in whole for way, size in known[step]
    ]
    record([row(*one) for one in rows])


def grown(step: str) -> Iterator[tuple[str, Size]]:
    """The models of a step, by what grows from each to the next."""
    for size in SIZES:
        learned = replace(size, name=f"{size.name}-{BLOCKS_LEARNED}", blocks=BLOCKS_LEARNED)
        yield WIDER, learned if step == LEARNED else size
    for blocks in (BLOCKS_LEARNED, DEPTHS[0]) if step == LEARNED else DEPTHS:
        yield DEEPER, replace(SIZES[0], name=f"{SIZES[0].name}-{blocks}", blocks=blocks)


def weights(size: Size) -> int:
    """Weights of the matrices of all blocks: those that are quantized."""
    return size.blocks * size.block_weights


def result(size: Size, step: str, work: Path) -> Path:
    """Where the cost of one quantization is kept."""
    return work / "results" / f"{size.name}-{step.replace(', ', '-')}.json"


def quantized(size: Size, step: str, work: Path) -> dict[str, Any]:
    """What one quantization cost; done if that is not known."""
    known = result(size, step, work)
    if not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        for one in (SMALL, size):
            write_folder(work / one.name, one, tokenizer=fetched("sample:smollm2-135m"))
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{Path(__file__).parents[1]}"}
        env |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        command += [str(work / SMALL.name), str(work / size.name), str(known), json.dumps(STEPS[step])]
        subprocess.run([*command, str(SEQUENCES), str(LENGTH)], env=env, check=True)
        print(f"{size.name} {step}: {known.read_text()}", flush=True)
    return json.loads(known.read_text())


def row(step: str, way: str, size: Size, cost: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run beside what it was promised."""
    if cost["matrices"] != 7 * size.blocks or (step == LEARNED and cost["stages"] != ["gptq", "learned"]):
        raise SystemExit(f"{size.name}, {step}: not all was quantized: {cost}")
    allowed = cost["rss_before"] + room(size, step, cost["number_bytes"])
    return {
        "method": step,
        "grows in": way,
        "blocks": size.blocks,
        "hidden": size.hidden,
        "block_weights": weights(size),
        "cpu_s": cost["cpu_s"],
        "ns_per_weight": round(1e9 * cost["cpu_s"] / weights(size), 1),
        "start_mb": round(cost["rss_before"] / 1e6, 1),
        "rss_peak_mb": round(cost["rss_peak"] / 1e6, 1),
        "of_allowed": round(cost["rss_peak"] / allowed, 4),
        "model_mb": round(2 * size.parameters / 1e6, 1),
        "wall_s": cost["wall_s"],
        "load_1min": cost["load_1min"],
    }


def room(size: Size, step: str, number_bytes: int) -> float:
    """What a walk with one block in memory may add to a process: nothing of it grows with the blocks."""
    embedding = size.embedding_bytes * (1 + number_bytes / 2)
    tokens = SEQUENCES * LENGTH * number_bytes
    states = (2 if step == LEARNED else 1) * tokens * size.hidden
    waiting = tokens * (size.inner + 4 * size.hidden)
    held = HELD_LEARNED if step == LEARNED else HELD
    return embedding + states + waiting + held * size.block_bytes + HELD * size.gram_bytes + GAPS


def power(rows: Sequence[dict[str, Any]]) -> float:
    """The power of the weights by which CPU seconds grow: least squares on logarithms."""
    points = [[math.log(one[key]) for one in rows] for key in ("block_weights", "cpu_s")]
    return statistics.linear_regression(*points).slope


def record(rows: Sequence[dict[str, Any]]) -> None:
    """The rows, the bars and the plot."""
    bars: list[Bar] = []
    for step in dict.fromkeys(one["method"] for one in rows):
        wider, deeper = (
            [one for one in rows if (one["method"], one["grows in"]) == (step, way)]
            for way in (WIDER, DEEPER)
        )
        peaks = [one["rss_peak_mb"] for one in deeper]
        share = max(one["of_allowed"] for one in wider)
        ends = f"{deeper[0]['blocks']} to {deeper[-1]['blocks']} blocks"
        bars += [
            Bar(
                f"{step}: three widths, CPU seconds as weights to the power of",
                power(wider),
                "",
                "lower",
                POWER,
            ),
            Bar(f"{step}: {ends}, CPU seconds as weights to the power of", power(deeper), "", "lower", POWER),
            Bar(
                f"{step}: {ends}, largest peak over smallest", max(peaks) / min(peaks), "ratio", "lower", FLAT
            ),
            Bar(f"{step}: three widths, worst peak over what is allowed", share, "ratio", "lower", 1),
        ]
    path = Path(__file__).with_name("record.json")
    write_record(
        path,
        question=QUESTION,
        threads=THREADS,
        protocol=[
            f"random llama folders in bfloat16, shards of 1 GB; {SEQUENCES} x {LENGTH} tokens; W4A16 with "
            "group 64, embedding left alone; from the opened folder to the written one, journal included",
            "gptq is what --effort fast gives; hqq has 2 iterations; gptq, learned has learn: 4, which "
            "quantizes twice and keeps what judges better",
            "width: models of 135 and 500 million and 1.5 billion parameters; depth: "
            f"{', '.join(map(str, DEPTHS))} blocks of the first; gptq, learned: {BLOCKS_LEARNED} blocks of "
            f"each width, and of the first {DEPTHS[0]} too",
            "a process of its own for each run, in which a model of two small blocks goes first: imports and "
            "compilation count neither as time nor as memory (start)",
            "power: slope of a straight line by least squares, log CPU seconds over log weights in blocks",
            "peak: VmHWM; allowed: start + embedding (as stored, and as it runs) + hidden states + what "
            f"waits + {HELD} blocks ({HELD_LEARNED} where one is learned) and {HELD} of the largest Gram "
            f"matrix, in float32 + {GAPS / 1e6:.0f} MB of gaps in the heap",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numba", "numpy")},
        rows=rows,
        bars=bars,
    )
    write_plot(path)


if __name__ == "__main__":
    main()
