"""Quantizers side by side on one language model, at 4, 3 and 2 bits.

    python benchmarks/peers-quant/run.py                    all of it, hours on two cores
    python benchmarks/peers-quant/run.py --seeds 0          one seed alone
    python benchmarks/peers-quant/run.py --sides pocketsize hqq --phase quantize

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
from sides import FIRST, MORE, SIDES, WIDTHS
from summary import record

SEQUENCES = 16


def main() -> None:
    parser = options(__doc__, Path(__file__).with_name("work"), SIDES)
    parser.set_defaults(bits=[4, 3, 2])
    chosen = parser.parse_args()
    bench = opened(chosen, "sample:smollm2-135m", "generate")
    runs = order(chosen)
    tokens(bench, chosen.seeds, chosen.downloads)
    if chosen.phase in ("all", "quantize"):
        bench.quantize_all(runs)
    if chosen.phase in ("all", "score"):
        score(bench, runs)
    if chosen.phase == "time":
        bench.time_all(runs)
    if chosen.phase in ("all", "record"):
        record(bench, runs, Path(__file__).with_name("record.json"))


def order(options: argparse.Namespace) -> list[Run]:
    """All runs, the contestants turn about; what needs no calibration runs once."""
    pairs = [
        (side, bits)
        for bits in options.bits
        for side in SIDES
        if side.name in options.sides and bits in WIDTHS.get(side.name, options.bits)
    ]
    once = [Run(side, bits, 0, LENGTH, 0) for side, bits in pairs if not side.calibrated]
    return once + [
        Run(side, bits, MORE.get(side.name, SEQUENCES), LENGTH, seed)
        for seed in options.seeds
        for side, bits in pairs
        if side.calibrated and (seed == 0 or side.name not in FIRST)
    ]


if __name__ == "__main__":
    main()
