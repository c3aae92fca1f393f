"""What a teacher said of the next token, in a few numbers instead of its whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Rows = Float[Tensor, "t vocab"]


@dataclass(frozen=True, slots=True)
class Signal:
    """Some tokens of the teacher's distribution at each position, by number.

    `weight` is what each counts, `log_p` the teacher's log-probability of it. Top-k: the weights are
    probabilities, and `tail` is what all other tokens have together. Sampled: the weights are the shares
    of the draws, they add up to 1, and `tail` is None.
    """

    ids: Int64[Tensor, "t k"]
    weight: Float[Tensor, "t k"]
    log_p: Float[Tensor, "t k"]
    tail: Float[Tensor, "t"] | None = None

    def __post_init__(self) -> None:
        if self.tail is None and not torch.allclose(
            self.weight.sum(-1), torch.ones_like(self.weight[:, 0]), atol=1e-3
        ):
            raise ValueError("a signal without a tail needs weights that add up to 1 at each position")


def top_k(logits: Rows, k: int) -> Signal:
    """The k most likely tokens with their probabilities, and what is left for all others."""
    if not 0 < k <= logits.shape[1]:
        raise ValueError(f"k must be 1 to {logits.shape[1]}, got {k}")
    log_p = torch.log_softmax(logits.float(), dim=-1)
    best, ids = log_p.topk(k, dim=-1)
    weight = best.exp()
    return Signal(ids, weight, best, (1 - weight.sum(-1)).clamp_min(0))


def sampled(logits: Rows, count: int, generator: torch.Generator) -> Signal:
    """`count` draws from the teacher's distribution: an unbiased picture of all of it, where top-k is not.

    arXiv:2503.16870. A token drawn several times stands several times, with a share each.
    """
    if count < 1:
        raise ValueError(f"at least one draw is needed, got {count}")
    log_p = torch.log_softmax(logits.float(), dim=-1)
    ids = torch.multinomial(log_p.exp(), count, replacement=True, generator=generator)
    weight = torch.full(ids.shape, 1 / count, dtype=torch.float32, device=logits.device)
    return Signal(ids, weight, log_p.gather(1, ids))


def signal_divergence(student: Rows, signal: Signal) -> tuple[Float[Tensor, "t"], Rows]:
    """KL(teacher || student) at each position as far as a signal tells of it, and the gradient for logits.

        top-k:    sum_k p (log p - log q)  +  tail (log tail - log(1 - sum_k q))
        sampled:  sum_k w (log p - log q)

    The first treats all other tokens as one. Both are zero where the two agree. `student` (logits) is left
    untouched; float32.
    """
    log_q = torch.log_softmax(student.float(), dim=-1)
    own = log_q.gather(1, signal.ids)
    found = torch.linalg.vecdot(signal.weight, signal.log_p - own)
    slope = log_q.exp_()
    if signal.tail is None:
        return found, slope.scatter_add_(1, signal.ids, -signal.weight)
    rest = (1 - own.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).eps)
    tail = signal.tail
    found = found + torch.where(tail > 0, tail * (tail.clamp_min(_LEAST).log() - rest.log()), 0.0)
    # Of a token outside: q - tail q / rest; of one inside: q - p, whatever the first gave it.
    kept = own.exp() - signal.weight
    slope.mul_((1 - tail / rest)[:, None])
    return found, slope.scatter_(1, signal.ids, kept)


_LEAST = math.ldexp(1.0, -126)
