"""Losses of distillation as their formulas stand, in float64, for autograd to take the slope of."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float, mix: float) -> Tensor:
    """The divergence at each position, times the temperature's square."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    found = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_kl": lambda: kl(p, mix * p + (1 - mix) * q),
        "skew_reverse_kl": lambda: kl(q, mix * q + (1 - mix) * p),
        "js": lambda: mix * kl(p, mix * p + (1 - mix) * q) + (1 - mix) * kl(q, mix * p + (1 - mix) * q),
    }[kind]()
    return found * temperature**2


def top_k(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """KL of two distributions in which all tokens but the teacher's k best are one."""
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    found = []
    for a, b in zip(p, q, strict=True):
        best = a.argsort(descending=True)[:k]
        rest = torch.ones_like(a, dtype=torch.bool)
        rest[best] = False
        coarse = [torch.cat([x[best], x[rest].sum()[None]]) for x in (a, b)]
        kept = coarse[0] > 0
        found.append((coarse[0][kept] * (coarse[0][kept].log() - coarse[1][kept].log())).sum())
    return torch.stack(found)


def relation(a: Tensor, b: Tensor, c: Tensor, d: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of softmax(A B^T / sqrt d), token by token, head by head, over real tokens."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for n in range(a.shape[0]):
        real = [i for i in range(mask.shape[1]) if mask[n, i]]
        for h in range(a.shape[1]):
            for i in real:
                rows = []
                for left, right in ((c, d), (a, b)):
                    x, y = left[n, h].double(), right[n, h].double()
                    rows.append(
                        torch.softmax(torch.stack([x[i] @ y[j] for j in real]) / x.shape[-1] ** 0.5, 0)
                    )
                total = total + (rows[0] * (rows[0].log() - rows[1].log())).sum()
                count += 1
    return total / count


def adamw(weights: Tensor, gradients: list[Tensor], rates: list[float], decay: float) -> Tensor:
    """AdamW (arXiv:1711.05101, algorithm 2) step by step."""
    w, m, v = weights.double().clone(), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = g.double()
        w = w - rate * decay * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return w
