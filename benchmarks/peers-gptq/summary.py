"""From finished runs to `record.json`: one row per contestant, width and calibration size, and the bars."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bars import Bar, write_record
from contest import GROUP, OURS, Bench, Run
from sides import LENGTH

QUESTION = (
    "At the same bits per weight and on the same tokens: how close to the original do GPTQ models of "
    "Pocketsize, llm-compressor and GPTQModel stay, and what do they cost in CPU seconds and memory?"
)
TARGETS = {"kl_mean": 0.75, "cpu_s": 0.35, "rss_peak": 1.0, "bits_per_weight": 1.0}
TITLES = {
    "kl_mean": "KL to the original against the better peer",
    "cpu_s": "CPU seconds against the faster peer",
    "rss_peak": "peak memory against the leaner peer",
    "bits_per_weight": "bits per weight against the smaller peer",
}


@dataclass(frozen=True, slots=True)
class Result:
    """One run, quantized and scored."""

    run: Run
    figures: dict[str, float]
    domains: dict[str, dict[str, float]]

    @property
    def worse_kl(self) -> float:
        """KL on the domain where it is larger."""
        return max(domain["kl_mean"] for domain in self.domains.values())


def record(bench: Bench, runs: Sequence[Run], path: Path) -> None:
    """Write the record; every run must be finished and scored."""
    results, versions = [], {}
    for run in runs:
        stored, scored = bench.result(run), bench.results / f"{run.name}.score.json"
        if stored is None or not scored.exists():
            raise SystemExit(f"{run.name} is not finished; run phases quantize and score first")
        results.append(Result(run, stored, json.loads(scored.read_text())["domains"]))
        versions |= {f"{run.side.name}: {name}": version for name, version in stored["versions"].items()}
    threads = max(run.side.threads for run in runs)
    write_record(
        path,
        question=QUESTION,
        threads=threads,
        protocol=protocol(results),
        versions=versions,
        rows=[row(group) for group in grouped(results)],
        bars=bars(results),
    )


def grouped(results: Iterable[Result]) -> list[list[Result]]:
    """Results that differ in nothing but the seed, together; larger calibration first."""
    rows: dict[tuple[int, int, str], list[Result]] = {}
    for one in results:
        rows.setdefault((-one.run.sequences, -one.run.bits, one.run.side.name), []).append(one)
    return [rows[key] for key in sorted(rows)]


def row(results: Sequence[Result]) -> dict[str, object]:
    """One line of the table: medians over the seeds, the range beside them, each run's figures below."""
    first = results[0]
    return {
        "side": first.run.side.name,
        "bits": first.run.bits,
        "sequences": first.run.sequences,
        "dtype": first.run.side.dtype,
        "threads": first.run.side.threads,
        "seeds": [one.run.seed for one in results],
        "bits_per_weight": first.figures["bits_per_weight"],
        "kl": spread(one.worse_kl for one in results),
        "kl_p99": spread(max(d["kl_p99"] for d in one.domains.values()) for one in results),
        "top1": spread(min(d["top1"] for d in one.domains.values()) for one in results),
        "perplexity_ratio": spread(
            max(d["perplexity"] / d["perplexity_original"] for d in one.domains.values()) for one in results
        ),
        "cpu_s": spread(one.figures["cpu_s"] for one in results),
        "wall_s": spread(one.figures["wall_s"] for one in results),
        "rss_peak_mb": spread(one.figures["rss_peak"] / 1e6 for one in results),
        "load_1min": spread(one.figures["load_1min"] for one in results),
        "domains": {
            name: {
                key: spread(one.domains[name][key] for one in results) for key in ("kl_mean", "perplexity")
            }
            for name in first.domains
        },
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest."""
    found = [round(value, 4) for value in values]
    return {"median": round(statistics.median(found), 4), "min": min(found), "max": max(found)}


def bars(results: Sequence[Result]) -> list[Bar]:
    """Ours over the better peer, for each calibration size and width; of all seeds the worst ratio."""
    ours = [one for one in results if one.run.side.name == OURS]
    cells = sorted({(-one.run.sequences, -one.run.bits) for one in ours})
    found = []
    for sequences, bits in cells:
        here = [
            o
            for o in results
            if o.run.side.calibrated and (o.run.sequences, o.run.bits) == (-sequences, -bits)
        ]
        where = f"{-bits} bit, {-sequences} x {LENGTH}"
        for key, target in TARGETS.items():
            found.append(Bar(f"{where}: {TITLES[key]}", worst(here, key), "ratio", "lower", target))
    return found


def worst(results: Sequence[Result], key: str) -> float:
    """The largest ratio of ours to the least of the peers, over seeds (and domains, where there are any)."""
    views: list[Callable[[Result], float]] = [lambda one: one.figures[key]]
    if key == "kl_mean":
        views = [lambda one, name=name: one.domains[name][key] for name in results[0].domains]
    ratios = []
    for seed in {one.run.seed for one in results}:
        same = [one for one in results if one.run.seed == seed]
        for view in views:
            mine = next(view(one) for one in same if one.run.side.name == OURS)
            ratios.append(mine / min(view(one) for one in same if one.run.side.is_peer))
    return max(ratios)


def protocol(results: Sequence[Result]) -> list[str]:
    """What a reader has to know to believe the figures."""
    domains = results[0].domains
    seeds = len({one.run.seed for one in results if one.run.side.calibrated})
    return [
        f"SmolLM2-135M-Instruct, relative to the dequantized release; all block linears, group {GROUP}, "
        "asymmetric, integer zeros; embedding and head left alone by every side",
        "bits per weight count codes, scales and zeros as each side stores them",
        f"calibration: {seeds} seeds pick windows of {LENGTH} tokens, half fiction, half speeches; the same "
        "token arrays for every side",
        "evaluation: "
        + ", ".join(f"{name} {int(d['tokens'])} tokens" for name, d in domains.items())
        + "; no document is in both; blocks in bfloat16 autocast, head and softmax float32",
        "CPU seconds: user and system time of the quantization call in its process, loading left out, "
        "compilation by numba included (fresh cache), GPTQModel's C++ extension compiled before",
        "peak memory: VmHWM of the whole process when the quantization call ends",
        "bars: ours over the better peer with the same seed; of all seeds (and domains) the worst ratio",
        "rows: median, least and greatest over seeds; of the two domains the worse",
    ]
