"""What a classifier keeps of its teacher's score, averaged over tasks; shared by benchmarks with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pocketsize.measurement.classes import above_chance
from pocketsize.measurement.stats import RESAMPLES

# The runs of a task by name, and what a run gave: among other things `labels`, and what was `said`.
Runs = Mapping[str, Mapping[str, Any]]


def score(run: Mapping[str, Any]) -> float:
    """Accuracy above chance."""
    return above_chance(np.array(run["labels"]), np.array(run["said"]))


def kept_of(tasks: Mapping[str, Runs], name: str) -> tuple[float, float, float]:
    """The average score over that of the teacher, with its interval: the same texts are drawn for both."""
    for task, runs in tasks.items():
        if runs[name]["labels"] != runs["teacher"]["labels"]:
            raise SystemExit(f"{task}: {name} was judged by other texts than its teacher; judge both anew")

    def ratio(take: Callable[[Runs, str], float]) -> float:
        both = [np.mean([take(runs, who) for runs in tasks.values()]) for who in (name, "teacher")]
        return float(both[0] / both[1])

    draws = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        rows = {
            id(runs): draws.integers(0, n, n)
            for runs in tasks.values()
            if (n := len(runs["teacher"]["labels"]))
        }

        def again(runs: Runs, who: str, rows: dict[int, Any] = rows) -> float:
            picked = rows[id(runs)]
            return above_chance(np.array(runs[who]["labels"])[picked], np.array(runs[who]["said"])[picked])

        drawn.append(ratio(again))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return ratio(lambda runs, who: score(runs[who])), float(low), float(high)
