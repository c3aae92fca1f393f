"""Losses over a vocabulary, a few tokens at a time: no batch of logits is ever whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

Rows = Float[Tensor, "t vocab"]
# What a loss says of the logits of the tokens a..b: its value at each, and its slope for the logits.
Score = Callable[[Rows, slice], tuple[Float[Tensor, "t"], Rows]]

# Logits of one model that are in memory at a time, at most; where positions enough are left, 28 MiB of them:
# from 32 MiB on glibc asks the system for new pages each time, which was a sixth of all seconds of a chunk.
LOGITS, QUICK, ENOUGH = 2**24, 7 * 2**20, 128


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: x W^T + b, bent by cap tanh(. / cap) where a family does so."""

    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None

    def logits(self, hidden: Float[Tensor, "t width"]) -> Rows:
        """The logits of these positions, without a gradient."""
        with torch.no_grad():
            found = nn.functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)
            return found if self.cap is None else found.div_(self.cap).tanh_().mul_(self.cap)

    @property
    def chunk(self) -> int:
        """Positions whose logits are in memory at a time."""
        vocabulary = self.weight.shape[0]
        return max(1, min(max(ENOUGH, QUICK // vocabulary), LOGITS // vocabulary))


def head_of(module: nn.Module) -> Head:
    """The head of a causal language model."""
    found = cast(nn.Linear, cast(Any, module).get_output_embeddings())
    return Head(found.weight, found.bias, getattr(cast(Any, module).config, "final_logit_softcapping", None))


def mean_over_vocabulary(hidden: Float[Tensor, "t width"], head: Head, score: Score) -> Float[Tensor, ""]:
    """The mean over positions of what `score` says of their logits; differentiable by states and head.

    Slopes are taken while the logits are there, so the backward pass has nothing left to compute:
    memory is one chunk of logits and the gradients of `hidden` and of the head, which there are anyway.
    """
    bias = head.bias if head.bias is not None else hidden.new_zeros(0)
    return cast(Float[Tensor, ""], _Mean.apply(hidden, head.weight, bias, head.cap, head.chunk, score))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        hidden, weight, bias, cap, chunk, score = given
        head = Head(weight, bias if bias.numel() else None, cap)
        count, total = hidden.shape[0], hidden.new_zeros(())
        slopes = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for a in range(0, count, chunk):
            part = slice(a, min(a + chunk, count))
            logits = head.logits(hidden[part])
            found, slope = score(logits, part)
            total += found.sum()
            if cap is not None:
                slope.mul_(1 - (logits / cap) ** 2)
            # The mean is taken of the narrow products, not of the slopes: a vocabulary is wide.
            torch.mm(slope, weight.to(slope.dtype), out=slopes[part])
            if of_weight is not None:
                of_weight.addmm_(slope.T, hidden[part], alpha=1 / count)
            if of_bias is not None and bias.numel():
                of_bias.add_(slope.sum(0), alpha=1 / count)
        slopes.div_(max(1, count))
        ctx.slopes = slopes, of_weight, of_bias
        return total / max(1, count)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (upstream,) = outputs
        slopes, of_weight, of_bias = ctx.slopes
        ctx.slopes = None  # they are used up: what follows works on them in place
        scaled = [None if part is None else part.mul_(upstream) for part in (slopes, of_weight, of_bias)]
        return (*scaled, None, None, None)
