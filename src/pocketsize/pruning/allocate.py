"""How many weights each matrix loses, where not all lose the same share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Quantiles that stand for the scores of a matrix, and halvings of the range in which the edge lies.
QUANTILES, HALVINGS = 1025, 100
# How often the mean score an outlier has (OWL's M).
OUTLIER = 5.0


def outlier_share(score: Float[Tensor, "out in"]) -> float:
    """The share of scores that are more than five times their mean (OWL, arXiv:2310.05175)."""
    return float((score > OUTLIER * score.mean()).double().mean())


def by_outliers(outliers: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """The sparsity of each of some parts of equal size: the more outliers, the less goes.

    As OWL spreads them: evenly over a range of 2 `spread`, moved so that their mean is `sparsity`.
    """
    least, most = min(outliers), max(outliers)
    if most == least:
        return [sparsity] * len(outliers)
    width = min(2 * spread, 2 * sparsity, 2 * (1 - sparsity))
    kept = [width * (x - least) / (most - least) for x in outliers]
    shares = {str(i): -x for i, x in enumerate(kept)}
    return [*evened(shares, dict.fromkeys(shares, 1), sparsity).values()]


def sketch(score: Float[Tensor, "out in"]) -> Float[Tensor, "quantiles"]:
    """Some scores of a matrix at even distances in their order, least first."""
    order = score.reshape(-1).sort().values
    at = torch.linspace(0, len(order) - 1, min(QUANTILES, len(order)), dtype=torch.float64)
    return order[at.round().long()]


def by_threshold(
    scores: Mapping[str, Float[Tensor, "quantiles"]],
    weights: Mapping[str, int],
    sparsity: float,
    spread: float,
) -> dict[str, float]:
    """The sparsity of each matrix if the lowest scores of all go.

    None is further than `spread` from the mean. `scores` are `sketch`es. The edge is found by halving, so
    that the share of all weights is `sparsity`.
    """
    least, most = max(sparsity - spread, 0.0), min(sparsity + spread, 1.0)

    def shares(edge: float) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, order in scores.items():
            share = float(torch.searchsorted(order, edge, right=True)) / len(order)
            found[name] = min(max(share, least), most)
        return found

    low = min(float(order[0]) for order in scores.values())
    high = max(float(order[-1]) for order in scores.values())
    edge = _where(lambda at: _mean(shares(at), weights) >= sparsity, low, high)
    return evened(shares(edge), weights, sparsity)  # a step of the sketches leaves something


def evened(shares: Mapping[str, float], weights: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """The shares, all moved alike so that their mean is `sparsity`; none becomes 0 or 1.

    Matrices count by their `weights`. The move is found by halving: at an edge a share stays.
    """
    least, most = min(0.01, sparsity), max(0.99, sparsity)

    def moved(by: float) -> dict[str, float]:
        return {name: min(max(share + by, least), most) for name, share in shares.items()}

    low, high = least - max(shares.values()), most - min(shares.values())
    return moved(_where(lambda by: _mean(moved(by), weights) >= sparsity, low, high))


def _mean(shares: Mapping[str, float], weights: Mapping[str, int]) -> float:
    return sum(share * weights[name] for name, share in shares.items()) / sum(weights[n] for n in shares)


def _where(enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least value in a range from which on there is enough, found by halving."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
