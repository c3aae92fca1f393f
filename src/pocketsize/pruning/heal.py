"""What is left of a linear is solved anew, so that it gives what the whole one gave: least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.errors import NumericalError

# Shares of the mean of the Gram diagonal that are tried as damping; text that is held out chooses.
DAMPS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(slots=True)
class Residuals:
    """Running sums of what a linear reads and of what its output lacks, weighted token by token.

        G = sum w x x^T,    C = sum w r x^T,    s = sum w r^2,    r = y - W x

    What it lacks is summed, not what it should give: where nothing is lacking all of it is exactly zero.
    Products of a batch are taken in float32, and so are the sums.
    """

    inputs: Float[Tensor, "in in"]
    cross: Float[Tensor, "out in"]
    squares: Float[Tensor, "out"]
    tokens: int = 0

    @classmethod
    def zeros(cls, rows: int, columns: int, device: torch.device | None = None) -> Residuals:
        """Empty sums for a linear with so many outputs and inputs."""
        inputs, cross = (torch.zeros(n, columns, device=device) for n in (columns, rows))
        return cls(inputs, cross, torch.zeros(rows, device=device))

    def update(
        self, X: Float[Tensor, "t in"], R: Float[Tensor, "t out"], weight: Float[Tensor, "t"] | None = None
    ) -> None:
        """Add tokens: what is read, and what the output lacks."""
        root = None if weight is None else weight.sqrt()[:, None]
        X, R = (A if root is None else A * root for A in (X.float(), R.float()))
        self.inputs += X.T @ X
        self.cross += R.T @ X
        self.squares += R.square().sum(0)
        self.tokens += len(X)

    def plus(self, other: Residuals) -> Residuals:
        """Both sums together."""
        return Residuals(
            self.inputs + other.inputs,
            self.cross + other.cross,
            self.squares + other.squares,
            self.tokens + other.tokens,
        )

    def left(self, D: Float[Tensor, "out in"]) -> float:
        """sum w |r - D x|^2: what is still lacking once D is added to the weight."""
        gained = (D * (D @ self.inputs - 2 * self.cross)).sum(dtype=torch.float64)
        return float(self.squares.sum(dtype=torch.float64) + gained)


@dataclass(frozen=True, slots=True)
class Healed:
    """What is to be added to a weight, and the error then left on held-out tokens, as a share of that before.

    `damp` is 0 where nothing that was tried helped, and nothing is added.
    """

    change: Float[Tensor, "out in"]
    share: float = 1.0
    damp: float = 0.0


def correction(seen: Residuals, damp: float) -> Float[Tensor, "out in"]:
    """What added to a weight leaves least to be lacking.

        minimise over D:   sum w |r - D x|^2 + damp * mean(diag G) |D|^2,      D = C (G + damp mean I)^-1

    For a linear that lost the inputs outside S, W' = W[:, S] + D is W H[:, S] H[S, S]^-1 where nothing before
    it changed and nothing is damped; the damping pulls towards the columns as they were.
    """
    G = seen.inputs.clone()
    mean = float(G.diagonal().mean())
    if mean == 0:  # no input ever was anything else than zero
        return torch.zeros_like(seen.cross)
    G.diagonal().add_(damp * mean)
    L, info = torch.linalg.cholesky_ex(G)
    if int(info):
        raise NumericalError(
            f"{len(G)} inputs cannot be solved for with damping {damp:g}; give more calibration text"
        )
    return torch.cholesky_solve(seen.cross.T, L).T


def healed(teach: Residuals, judge: Residuals) -> Healed:
    """The correction of the damping that leaves least on tokens which did not teach; none if none helps.

    Once the damping is chosen all tokens teach.
    """
    before = judge.left(torch.zeros_like(judge.cross))
    nothing = Healed(torch.zeros_like(teach.cross))
    if before <= 0 or not teach.tokens:
        return nothing
    left = {damp: judge.left(correction(teach, damp)) for damp in DAMPS}
    damp = min(left, key=lambda d: left[d])
    if not left[damp] < before:
        return nothing
    return Healed(correction(teach.plus(judge), damp), max(0.0, left[damp] / before), damp)
