"""The most that each of two quantizers does by default: `--effort best`, and AutoRound with its 200 steps.

    python benchmarks/peers-best/run.py               4 bits, one seed: about two hours of one core
    python benchmarks/peers-best/run.py --bits 4 2

Stop it at any moment and start it again: figures of finished runs are kept in `runs/`, what they left
to be scored in `work/`, and both are reused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bars import Bar, write_record
from contest import GROUP, OURS, Bench, Run, Side, in_turn, opened, options
from contestants import BALANCED
from language import LENGTH, kl_on, row, score, tokens
from results import Result, collected, cost, grouped, versions, worst

SEQUENCES = 16
BEST = f"{OURS}-best"
# What `--effort best` does (recipes/qat.py, of_effort).
_KEYS = {"learn": 100, "alpha": 0.25, "codes": False, "tokens": "128k", "batch": 2, "recompute": True}
SIDES = (
    Side("autoround", "side_autoround.py", ("auto-round==0.16.1",), {"ITERATIONS": "200"}, batch=8),
    Side(
        BEST,
        "side_variant.py",
        environment={"VARIANT": json.dumps({"step": {"qat": _KEYS}, "export": ["folder"]})},
        revision=2,
    ),
    BALANCED,
)
QUESTION = (
    "What does --effort best give beside AutoRound with as many steps as it takes by default, "
    "and does it cost more?"
)


def main() -> None:
    parser = options(__doc__, Path(__file__).with_name("work"), SIDES)
    parser.set_defaults(bits=[4], seeds=[0])
    chosen = parser.parse_args()
    bench = opened(chosen, "sample:smollm2-135m", "generate")
    runs = in_turn(chosen, SIDES, {}, lambda _: SEQUENCES, LENGTH)
    tokens(bench, chosen.seeds, chosen.downloads)
    bench.carry_out(runs, chosen.phase, score)
    if chosen.phase in ("all", "record"):
        record(bench, runs, Path(__file__).with_name("record.json"))


def record(bench: Bench, runs: Sequence[Run], path: Path) -> None:
    """Write the record of all widths at which every side is finished and scored."""
    results = collected(bench, runs)
    found = [
        bar for bits in sorted({one.run.bits for one in results}, reverse=True) for bar in bars(bits, results)
    ]
    write_record(
        path,
        question=QUESTION,
        threads=1,
        protocol=[
            f"SmolLM2-135M-Instruct, relative to the dequantized release; all block linears, group {GROUP}, "
            "asymmetric, whole zeros; embedding and head left alone by both sides",
            f"calibration: {SEQUENCES} windows of {LENGTH} tokens, half fiction, half speeches, the same "
            "arrays for both; --effort best tunes scales by the text of these windows too, time and again",
            "autoround: 200 steps a block, its default, batches of 8 windows, bfloat16; pocketsize-best: 100 "
            "steps a block, then scales tuned by the whole model on 128,000 tokens; judging is in its time",
            "evaluation: 64 windows of each kind of text; no document is in both; one evaluator",
            "CPU seconds: user and system time of the quantization call in its process, loading left out, "
            "compilation by numba included (empty cache)",
            "rows: of the two kinds of text the worse; `load_1min` tells how busy the machine was",
        ],
        versions=versions(results),
        rows=[row(one) for one in grouped(results)],
        bars=found,
    )


def bars(bits: int, results: Sequence[Result]) -> list[Bar]:
    """Ours over AutoRound at one width, the worst of seeds and kinds of text."""
    runs = [one for one in results if one.run.bits == bits]
    seeds = len({one.run.seed for one in runs})
    where = f"{bits} bit, worst of {seeds} seed{'s' * (seeds > 1)}"
    kl = [worst(runs, BEST, kl_on(name), _peer) for name in runs[0].domains]
    told = {
        "KL of best against AutoRound's default": (
            max((one for one in kl if one is not None), default=None),
            0.8,
        ),
        "CPU seconds of best against AutoRound's default": (worst(runs, BEST, cost("cpu_s"), _peer), 1.0),
        "peak memory of best against AutoRound's default": (worst(runs, BEST, cost("rss_peak"), _peer), 1.0),
    }
    return [
        Bar(f"{where}: {name}", value, "ratio", "lower", bar)
        for name, (value, bar) in told.items()
        if value is not None
    ]


def _peer(one: Result) -> bool:
    return one.run.side.is_peer


if __name__ == "__main__":
    main()
