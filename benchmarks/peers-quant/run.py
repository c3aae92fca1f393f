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

from contest import Run, in_turn, opened, options
from contestants import WIDTHS
from language import LENGTH, score, tokens
from sides import FIRST, MORE, SIDES
from summary import record

SEQUENCES = 16


def main() -> None:
    parser = options(__doc__, Path(__file__).with_name("work"), SIDES)
    parser.set_defaults(bits=[4, 3, 2])
    chosen = parser.parse_args()
    bench = opened(chosen, "sample:smollm2-135m", "generate")
    runs = order(chosen)
    tokens(bench, chosen.seeds, chosen.downloads)
    bench.carry_out(runs, chosen.phase, score)
    if chosen.phase in ("all", "record"):
        record(bench, runs, Path(__file__).with_name("record.json"))


def order(options: argparse.Namespace) -> list[Run]:
    """All runs; some sides have the first seed alone."""
    runs = in_turn(options, SIDES, WIDTHS, lambda side: MORE.get(side.name, SEQUENCES), LENGTH)
    return [run for run in runs if run.seed == 0 or run.side.name not in FIRST]


if __name__ == "__main__":
    main()
