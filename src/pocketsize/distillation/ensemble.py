"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def blended(
    logits: Sequence[Float[Tensor, "t vocab"]], weights: Float[Tensor, "teachers t"]
) -> Float[Tensor, "t vocab"]:
    """Log-probabilities of the mixture sum_k w_k softmax(logits_k); the weights of a position add up to 1.

    float32. A mixture of distributions, not a mean of logits: what one teacher rules out, another may allow.
    """
    shares = torch.log(weights.clamp_min(torch.finfo(torch.float32).tiny))
    parts = [torch.log_softmax(x.float(), -1) + w[:, None] for x, w in zip(logits, shares, strict=True)]
    return torch.logsumexp(torch.stack(parts), dim=0)


def by_loss(losses: Float[Tensor, "teachers n"], *, sharpness: float = 1.0) -> Float[Tensor, "teachers n"]:
    """How much each teacher counts on each sample: softmax(-sharpness loss) over the teachers."""
    return torch.softmax(-sharpness * losses, dim=0)
