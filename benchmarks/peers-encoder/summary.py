"""From finished runs to `record.json`: one row per contestant and width, and the bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bars import Bar, write_record
from contest import GROUP, Bench, Run
from results import Figure, Result, collected, grouped, head, spread, versions, worst_ratio

QUESTION = (
    "A sentence encoder with true float32 weights at 4 and 3 bits: how much of its embeddings is kept, "
    "against plain rounding and against llm-compressor's GPTQ?"
)
FIGURES: dict[str, Figure] = {
    "1 - cosine": lambda one: max(d["one_minus_cosine"] for d in one.domains.values()),
    "1 - Spearman": lambda one: max(1 - d["spearman"] for d in one.domains.values()),
}
TARGET = 0.75


def record(bench: Bench, runs: Sequence[Run], path: Path) -> None:
    """Write the record of all contests that are finished and scored."""
    results = collected(bench, runs)
    write_record(
        path,
        question=QUESTION,
        threads=max(run.side.threads for run in runs),
        protocol=protocol(results),
        versions=versions(results),
        rows=[row(group) for group in grouped(results)],
        bars=bars(results),
    )


def row(results: Sequence[Result]) -> dict[str, object]:
    """One line of the table: of both domains the worse; medians over the seeds, the range beside them."""
    domains = [list(one.domains.values()) for one in results]
    return {
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


def bars(results: Sequence[Result]) -> list[Bar]:
    """Ours over the better of the others, for each width."""
    found = []
    for bits in sorted({one.run.bits for one in results}, reverse=True):
        same = [one for one in results if one.run.bits == bits]
        seeds = len({one.run.seed for one in same if one.run.side.calibrated})
        where = f"encoder, {bits} bit, worst of {seeds} seed{'s' * (seeds > 1)}"
        for name, figure in FIGURES.items():
            ratio = worst_ratio(same, [figure])
            found.append(Bar(f"{where}: {name} against the better other", ratio, "ratio", "lower", TARGET))
    return found


def protocol(results: Sequence[Result]) -> list[str]:
    """What a reader has to know to believe the figures."""
    run = next(one.run for one in results if one.run.side.calibrated)
    counts = ", ".join(f"{name} {int(d['sentences'])} sentences" for name, d in results[0].domains.items())
    return [
        f"all-mpnet-base-v2; all block linears, group {GROUP}, asymmetric, integer zeros; embeddings kept",
        f"calibration: a seed picks {run.sequences} windows of {run.length} tokens, half fiction, half "
        "speeches; the same token arrays for every side",
        f"evaluation: {counts}, none from a document that calibrates; mean-pooled embeddings, all float32",
        "1 - cosine: mean over sentences; Spearman: of the similarities of all pairs of sentences",
        "bars: ours over the better other with the same seed; of all seeds and domains the worst",
    ]
