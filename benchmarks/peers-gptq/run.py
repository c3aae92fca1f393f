"""GPTQ of Pocketsize, llm-compressor and GPTQModel side by side on one language model.

    python benchmarks/peers-gptq/run.py                     all of it, hours on two cores
    python benchmarks/peers-gptq/run.py --sequences 16      the smaller row alone

Stop it at any moment and start it again: figures of finished runs are kept in `runs/`, what they left
to be scored in `work/`, and both are reused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from contest import Run, opened, options
from language import LENGTH, score, tokens
from sides import SIDES
from summary import record


def main() -> None:
    parser = options(__doc__, Path(__file__).with_name("work"), SIDES)
    parser.add_argument("--sequences", nargs="+", type=int, default=[16, 128])
    chosen = parser.parse_args()
    bench = opened(chosen, "sample:smollm2-135m", "generate")
    runs = order(chosen)
    tokens(bench, chosen.seeds, chosen.downloads)
    bench.carry_out(runs, chosen.phase, score)
    if chosen.phase in ("all", "record"):
        record(bench, runs, Path(__file__).with_name("record.json"))


def order(options: argparse.Namespace) -> list[Run]:
    """All runs, the contestants turn about; what needs no calibration runs once."""
    sides = [side for side in SIDES if side.name in options.sides]
    once = [Run(side, bits, 0, LENGTH, 0) for side in sides for bits in options.bits if not side.calibrated]
    return once + [
        Run(side, bits, sequences, LENGTH, seed)
        for sequences in options.sequences
        for seed in options.seeds
        for bits in options.bits
        for side in sides
        if side.calibrated
    ]


if __name__ == "__main__":
    main()
