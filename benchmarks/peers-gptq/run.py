"""GPTQ of Pocketsize, llm-compressor and GPTQModel side by side on one language model.

    python benchmarks/peers-gptq/run.py                     all of it, hours on two cores
    python benchmarks/peers-gptq/run.py --sequences 16      the smaller row alone

Stop it at any moment and start it again: figures of finished runs are kept in `runs/`, what they left
to be scored in `work/`, and both are reused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from contest import Bench, Run, opened, options
from corpus import domains, first_windows, pick_windows, token_streams
from sides import LENGTH, SIDES
from summary import record

EVALUATION_WINDOWS = 64
TOGETHER = 6


def main() -> None:
    parser = options(__doc__, Path(__file__).with_name("work"), SIDES)
    parser.add_argument("--sequences", nargs="+", type=int, default=[16, 128])
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


def tokens(bench: Bench, seeds: Sequence[int], downloads: Path) -> None:
    """Write the calibration windows of every seed and the evaluation windows, once."""
    evaluate = bench.work / "evaluate.npz"
    if evaluate.exists() and all(bench.calibration(seed).exists() for seed in seeds):
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bench.model / "tokenizer.json"))

    def streams(texts: Sequence[str]) -> list[np.ndarray]:
        return token_streams(texts, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    both = domains(downloads)
    joined = [np.concatenate(streams(domain.calibrate)) for domain in both]
    for seed in seeds:
        np.save(bench.calibration(seed), pick_windows(joined, 128, LENGTH, seed))
    held_out = {d.name: first_windows(streams(d.evaluate), EVALUATION_WINDOWS, LENGTH) for d in both}
    np.savez(evaluate, **held_out)


def score(bench: Bench, runs: Sequence[Run]) -> None:
    """Evaluate whatever is quantized but not scored, a few at a time; the matrices are then deleted."""
    waiting = bench.waiting(runs)
    path = str(Path(__file__).parents[1])
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    for a in range(0, len(waiting), TOGETHER):
        some = waiting[a : a + TOGETHER]
        print(f"scoring {', '.join(run.name for run in some)}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name("score.py")), str(bench.model)]
        command += [str(bench.work / "evaluate.npz"), str(bench.work / "reference.npz")]
        subprocess.run([*command, *(str(bench.results / run.name) for run in some)], env=env, check=True)
        for run in some:
            bench.keep(run)


if __name__ == "__main__":
    main()
