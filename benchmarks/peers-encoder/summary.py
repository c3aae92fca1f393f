"""From finished runs to `record.json`: one row per encoder, contestant and width, and the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bars import Bar, not_run_again, write_record
from contest import GROUP, OURS, Bench, Run
from contestants import BALANCED
from results import Figure, Result, collected, cost, grouped, head, spread, versions, worst

QUESTION = (
    "Sentence encoders with true float32 weights at 4, 3 and 2 bits: how much of their embeddings is kept, "
    "and what does it cost, beside GPTQ, AWQ with scale estimation and HQQ of other tools?"
)
LEARNED = BALANCED.name
OWN = (OURS, LEARNED)


def record(benches: Mapping[str, Bench], runs: Sequence[Run], path: Path) -> None:
    """Write the record of all contests that are finished and scored.

    An encoder or a width that was not run stays as it was recorded, and its rows name the commit of then.
    """
    rows, kept, before = not_run_again(path, benches, {run.bits for run in runs})
    results = {name: collected(bench, runs) for name, bench in benches.items()}
    everything = [one for found in results.values() for one in found]
    write_record(
        path,
        question=QUESTION,
        threads=max(run.side.threads for run in runs),
        protocol=protocol(everything),
        versions=before | versions(everything),
        rows=[*rows, *(row(name, group) for name, found in results.items() for group in grouped(found))],
        bars=[*kept, *(bar for name, found in results.items() for bar in bars(name, found))],
    )


def row(model: str, results: Sequence[Result]) -> dict[str, object]:
    """One line of the table: of both domains the worse; medians over the seeds, the range beside them."""
    domains = [list(one.domains.values()) for one in results]
    return {
        "model": model,
        **head(results),
        "one_minus_cosine": spread(max(d["one_minus_cosine"] for d in pair) for pair in domains),
        "spearman": spread(min(d["spearman"] for d in pair) for pair in domains),
        "domains": {name: by_domain(results, name) for name in results[0].domains},
    }


def by_domain(results: Sequence[Result], name: str) -> dict[str, dict[str, float]]:
    """The figures for each kind of text."""
    return {
        key: spread(one.domains[name][key] for one in results) for key in ("one_minus_cosine", "spearman")
    }


def bars(model: str, results: Sequence[Result]) -> list[Bar]:
    """Ours over the best of the others, for each width; plain rounding is one of them."""
    found = []
    for bits in sorted({one.run.bits for one in results}, reverse=True):
        same = [one for one in results if one.run.bits == bits]
        seeds = len({one.run.seed for one in same if one.run.side.calibrated})
        where = f"{model}, {bits} bit, worst of {seeds} seed{'s' * (seeds > 1)}"
        for what, value, target in _ratios(same):
            found.append(Bar(f"{where}: {what}", value, "ratio", "lower", target))
    return found


def _ratios(same: Sequence[Result]) -> list[tuple[str, float, float]]:
    """What is compared at one width: the words, the ratio, and what it is to be at most."""
    ratios = [
        ("1 - cosine of balanced against the best other", _lost(same, LEARNED, _distance), 0.8),
        ("1 - Spearman of balanced against the best other", _lost(same, LEARNED, _disorder), 0.8),
        ("1 - cosine of fast against the best other", _lost(same, OURS, _distance), 1.0),
        (
            "CPU seconds of fast against the fastest other that reads data",
            worst(same, OURS, cost("cpu_s"), _reads),
            0.5,
        ),
        (
            "peak memory of balanced against the leanest other that reads data",
            worst(same, LEARNED, cost("rss_peak"), _reads),
            1.0,
        ),
    ]
    return [(what, value, target) for what, value, target in ratios if value is not None]


def _lost(same: Sequence[Result], own: str, figure: Figure) -> float | None:
    return worst(same, own, figure, lambda one: one.run.side.name not in OWN)


def _reads(one: Result) -> bool:
    return one.run.side.name not in OWN and one.run.side.calibrated


def _distance(one: Result) -> float:
    return max(d["one_minus_cosine"] for d in one.domains.values())


def _disorder(one: Result) -> float:
    return max(1 - d["spearman"] for d in one.domains.values())


def protocol(results: Sequence[Result]) -> list[str]:
    """What a reader has to know to believe the figures."""
    run = next(one.run for one in results if one.run.side.calibrated)
    counts = ", ".join(f"{name} {int(d['sentences'])} sentences" for name, d in results[0].domains.items())
    return [
        f"all-mpnet-base-v2 and all-MiniLM-L6-v2; all block linears, group {GROUP}, asymmetric; whole "
        "zeros but for HQQ, whose zeros and scales take 16 bits each; embeddings kept",
        f"calibration: a seed picks {run.sequences} windows of {run.length} tokens, half fiction, half "
        "speeches; the same token arrays for every side that reads any",
        f"evaluation: {counts}, none from a document that calibrates; mean-pooled embeddings, all float32",
        "1 - cosine: mean over sentences; Spearman: of the similarities of all pairs of sentences",
        "CPU seconds: user and system time of the quantization call in its process, loading left out, "
        "compilation by numba included (empty cache)",
        "bars: ours over the best other with the same seed; of all seeds and domains the worst",
    ]
