"""The best values of the weights that a mask leaves."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

ROUNDS = 20
# A row whose residual has fallen to this share of what it was is done.
SMALL = 1e-4


def refit(
    W: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    *,
    start: Float[Tensor, "out in"] | None = None,
    rounds: int = ROUNDS,
) -> Float[Tensor, "out in"]:
    """The weights left by a mask, moved so that the output errs least.

        minimise over X, zero outside of the mask:   tr (X - W) H (X - W)^T,     H = E[x x^T], damped

    Conjugate gradients with H's diagonal as preconditioner (ALPS, arXiv:2406.07831, section 3.3), all rows
    side by side, each with steps of its own, from `start` (else W under the mask). H is to be damped before.
    """
    scale = H.diagonal().clamp(min=1e-30)
    X = (W if start is None else start) * mask
    R = ((W - X) @ H).mul_(mask)  # what is left of the slope
    Z = R / scale
    P, power = Z.clone(), (R * Z).sum(1, keepdim=True)
    least = power * SMALL**2
    for _ in range(rounds):
        if not bool((power > least).any()):
            break
        Q = (P @ H).mul_(mask)
        step = power / (P * Q).sum(1, keepdim=True).clamp(min=1e-30)
        X.addcmul_(P, step)
        R.addcmul_(Q, step, value=-1)
        Z = R / scale
        after = (R * Z).sum(1, keepdim=True)
        P.mul_(after / power.clamp(min=1e-30)).add_(Z)
        power = after
    return X
