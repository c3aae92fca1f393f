"""From finished runs to `record.json`: one row per contestant, width and calibration size, and the bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bars import Bar, write_record
from contest import GROUP, OURS, Bench, Run
from language import LENGTH, kl_on, row
from results import Result, collected, cost, grouped, versions, worst_ratio

QUESTION = (
    "At the same bits per weight and on the same tokens: how close to the original do GPTQ models of "
    "Pocketsize, llm-compressor and GPTQModel stay, and what do they cost in CPU seconds and memory?"
)
COSTS = {
    "cpu_s": ("CPU seconds against the faster peer", 0.35),
    "rss_peak": ("peak memory against the leaner peer", 1.0),
    "bits_per_weight": ("bits per weight against the smaller peer", 1.0),
}


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


def bars(results: Sequence[Result]) -> list[Bar]:
    """Ours over the better peer, for each calibration size and width."""
    cells = {(one.run.sequences, one.run.bits) for one in results if one.run.side.name == OURS}
    found = []
    for sequences, bits in sorted(cells, reverse=True):
        runs = [one for one in results if (one.run.sequences, one.run.bits) == (sequences, bits)]
        seeds = len({one.run.seed for one in runs})
        where = f"{bits} bit, {sequences} x {LENGTH}, worst of {seeds} seed{'s' * (seeds > 1)}"
        kl = worst_ratio(runs, [kl_on(name) for name in runs[0].domains])
        found.append(Bar(f"{where}: KL to the original against the better peer", kl, "ratio", "lower", 0.75))
        for key, (title, target) in COSTS.items():
            found.append(Bar(f"{where}: {title}", worst_ratio(runs, [cost(key)]), "ratio", "lower", target))
    return found


def protocol(results: Sequence[Result]) -> list[str]:
    """What a reader has to know to believe the figures."""
    tokens = ", ".join(f"{name} {int(d['tokens'])} tokens" for name, d in results[0].domains.items())
    return [
        f"SmolLM2-135M-Instruct, relative to the dequantized release; all block linears, group {GROUP}, "
        "asymmetric, integer zeros; embedding and head left alone by every side",
        "bits per weight count codes, scales and zeros as each side stores them",
        f"calibration: a seed picks windows of {LENGTH} tokens, half fiction, half speeches; the same "
        "token arrays for every side",
        f"evaluation: {tokens}; no document is in both; blocks bfloat16 autocast, head and softmax float32",
        "CPU seconds: user and system time of the quantization call in its process, loading left out, "
        "compilation by numba included (empty cache), GPTQModel's C++ extension compiled before",
        "peak memory: VmHWM of the whole process when the quantization call ends",
        "bars: ours over the better peer with the same seed; of all seeds (and domains) the worst ratio",
        "rows: median, least and greatest over seeds; of the two domains the worse",
    ]
