"""Ranks and their correlation by counting, pair by pair."""

import math


def ranks_slow(values: list[float]) -> list[float]:
    """1 + how many are smaller + half of the others that are equal."""
    return [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def spearman_slow(x: list[float], y: list[float]) -> float:
    rx, ry = ranks_slow(x), ranks_slow(y)
    mx, my = sum(rx) / len(rx), sum(ry) / len(ry)
    cov = sum((a - mx) * (b - my) for a, b in zip(rx, ry, strict=True))
    return cov / math.sqrt(sum((a - mx) ** 2 for a in rx) * sum((b - my) ** 2 for b in ry))
