"""From finished runs to `record.json`: one row per contestant and width, and the bars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bars import Bar, bar_of, write_record
from contest import GROUP, OURS, Bench, Run
from language import LENGTH, kl_on, row
from results import Result, collected, cost, grouped, versions, worst
from sides import FIRST, LEARNED, TUNED

QUESTION = (
    "At the same bits per weight and on the same tokens: how close to the original do models of Pocketsize "
    "stay, and what do they cost, beside GPTQ, SignRound, AWQ with scale estimation and HQQ of other tools?"
)
OWN = (OURS, LEARNED, TUNED, "rounding")


def record(bench: Bench, runs: Sequence[Run], path: Path) -> None:
    """Write the record of all contests that are finished and scored.

    What reads as much text at one width is a contest of its own: one that was not run with these sources
    stays as it was recorded, and its rows name the commit of then.
    """
    results = collected(bench, runs)
    new = {(one.run.bits, one.run.sequences) for one in results}
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "bars": [], "commit": ""}
    stay = [one for one in before["rows"] if (one["bits"], one["sequences"]) not in new]
    found = bars(results)
    said = {_asked(one.name) for one in found}
    kept = [bar_of(one) for one in before["bars"] if _asked(one["name"]) not in said]
    write_record(
        path,
        question=QUESTION,
        threads=max(run.side.threads for run in runs),
        protocol=protocol(results),
        versions=before.get("versions", {}) | versions(results),
        rows=[{"commit": before["commit"][:7]} | one for one in stay]
        + [row(one) for one in grouped(results)],
        bars=[*kept, *found],
    )


def _asked(name: str) -> tuple[str, str]:
    """The width and the question of a bar, whose name also says how many seeds it covers."""
    return name.split()[0], name.split(": ", 1)[1]


def bars(results: Sequence[Result]) -> list[Bar]:
    """Ours over the best peer at each width, the worst of all seeds (and, for KL, of both kinds of text)."""
    return [
        bar
        for bits in sorted({one.run.bits for one in results}, reverse=True)
        for bar in bars_at(bits, [one for one in results if one.run.bits == bits])
    ]


def bars_at(bits: int, runs: Sequence[Result]) -> list[Bar]:
    """The bars at one width."""
    seeds = len({one.run.seed for one in runs if one.run.side.calibrated})
    where = f"{bits} bit, worst of {seeds} seed{'s' * (seeds > 1)}"
    kl = {own: _worst_kl(runs, own) for own in (OURS, LEARNED)}
    found = {
        "KL of balanced against the best peer": (kl[LEARNED], 0.8),
        "KL of fast against the best peer": (kl[OURS], 1.0),
        "CPU seconds of fast against the fastest peer that reads data": (
            worst(runs, OURS, cost("cpu_s"), reads_data),
            0.5,
        ),
        "CPU seconds of balanced against AutoRound with as many steps": (
            worst(runs, LEARNED, cost("cpu_s"), lambda one: one.run.side.name == "autoround"),
            1.0,
        ),
        "peak memory of balanced against the leanest peer that reads data": (
            worst(runs, LEARNED, cost("rss_peak"), reads_data),
            1.0,
        ),
    }
    tuned = [d for one in runs if one.run.side.name == TUNED for d in one.domains.values()]
    if bits == 2 and tuned:
        ratio = max(d["perplexity"] / d["perplexity_original"] for d in tuned)
        found["perplexity of tuned over the original's"] = (ratio, 2.0)
    return [
        Bar(f"{where}: {name}", value, "ratio", "lower", bar)
        for name, (value, bar) in found.items()
        if value is not None
    ]


def _worst_kl(runs: Sequence[Result], own: str) -> float | None:
    """On the kind of text where it is the larger."""
    ratios = [worst(runs, own, kl_on(name), peer) for name in runs[0].domains]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def peer(one: Result) -> bool:
    """Whether a run is another tool's."""
    return one.run.side.name not in OWN


def reads_data(one: Result) -> bool:
    """Whether a run is another tool's that looks at calibration text."""
    return peer(one) and one.run.side.calibrated


def protocol(results: Sequence[Result]) -> list[str]:
    """What a reader has to know to believe the figures."""
    tokens = ", ".join(f"{name} {int(d['tokens'])} tokens" for name, d in results[0].domains.items())
    return [
        f"SmolLM2-135M-Instruct, relative to the dequantized release; all block linears, group {GROUP}, "
        "asymmetric; whole zeros but for HQQ, whose zeros and scales take 16 bits each; embedding and head "
        "left alone by every side",
        f"calibration: a seed picks 16 windows of {LENGTH} tokens, half fiction, half speeches; the same "
        "token arrays for every side that reads any; pocketsize-tuned reads 128 windows of the same seed",
        f"evaluation: {tokens}; no document is in both; blocks bfloat16 autocast, head and softmax float32",
        "CPU seconds: user and system time of the quantization call in its process, loading left out, "
        "compilation by numba included (empty cache), GPTQModel's C++ extension compiled before",
        "peak memory: VmHWM of the whole process when the quantization call ends",
        "seeds after the first: of the peers that read data AutoRound alone, the best of them; "
        f"{', '.join(FIRST)} have the first",
        "sides that read as much at one width are a contest: rows that name a commit were measured with it",
        "rows: median, least and greatest over seeds; of the two domains the worse",
    ]
