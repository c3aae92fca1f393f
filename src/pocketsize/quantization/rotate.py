"""Rotations that weights take up: what a model computes stays, what its matrices look like changes.

QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406) turn the residual stream by one orthogonal matrix
(R1) and each head's values by another (R2), so that no single input stands out. Both are multiplied into
the matrices on either side and cost nothing when the model runs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.linalg import hadamard

# Rows that are turned at once: an embedding is large.
ROWS = 4096


def rotation(n: int, seed: int) -> Float[Tensor, "n n"]:
    """A random orthogonal matrix: a Hadamard matrix with signs drawn by `seed`, or one from QR.

    QR serves orders of which no Hadamard matrix is known.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        H = hadamard(n)
    except ValueError:
        Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        return (Q * R.diagonal().sign()).float()
    return (torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1) * H


def turned_outputs(W: Float[Tensor, "out *in"], R: Float[Tensor, "n n"]) -> Float[Tensor, "out *in"]:
    """A matrix or bias whose outputs, n at a time, are turned: R^T y."""
    parts = W.double().unflatten(0, (-1, len(R)))
    return torch.einsum("ij,hi...->hj...", R.double(), parts).flatten(0, 1).float()


def turned_inputs(
    W: Float[Tensor, "out in"], R: Float[Tensor, "n n"], gain: Float[Tensor, "in"] | None = None
) -> Float[Tensor, "out in"]:
    """A matrix that gives for turned inputs (R^T x, n at a time) what W gives for x, scaled by `gain`."""
    turned, R = torch.empty(W.shape, dtype=torch.float32), R.double()
    for rows, there in zip(W.split(ROWS), turned.split(ROWS), strict=True):
        scaled = rows.double() if gain is None else rows.double() * gain.double()
        there.copy_((scaled.unflatten(1, (-1, len(R))) @ R).flatten(1))
    return turned
