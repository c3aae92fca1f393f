"""How much a change of one matrix costs the whole model, told from gradients of its own uncertainty."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Rows of logits at once.
_ROWS = 256


def linear_cost(
    inputs: Float[Tensor, "t in"], gradients: Float[Tensor, "t out"], change: Float[Tensor, "out in"]
) -> float:
    """KL(before || after), nats per token, that a change of a linear's weight makes, to second order.

        KL ~ 1/2 E_t (g_t^T D x_t)^2

    where g_t is the gradient of -log p(drawn token) at the linear's output: its outer products are the
    Fisher information (natural gradient as the Hessian of KL: arXiv:1412.1193). What one position's error
    does together with another's is left out.
    """
    made = (inputs @ change.to(inputs.dtype).T).float()
    return 0.5 * float((made * gradients.float()).sum(-1).square().mean(dtype=torch.float64))


def head_cost(
    hidden: Iterable[Float[Tensor, "t in"]],
    W: Float[Tensor, "vocab in"],
    change: Float[Tensor, "vocab in"],
) -> float:
    """KL that a change of the head's weight makes, nats per token, to second order.

    KL ~ 1/2 (E_v d_v^2 - (E_v d_v)^2),    d = D x,   v as the model predicts
    """
    total, count = 0.0, 0
    for X in hidden:
        for rows in X.split(_ROWS):
            p = (rows @ W.to(rows.dtype).T).float().softmax(-1)
            d = (rows @ change.to(rows.dtype).T).float()
            mean = (p * d).sum(-1)
            total += float(((p * d * d).sum(-1) - mean * mean).sum(dtype=torch.float64))
            count += len(rows)
    return 0.5 * total / max(count, 1)


def embedding_cost(
    tokens: Int64[Tensor, "t"], gradients: Float[Tensor, "t in"], change: Float[Tensor, "vocab in"]
) -> float:
    """KL that a change of the embedding makes, nats per token, to second order."""
    return 0.5 * float((change[tokens] * gradients).sum(-1).square().mean(dtype=torch.float64))
