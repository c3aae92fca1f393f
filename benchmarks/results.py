"""Finished runs, and the two ways in which they are summed up."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from contest import OURS, Bench, Run

Figure = Callable[["Result"], float]


@dataclass(frozen=True, slots=True)
class Result:
    """One run, quantized and scored."""

    run: Run
    figures: dict[str, float]
    versions: dict[str, str]
    domains: dict[str, dict[str, float]]


def collected(bench: Bench, runs: Sequence[Run]) -> list[Result]:
    """The results of all contests (same bits, tokens, seed) in which nobody is missing.

    What is left out is said on stderr; with no contest whole there is nothing to record.
    """
    contests: dict[tuple[int, int, int], list[Run]] = {}
    for run in runs:
        contests.setdefault((run.sequences, run.bits, run.seed), []).append(run)
    results: list[Result] = []
    for contest in contests.values():
        found = [one for run in contest if (one := finished(bench, run)) is not None]
        if len(found) == len(contest):
            results += found
            continue
        there = {one.run.name for one in found}
        names = ", ".join(run.name for run in contest if run.name not in there)
        print(f"left out: {names} not finished", file=sys.stderr)
    if not any(one.run.side.name.startswith(OURS) for one in results):
        raise SystemExit("no contest is whole; run phases quantize and score first")
    return results


def finished(bench: Bench, run: Run) -> Result | None:
    """What a run gave, if it is quantized and scored."""
    stored = bench.finished(run)
    return None if stored is None else Result(run, stored, stored["versions"], stored["domains"])


def versions(results: Sequence[Result]) -> dict[str, str]:
    """The packages that each contestant ran with."""
    return {f"{one.run.side.name}: {name}": v for one in results for name, v in one.versions.items()}


def grouped(results: Iterable[Result]) -> list[list[Result]]:
    """Results that differ in nothing but the seed, together; larger calibration first."""
    rows: dict[tuple[int, int, str], list[Result]] = {}
    for one in results:
        rows.setdefault((-one.run.sequences, -one.run.bits, one.run.side.name), []).append(one)
    return [rows[key] for key in sorted(rows)]


def head(results: Sequence[Result]) -> dict[str, object]:
    """What every row of a table says first: who, how, at what cost."""
    first = results[0].run
    return {
        "side": first.side.name,
        "bits": first.bits,
        "sequences": first.sequences,
        "length": first.length,
        "dtype": first.side.dtype,
        "threads": first.side.threads,
        "seeds": [one.run.seed for one in results],
        "bits_per_weight": results[0].figures["bits_per_weight"],
        "cpu_s": spread(one.figures["cpu_s"] for one in results),
        "wall_s": spread(one.figures["wall_s"] for one in results),
        "rss_peak_mb": spread(one.figures["rss_peak"] / 1e6 for one in results),
        "load_1min": spread(one.figures["load_1min"] for one in results),
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest."""
    found = [round(value, 5) for value in values]
    return {"median": round(statistics.median(found), 5), "min": min(found), "max": max(found)}


def cost(key: str) -> Figure:
    """One of the figures of the quantization itself."""
    return lambda one: one.figures[key]


def worst(
    results: Sequence[Result], own: str, figure: Figure, wanted: Callable[[Result], bool]
) -> float | None:
    """The largest ratio of ours to the least of the wanted peers, over the seeds; None if a side is missing.

    What needs no calibration ran once and stands beside every seed.
    """
    ratios = []
    for mine in (one for one in results if one.run.side.name == own):
        same = [one for one in results if one.run.seed == mine.run.seed or not one.run.side.calibrated]
        if peers := [figure(one) for one in same if wanted(one)]:
            ratios.append(figure(mine) / min(peers))
    return max(ratios, default=None)


def worst_ratio(results: Sequence[Result], figures: Sequence[Figure]) -> float:
    """`worst` of ours against all others, over these figures."""
    ratios = (worst(results, OURS, figure, lambda one: one.run.side.name != OURS) for figure in figures)
    return max(ratio for ratio in ratios if ratio is not None)
