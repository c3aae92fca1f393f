"""Schedules and masks of pruning while training, one weight at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cubic(done: float, begin: float, end: float, first: float, last: float) -> float:
    """Zhu and Gupta's polynomial, where it is, and what is before and after it."""
    if done <= begin:
        return first
    if done >= end:
        return last
    return last + (first - last) * (1 - (done - begin) / (end - begin)) ** 3


def stairs(done: float, begin: float, end: float, first: float, last: float, cycles: int) -> float:
    """The sparsity after each of equal cuts, made one by one."""
    left, factor = 1 - first, ((1 - last) / (1 - first)) ** (1 / cycles)
    for c in range(1, cycles + 1):
        if done >= begin + (end - begin) * c / cycles - 1e-12:
            left *= factor
    return 1 - left


def largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Sorted as a whole; of equal ones the first."""
    flat = [(-float(v), i, j) for i, s in enumerate(scores) for j, v in enumerate(s.flatten())]
    found = [torch.zeros(s.numel(), dtype=torch.bool) for s in scores]
    for _, i, j in sorted(flat)[: max(0, count)]:
        found[i][j] = True
    return [mask.view(s.shape) for mask, s in zip(found, scores, strict=True)]


def neighbours(score: Tensor, kept: int, of: int) -> Tensor:
    """Group by group."""
    found = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for a in range(0, score.shape[1], of):
            order = sorted(range(a, a + of), key=lambda j: (-float(score[row, j]), j))
            for j in order[:kept]:
                found[row, j] = True
    return found


def towards(score: Tensor, kept: int, of: int, zeros: int) -> Tensor:
    """So many zeros of those that an n:m pattern has in the end, the least first; of equal ones the last."""
    goes = (~neighbours(score, kept, of)).flatten().nonzero()[:, 0].tolist()
    found = torch.ones(score.numel(), dtype=torch.bool)
    for j in sorted(goes, key=lambda j: (float(score.flatten()[j]), -j))[:zeros]:
        found[j] = False
    return found.view(score.shape)


def erdos_renyi(shapes: list[tuple[int, int]], density: float) -> list[float]:
    """The factor that gives all together their density, by halving an interval."""
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        found = [min(1.0, c * (r + k) / (r * k)) for r, k in shapes]
        total = sum(d * r * k for d, (r, k) in zip(found, shapes, strict=True))
        low, high = (c, high) if total < density * sum(r * k for r, k in shapes) else (low, c)
    return found


def drop_and_grow(W: Tensor, gradient: Tensor, mask: Tensor, count: int) -> Tensor:
    """One weight at a time goes, then one at a time comes."""
    found = mask.clone().flatten()
    w, g = W.flatten().abs(), gradient.flatten().abs()
    for _ in range(count):
        kept = found.nonzero()[:, 0].tolist()
        found[min(kept, key=lambda j: (float(w[j]), -j))] = False
    held = found.clone()
    for _ in range(count):
        free = (~found & ~held).nonzero()[:, 0].tolist()
        found[max(free, key=lambda j: (float(g[j]), -j))] = True
    return found.view(mask.shape)


def swapped(W: Tensor, gradient: Tensor, mask: Tensor, count: int, of: int) -> Tensor:
    """In the groups whose smallest weight is smallest, it goes for the zero with the largest gradient."""
    found, w, g = mask.clone().view(-1, of), W.abs().view(-1, of), gradient.abs().view(-1, of)
    least = []
    for i, group in enumerate(found.tolist()):
        kept = [j for j in range(of) if group[j]]
        least.append((min(float(w[i, j]) for j in kept), i, min(kept, key=lambda j: (float(w[i, j]), j))))
    for _, i, goes in sorted(least)[:count]:
        free = [j for j in range(of) if not found[i, j]]
        comes = max(free, key=lambda j: (float(g[i, j]), -j))
        found[i, goes], found[i, comes] = False, True
    return found.view(mask.shape)


def moved_share(part: float, first: float) -> float:
    """The half cosine, by its angle."""
    return first * math.cos(math.pi * part / 2) ** 2
