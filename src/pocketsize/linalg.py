"""Linear algebra that quantization and pruning share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import NumericalError

ESCALATIONS = 5
# A Gram matrix this wide is summed in panels; below that one product is quicker.
WIDE, PANELS = 256, 4


@dataclass(slots=True)
class Gram:
    """Running X^T X of a layer's inputs, summed in float32. Sums across ranks by addition.

    A product of one batch is taken in the inputs' own dtype (bfloat16 products accumulate in
    float32 inside the kernel and are rounded once); only the running sum is kept in float32. Only
    the upper triangle of `total` is sound; `mean` mirrors it.
    """

    total: Float[Tensor, "in in"]
    tokens: int = 0

    @classmethod
    def zeros(cls, columns: int) -> Gram:
        """An empty sum for a layer with `columns` inputs."""
        return cls(torch.zeros(columns, columns, dtype=torch.float32))

    def update(self, X: Float[Tensor, "*batch in"], mask: Bool[Tensor, "*batch"] | None = None) -> None:
        """Add the rows of X; rows where `mask` is False (padding) do not count."""
        rows = X.detach().flatten(0, -2)
        if mask is not None and not bool(mask.all()):
            rows = rows[mask.flatten()]
        # The lower half of a symmetric product is not worth computing: blocks of rows, from the diagonal on.
        n = rows.shape[1]
        edges = [n * i // PANELS for i in range(PANELS + 1)] if n >= WIDE else [0, n]
        for a, b in itertools.pairwise(edges):
            self.total[a:b, a:] += rows[:, a:b].T @ rows[:, a:]
        self.tokens += rows.shape[0]

    def mean(self) -> Float[Tensor, "in in"]:
        """E[x x^T]."""
        if not self.tokens:
            raise NumericalError("no calibration token reached this layer; give more calibration text")
        mean = self.total.triu() / self.tokens
        return mean + mean.triu(1).T


@dataclass(frozen=True, slots=True)
class Factor:
    """Upper Cholesky factor of a damped inverse, and how much damping it took."""

    U: Float[Tensor, "in in"]
    damp: float
    escalations: int


def inverse_cholesky(H: Float[Tensor, "in in"], damp: float) -> Factor:
    """U upper with (H + damp * mean(diag H) * I)^-1 = U^T U.

    With J the reversal of order and J H J = L L^T, U = J L^-1 J: one factorisation and one
    triangular inverse, and the inverse of H is never formed.

    Where the factorisation fails the damping is tripled, at most five times; the count is part
    of the answer, so that nobody is left with a matrix that was quietly regularised away.
    """
    H = H.to(torch.float32)
    mean = H.diagonal().mean()
    used = damp
    for escalation in range(ESCALATIONS + 1):
        used = damp * 3.0**escalation
        damped = H.flip(0, 1)
        damped.diagonal().add_(used * mean)
        L, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            U = inverse_lower(L).flip(0, 1).contiguous()
            if bool(torch.isfinite(U).all()):
                return Factor(U, used, escalation)
    raise NumericalError(
        f"Gram matrix of {H.shape[0]} inputs is not positive definite even with damping {used:g}; "
        "use more calibration tokens or a larger damp"
    )


def inverse_lower(L: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The inverse of a lower triangular matrix, by halves: a third of a general solve's work.

    [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]
    """
    n = L.shape[0]
    if n <= WIDE:
        return torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype), upper=False)
    half = n // 2
    A, C = inverse_lower(L[:half, :half]), inverse_lower(L[half:, half:])
    out = torch.zeros_like(L)
    out[:half, :half] = A
    out[half:, half:] = C
    out[half:, :half] = -(C @ L[half:, :half]) @ A
    return out
