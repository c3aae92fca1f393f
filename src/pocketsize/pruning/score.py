"""What a weight is worth: the scores by which masks are chosen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.linalg import Factor, feedback_factor


def magnitude(W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """|w|: no data."""
    return W.abs()


def wanda(W: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> Float[Tensor, "out in"]:
    """|w| times the norm of the input that it meets (arXiv:2306.11695); H = E[x x^T]."""
    return W.abs() * H.diagonal().clamp(min=0).sqrt()


def surgeon(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    *,
    damp: float = 0.01,
    factor: Factor | None = None,
) -> Float[Tensor, "out in"]:
    """w^2 / [H^-1]_jj: the error if this weight alone goes and all others make up for it.

    Optimal brain surgeon (Hassibi and Stork 1993), a row at a time; H is damped as GPTQ does;
    `factor` is what comes of that, if it is known.
    """
    factor = factor or feedback_factor(H, damp)
    inverse = torch.linalg.solve_triangular(
        factor.M, torch.eye(len(H), device=H.device), upper=True, unitriangular=True
    )
    return W.square() / (inverse.square() / factor.d[:, None]).sum(0)


def fisher(
    W: Float[Tensor, "out in"], X: Float[Tensor, "t in"], G: Float[Tensor, "t out"]
) -> Float[Tensor, "out in"]:
    """The mean over tokens of (w g)^2, g the loss's gradient by the weight: what its loss costs.

    Molchanov and others (arXiv:1906.10771, section 3.1): the squared first-order change of the loss if a
    weight goes. X are the inputs of the linear, G the gradients at its output, of the same tokens.
    """
    return W.square() * (G.square().T @ X.square()) / len(X)
