"""Linear algebra that quantization and pruning share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import NumericalError

ESCALATIONS = 5


@dataclass(slots=True)
class Gram:
    """Running X^T X of a layer's inputs, summed in float32. Sums across ranks by addition.

    A product of one batch is taken in the inputs' own dtype (bfloat16 products accumulate in
    float32 inside the kernel and are rounded once); only the running sum is kept in float32.
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
        self.total += rows.T @ rows
        self.tokens += rows.shape[0]

    def mean(self) -> Float[Tensor, "in in"]:
        """E[x x^T]."""
        if not self.tokens:
            raise NumericalError("no calibration token reached this layer; give more calibration text")
        return self.total / self.tokens


@dataclass(frozen=True, slots=True)
class Factor:
    """Upper Cholesky factor of a damped inverse, and how much damping it took."""

    U: Float[Tensor, "in in"]
    damp: float
    escalations: int


def inverse_cholesky(H: Float[Tensor, "in in"], damp: float) -> Factor:
    """U upper with (H + damp * mean(diag H) * I)^-1 = U^T U.

    Where the factorisation fails the damping is tripled, at most five times; the count is part
    of the answer, so that nobody is left with a matrix that was quietly regularised away.
    """
    H = H.to(torch.float32)
    mean = H.diagonal().mean()
    used = damp
    for escalation in range(ESCALATIONS + 1):
        used = damp * 3.0**escalation
        damped = H.clone()
        damped.diagonal().add_(used * mean)
        L, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            U, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if int(info) == 0 and bool(torch.isfinite(U).all()):
                return Factor(U, used, escalation)
    raise NumericalError(
        f"Gram matrix of {H.shape[0]} inputs is not positive definite even with damping {used:g}; "
        "use more calibration tokens or a larger damp"
    )
