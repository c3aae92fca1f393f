"""Half of the weights zero: Pocketsize beside SparseGPT and Wanda of llm-compressor.

    python benchmarks/pruning/run.py                            both models, three seeds: hours on two cores
    python benchmarks/pruning/run.py --models smollm2-135m --seeds 0

Stop it at any moment and start it again: figures of finished runs are kept in `runs/`, what they left
to be scored in `work/`, and both are reused.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import encoder
import language
from contest import Bench, Run, opened, options
from sides import MODELS, SIDES, TASKS
from summary import record

HERE = Path(__file__).parent
SOURCES = (
    *("pruning", "linalg.py", "models/archs", "models/dtype.py", "models/products.py", "models/taps.py"),
    *("models/walk.py", "quantization", "recipes/correct.py", "recipes/oats.py", "recipes/prune.py"),
    *("recipes/quantize.py", "recipes/shares.py", "recipes/sites.py", "recipes/survivors.py"),
)
# Windows of each kind of text that language models are scored on.
EVALUATED = 24
# Windows that calibrate, and their length, by task.
WINDOWS = {"generate": (16, 512), "embed": (64, 256)}


def main() -> None:
    parser = options(__doc__, HERE / "work", SIDES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    chosen = parser.parse_args()
    benches = {name: bench_of(chosen, name) for name in chosen.models}
    for bench in benches.values():
        runs = runs_of(bench, chosen)
        kind = language if bench.task == "generate" else encoder
        if bench.task == "generate":
            language.tokens(bench, chosen.seeds, chosen.downloads, windows=EVALUATED)
        else:
            encoder.tokens(bench, chosen.seeds, chosen.downloads)
        bench.carry_out(runs, chosen.phase, kind.score)
    if chosen.phase in ("all", "record"):
        record(
            {name: (bench, runs_of(bench, chosen)) for name, bench in benches.items()}, HERE / "record.json"
        )


def bench_of(chosen: argparse.Namespace, name: str) -> Bench:
    """The bench of one model, in a folder of its own."""
    return replace(opened(chosen, f"sample:{name}", MODELS[name], own=name), parts=SOURCES)


def runs_of(bench: Bench, chosen: argparse.Namespace) -> list[Run]:
    """All runs of a model, the contestants turn about."""
    sequences, length = WINDOWS[bench.task]
    sides = [side for side in SIDES if side.name in chosen.sides and bench.task in TASKS[side.name]]
    return [Run(side, 0, sequences, length, seed) for seed in chosen.seeds for side in sides]


if __name__ == "__main__":
    main()
