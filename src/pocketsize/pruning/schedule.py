"""How many weights are zero at each moment of a training, and which: the rest is the best by a score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.pruning.mask import highest
from pocketsize.pruning.pattern import Pattern

# Whether each matrix has the same share of zeros, all together have it, or each has one by its shape.
MATRIX, MODEL, ERK = "matrix", "model", "erk"
SCOPES = (MATRIX, MODEL, ERK)


def ramp(done: float, begin: float, end: float) -> float:
    """How much of the way from `begin` to `end` is over at `done`, all three shares of a training."""
    return min(1.0, max(0.0, (done - begin) / (end - begin)))


def cubic(part: float, first: float, last: float) -> float:
    """The sparsity once this part of the ramp is over.

        s = last + (first - last) (1 - part)^3

    Gradual pruning (arXiv:1710.01878, section 3): fast where much is redundant, slow towards the end.
    """
    return last + (first - last) * (1 - part) ** 3


def stairs(part: float, first: float, last: float, cycles: int) -> float:
    """The sparsity of cycles of training and pruning, each of which takes the same share of what is left.

    The first cut comes after 1 / `cycles` of the ramp, the last at its end.
    """
    cut = cuts(part, cycles)
    return 1 - (1 - first) * ((1 - last) / (1 - first)) ** (cut / cycles)


def cuts(part: float, cycles: int) -> int:
    """How many cuts were made once this part of the ramp is over."""
    return min(cycles, math.floor(part * cycles + 1e-9))


def within(done: float, begin: float, end: float, cycles: int) -> float:
    """How much is over of the training between two cuts, or after the last: each is one of its own."""
    edges = [0.0, *(begin + (end - begin) * c / cycles for c in range(1, cycles + 1)), 1.0]
    cut = cuts(ramp(done, begin, end), cycles)
    return ramp(done, edges[cut], edges[cut + 1]) if edges[cut + 1] > edges[cut] else 1.0


def zeros_of(shapes: Sequence[tuple[int, int]], sparsity: float, scope: str) -> list[int]:
    """How many weights of each matrix are zero; of all together, as one number, for the scope `model`."""
    sizes = [rows * columns for rows, columns in shapes]
    if scope == MODEL:
        return [round(sum(sizes) * sparsity)]
    if scope == MATRIX:
        return [round(size * sparsity) for size in sizes]
    kept = erdos_renyi(shapes, 1 - sparsity)
    return [size - round(size * share) for size, share in zip(sizes, kept, strict=True)]


def erdos_renyi(shapes: Sequence[tuple[int, int]], density: float) -> list[float]:
    """The share of each matrix that stays, `density` of all together.

        d_l = min(1, c (rows + columns) / (rows columns))

    Small matrices keep more (arXiv:1707.04780; as in RigL, arXiv:1911.11134, section 3).
    """
    sizes = [rows * columns for rows, columns in shapes]
    raw = [(rows + columns) / (rows * columns) for rows, columns in shapes]
    full = [False] * len(shapes)
    while True:
        left = density * sum(sizes) - sum(n for n, whole in zip(sizes, full, strict=True) if whole)
        weight = sum(n * r for n, r, whole in zip(sizes, raw, full, strict=True) if not whole)
        c = left / weight if weight else 0.0
        over = [not whole and c * r > 1 for r, whole in zip(raw, full, strict=True)]
        if not any(over):
            return [1.0 if whole else c * r for r, whole in zip(raw, full, strict=True)]
        full = [whole or more for whole, more in zip(full, over, strict=True)]


def masks(
    scores: Sequence[Float[Tensor, "_ _"]], pattern: Pattern, sparsity: float, scope: str
) -> list[Bool[Tensor, "_ _"]]:
    """Which weights stay where so many are zero: those with the best scores.

    On the way to an n:m pattern those go first that it will not keep, the least of them before others; at
    its own sparsity it is whole.
    """
    if pattern.of:
        keepers = [highest(score, pattern) for score in scores]
        lifted = [s.masked_fill(k, math.inf) for s, k in zip(scores, keepers, strict=True)]
        scores, scope = lifted, MODEL if scope == MODEL else MATRIX
    counts = zeros_of([(len(s), s.shape[1]) for s in scores], sparsity, scope)
    if scope == MODEL:
        return largest(scores, sum(s.numel() for s in scores) - counts[0])
    return [largest([s], s.numel() - zeros)[0] for s, zeros in zip(scores, counts, strict=True)]


def largest(scores: Sequence[Float[Tensor, "..."]], count: int) -> list[Bool[Tensor, "..."]]:
    """The `count` largest of all of them together, exactly; of equal ones the first."""
    if count <= 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    least, missing = _least(scores, count)
    found = []
    for score in scores:
        mask = score > least
        if missing:
            ties = (score.reshape(-1) == least).nonzero()[:missing, 0]
            missing -= len(ties)
            mask = mask.reshape(-1).index_fill_(0, ties, True).view(score.shape)
        found.append(mask)
    return found


# Numbers of a sample that tells about where a threshold is, and how far from there it is looked for.
_SAMPLE, _MARGIN = 1 << 16, 1 << 9


def _least(scores: Sequence[Float[Tensor, "..."]], count: int) -> tuple[float, int]:
    """The least of the `count` largest, and how many equal to it are among them.

    An even sample tells between which two numbers it lies, nearly always; only what is between them is
    sorted.
    """
    flat = [s.detach().reshape(-1) for s in scores]
    total = sum(len(s) for s in flat)
    step = max(1, total // _SAMPLE)
    sample = torch.cat([s[::step] for s in flat]).sort(descending=True).values
    at = round(count / total * len(sample))
    for margin in (_MARGIN, total):
        inner = at - margin, at + margin
        high = float(sample[inner[0]]) if inner[0] >= 0 else math.inf
        low = float(sample[inner[1]]) if inner[1] < len(sample) else -math.inf
        above = sum(int((s > high).sum()) for s in flat)
        between = torch.cat([s[(s <= high) & (s >= low)] for s in flat])
        if above < count <= above + len(between):
            break
    least = float(between.sort(descending=True).values[count - above - 1])
    over = above + int((between > least).sum())
    return least, count - over
