"""From finished runs to `record.json`: one row per contestant, and the bars."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from bars import Bar, not_run_again, write_record
from contest import Bench, Run
from results import Result, finished, head, spread, versions
from sides import DENSE, JOINT, OURS, PATTERNS, PEERS, stem

QUESTION = (
    "With half of the weights zero: how close to the original do models that Pocketsize prunes stay, and "
    "what does it cost, beside SparseGPT and Wanda of llm-compressor? "
    "And are pruned codes better than fewer bits?"
)
DRAWS = 2000
# What scores keep of single windows, or sentences.
PARTS = ("kl_windows", "one_minus_cosine_sentences")


def record(benches: Mapping[str, tuple[Bench, Sequence[Run]]], path: Path) -> None:
    """Write the record of all that is finished and scored.

    A model that was not run stays as it was recorded, and its rows name the commit of then.
    """
    rows, bars, before = not_run_again(path, benches)
    kept, found = len(bars), list[Result]()
    for name, (bench, runs) in benches.items():
        results = [one for run in runs if (one := finished(bench, run)) is not None]
        missing = {run.name for run in runs} - {one.run.name for one in results}
        if missing:
            print(f"left out: {', '.join(sorted(missing))} not finished", file=sys.stderr)
        found += results
        sides = list(dict.fromkeys(one.run.side.name for one in results))
        rows += [row(name, [one for one in results if one.run.side.name == side]) for side in sides]
        for pattern in PATTERNS:
            bars += contest(name, pattern, results)
        bars += joint(name, results)
    if len(bars) == kept:
        raise SystemExit("no contest is whole; run phases quantize and score first")
    write_record(
        path,
        question=QUESTION,
        threads=1,
        protocol=protocol(),
        versions=before | versions(found),
        rows=rows,
        bars=bars,
    )


def far(domain: Mapping[str, float]) -> float:
    """How far from the original a run is on one kind of text: KL, or 1 - cosine."""
    return domain["kl_mean"] if "kl_mean" in domain else domain["one_minus_cosine"]


def row(model: str, results: Sequence[Result]) -> dict[str, object]:
    """One line of the table: of both domains the worse; medians over the seeds, the range beside them."""
    domains = [list(one.domains.values()) for one in results]
    facts = {k: v for k, v in head(results).items() if k not in ("bits", "bits_per_weight")}
    measure = "kl" if "kl_mean" in domains[0][0] else "one_minus_cosine"
    found = {
        "model": model,
        **facts,
        "zeros": results[0].figures["zeros"] / results[0].figures["weights"],
        measure: spread(max(far(d) for d in pair) for pair in domains),
    }
    if measure == "kl":
        found["perplexity_ratio"] = spread(
            max(d["perplexity"] / d["perplexity_original"] for d in pair) for pair in domains
        )
    return found


def contest(model: str, pattern: str, results: Sequence[Result]) -> list[Bar]:
    """Ours over the better of the peers, the worst of seeds and kinds of text; its interval; CPU seconds."""
    by = {(one.run.side.name, one.run.seed): one for one in results}
    ratios, highs, costs = [], [], []
    for seed in sorted({one.run.seed for one in results}):
        mine = by.get((f"{OURS}-{stem(pattern)}", seed))
        others = [by.get((f"{method}-{stem(pattern)}", seed)) for method in PEERS]
        if mine is None or None in others:
            continue
        for domain in mine.domains:
            best = min(others, key=lambda one: far(one.domains[domain]))
            ratios.append(far(mine.domains[domain]) / far(best.domains[domain]))
            if (high := highest(mine.domains[domain], best.domains[domain])) is not None:
                highs.append(high)
            costs.append(mine.figures["cpu_s"] / best.figures["cpu_s"])
    if not ratios:
        return []
    seeds = len({one.run.seed for one in results})
    where = f"{model}, {pattern}, worst of {seeds} seed{'s' * (seeds > 1)} and two kinds of text"
    what = "KL" if model.startswith("smol") else "1 - cosine"
    interval = f"{where}: upper end of its paired 95 % interval"
    return [
        Bar(f"{where}: {what} against the better of SparseGPT and Wanda", max(ratios), "ratio", "lower", 0.9),
        *([Bar(interval, max(highs), "ratio", "lower", 1.0)] if highs else []),
        Bar(f"{where}: CPU seconds against that peer", max(costs), "ratio", "lower", 0.5),
    ]


def highest(mine: Mapping[str, object], other: Mapping[str, object]) -> float | None:
    """The upper end of the 95 % interval of a ratio of means over the same windows, or sentences.

    They are drawn with replacement; where no distance of each was kept, there is no interval.
    """
    key = next((key for key in PARTS if key in mine and key in other), None)
    if key is None:
        return None
    pair = np.array([mine[key], other[key]], dtype=np.float64)
    draws = np.random.default_rng(0).integers(pair.shape[1], size=(DRAWS, pair.shape[1]))
    means = pair[:, draws].mean(axis=2)
    return float(np.quantile(means[0] / means[1], 0.975))


def joint(model: str, results: Sequence[Result]) -> list[Bar]:
    """Dense codes of 3 bits over pruned ones of 4, which take as many bytes: below 1 dense is better."""
    by = {(one.run.side.name, one.run.seed): one for one in results}
    ratios = [
        max(
            far(by[DENSE, seed].domains[d]) / far(by[JOINT, seed].domains[d]) for d in by[JOINT, seed].domains
        )
        for seed in sorted({one.run.seed for one in results})
        if (DENSE, seed) in by and (JOINT, seed) in by
    ]
    if not ratios:
        return []
    name = f"{model}: KL of dense 3 bits (3.30 a weight) over half pruned 4 bits (3.31 a weight)"
    return [Bar(name, max(ratios), "ratio", "lower", 1.0)]


def protocol() -> list[str]:
    """What a reader has to know to believe the figures."""
    return [
        "half of the weights of every linear of every block becomes zero, embedding and head are left alone; "
        "SmolLM2-135M-Instruct relative to the dequantized release, mpnet-base as published",
        "calibration: a seed picks 16 windows of 512 tokens (mpnet-base: 64 of 256), half fiction, half "
        "speeches; the same token arrays for every side",
        "evaluation: 24 windows of 512 tokens of each kind (mpnet-base: 512 sentences of each); no document "
        "is in both; one evaluator for every side",
        "CPU seconds: user and system time of the pruning call in its process, loading left out, compilation "
        "by numba included (empty cache)",
        "oats: a sparse matrix and one of low rank, which have half as many numbers together as the weights; "
        "their sum has few zeros",
        "peers: llm-compressor at its defaults (SparseGPT: damping 0.01, blocks of 128 columns), bfloat16",
        "rows: median, least and greatest over seeds; of the two kinds of text the worse; `load_1min` tells "
        "how busy the machine was",
    ]
