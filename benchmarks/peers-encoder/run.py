"""Sentence encoders at 4, 3 and 2 bits: Pocketsize, three other tools and plain rounding.

    python benchmarks/peers-encoder/run.py                        both encoders, hours on two cores
    python benchmarks/peers-encoder/run.py --samples minilm-l6    one of them

Stop it at any moment and start it again: figures of finished runs are kept in `runs/`, what they left
to be scored in `work/`, and both are reused.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from contest import ROOT, Bench, Run, in_turn, opened, options
from contestants import BALANCED_ENCODER, FAST, HQQ, LLMCOMPRESSOR, NNCF, ROUNDING, WIDTHS
from corpus import domains, pick_windows, token_streams
from meter import write_json
from summary import record

SEQUENCES, LENGTH = 64, 256
SAMPLES = ("mpnet-base", "minilm-l6")
SIDES = (LLMCOMPRESSOR, NNCF, HQQ, FAST, BALANCED_ENCODER, ROUNDING)


def main() -> None:
    parser = options(__doc__, Path(__file__).with_name("work"), SIDES)
    parser.add_argument("--samples", nargs="+", choices=SAMPLES, default=list(SAMPLES))
    parser.set_defaults(bits=[4, 3, 2])
    chosen = parser.parse_args()
    runs = in_turn(chosen, SIDES, WIDTHS, lambda _: SEQUENCES, LENGTH)
    benches = {name: opened(chosen, f"sample:{name}", "embed", own=name) for name in chosen.samples}
    for bench in benches.values():
        texts(bench, chosen.seeds, chosen.downloads)
        bench.carry_out(runs, chosen.phase, score)
    if chosen.phase in ("all", "record"):
        record(benches, runs, Path(__file__).with_name("record.json"))


def texts(bench: Bench, seeds: Sequence[int], downloads: Path) -> None:
    """Write the calibration windows of every seed, and the held-out documents, once."""
    held_out = bench.work / "evaluate.json"
    if held_out.exists() and all(bench.calibration(seed).exists() for seed in seeds):
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bench.model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    first, *_, last = tokenizer.encode("a").ids

    def encode(text: str) -> Sequence[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    both = domains(downloads)
    joined = [np.concatenate(token_streams(domain.calibrate, encode)) for domain in both]
    for seed in seeds:
        inner = pick_windows(joined, SEQUENCES, LENGTH - 2, seed)
        np.save(
            bench.calibration(seed), np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (first, last)))
        )
    write_json(held_out, {domain.name: domain.evaluate for domain in both})


def score(bench: Bench, runs: Sequence[Run]) -> None:
    """Evaluate whatever is quantized but not scored; the matrices are then deleted."""
    waiting = bench.waiting(runs)
    if not waiting:
        return
    path = os.pathsep.join(map(str, (Path(__file__).parents[1], ROOT / "src")))
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("score.py")), str(bench.model)]
    command += [str(bench.work / "evaluate.json"), *(str(bench.results / run.name) for run in waiting)]
    subprocess.run(command, env=env, check=True)
    for run in waiting:
        bench.keep(run)


if __name__ == "__main__":
    main()
