"""The texts that language models are calibrated and scored on, how a run is scored, and its figures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from contest import HERE, Bench, Run
from corpus import domains, first_windows, pick_windows, token_streams
from results import Figure, Result, head, spread

LENGTH = 512
EVALUATION_WINDOWS = 64
TOGETHER = 6


def tokens(bench: Bench, seeds: Sequence[int], downloads: Path, *, windows: int = EVALUATION_WINDOWS) -> None:
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
    held_out = {d.name: first_windows(streams(d.evaluate), windows, LENGTH) for d in both}
    np.savez(evaluate, **held_out)


def score(bench: Bench, runs: Sequence[Run]) -> None:
    """Evaluate whatever is quantized but not scored, a few at a time; the matrices are then deleted."""
    waiting = bench.waiting(runs)
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    for a in range(0, len(waiting), TOGETHER):
        some = waiting[a : a + TOGETHER]
        print(f"scoring {', '.join(run.name for run in some)}", flush=True)
        command = [sys.executable, str(HERE / "score_language.py"), str(bench.model)]
        command += [str(bench.work / "evaluate.npz"), str(bench.work / "reference.npz")]
        subprocess.run([*command, *(str(bench.results / run.name) for run in some)], env=env, check=True)
        for run in some:
            bench.keep(run)


def row(results: Sequence[Result]) -> dict[str, object]:
    """One line of the table: of both domains the worse; medians over the seeds, the range beside them."""
    domains = [list(one.domains.values()) for one in results]
    ratios = [[d["perplexity"] / d["perplexity_original"] for d in pair] for pair in domains]
    return {
        **head(results),
        "kl": spread(max(d["kl_mean"] for d in pair) for pair in domains),
        "kl_p99": spread(max(d["kl_p99"] for d in pair) for pair in domains),
        "top1": spread(min(d["top1"] for d in pair) for pair in domains),
        "perplexity_ratio": spread(max(pair) for pair in ratios),
        "domains": {name: by_domain(results, name) for name in results[0].domains},
    }


def by_domain(results: Sequence[Result], name: str) -> dict[str, dict[str, float]]:
    """The figures that are worth seeing for each kind of text."""
    keys = ("kl_mean", "perplexity", "perplexity_original")
    return {key: spread(one.domains[name][key] for one in results) for key in keys}


def kl_on(domain: str) -> Figure:
    """KL on one kind of text."""
    return lambda one: one.domains[domain]["kl_mean"]
