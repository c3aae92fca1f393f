"""Bootstrap intervals over whole windows, and rank correlation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int, Num
from numpy import ndarray

RESAMPLES = 1000
CONFIDENCE = 0.95

Interval = tuple[float, float]


def bootstrap_mean(values: Float[ndarray, "n"], seed: int) -> Interval | None:
    """The 95 % percentile bootstrap interval of the mean; None for fewer than two values."""
    return bootstrap_ratio(values, np.ones(len(values)), seed)


def bootstrap_ratio(
    numerators: Float[ndarray, "n"],
    denominators: Float[ndarray, "n"],
    seed: int,
) -> Interval | None:
    """The interval of sum(numerators) / sum(denominators) when the pairs are drawn again together.

    With sums and counts per window this is a mean over tokens that treats the window as the unit:
    tokens of one window depend on each other, and an interval over tokens would be too narrow. None also
    where so few denominators are not 0 that a draw leaves nothing to divide by.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)

    def ratio(draw: Int[ndarray, "n"]) -> float:
        below = bottom[draw].sum()
        return top[draw].sum() / below if below else np.nan

    return bootstrap(len(top), ratio, seed)


def bootstrap(n: int, statistic: Callable[[Int[ndarray, "n"]], float], seed: int) -> Interval | None:
    """The 95 % percentile interval of `statistic` over draws with replacement of n units.

    `statistic` gets the drawn indices. The interval is widened to hold the statistic of the units
    themselves, which it can miss where the statistic is skewed and n small. Fewer than two: None, and so
    where a draw has no statistic (NaN).
    """
    if n < 2:
        return None
    own = statistic(np.arange(n))
    drawn = [statistic(draw) for draw in _draws(n, seed)]
    if np.isnan(drawn).any():
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return min(float(low), float(own)), max(float(high), float(own))


def ranks(values: Num[ndarray, "n"]) -> Float[ndarray, "n"]:
    """Ranks from 1; equal values share the mean of their ranks. Whole numbers are counted, not sorted."""
    if values.dtype.kind == "f":
        values = dense(values)
    counts = np.bincount(values)
    return (np.cumsum(counts) - (counts - 1) / 2)[values]


def dense(values: Float[ndarray, "*n"]) -> Int[ndarray, "*n"]:
    """Whole numbers in the order of the values, equal ones for equal values."""
    return np.unique(values, return_inverse=True)[1].reshape(values.shape)


def spearman(x: Num[ndarray, "n"], y: Num[ndarray, "n"]) -> float:
    """The correlation of the ranks of x and y, in float64; NaN where one of them is constant."""
    rx, ry = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = np.sqrt((rx @ rx) * (ry @ ry))
    return float(rx @ ry / scale) if scale > 0 else float("nan")


def _draws(n: int, seed: int) -> Iterator[Int[ndarray, "n"]]:
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield generator.integers(0, n, n)
