"""Weights that make up for what was lost on the way to a linear: the target of asymmetric calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.linalg import Factor, Gram


@dataclass(slots=True)
class Drift:
    """Running sums over tokens of what a linear reads, and of what that lacks beside the original.

        G = sum y y^T,    C = sum (x - y) y^T,    x read in the original, y in the model as changed so far

    Of a linear with fewer outputs than inputs it may be the outputs that are summed, W x - W y in place of
    x - y: all that is asked of C is W C, and so it takes fewer sums. Differences, products and sums are taken
    in float32: where nothing has changed yet C is exactly zero.
    """

    read: Gram
    cross: Float[Tensor, "lacking in"]
    outputs: bool = False

    @classmethod
    def zeros(cls, columns: int, device: torch.device | None = None, *, outputs: int | None = None) -> Drift:
        """Empty sums for a linear with so many inputs, and so many `outputs` where those are summed."""
        cross = torch.zeros(outputs or columns, columns, device=device)
        return cls(Gram.zeros(columns, device), cross, outputs is not None)

    def update(
        self,
        Y: Float[Tensor, "*batch in"],
        X: Float[Tensor, "*batch lacking"],
        mask: Bool[Tensor, "*batch"] | None = None,
        *,
        own: Float[Tensor, "*batch lacking"] | None = None,
    ) -> None:
        """Add the rows of Y and X; rows where `mask` is False (padding) do not count.

        Where outputs are summed X are the original's, and `own` those that the same weights give for Y.
        """
        self.read.update(Y, mask)
        found = [T.detach().flatten(0, -2) for T in (Y, X, own) if T is not None]
        if mask is not None and not bool(mask.all()):
            found = [T[mask.flatten()] for T in found]
        y, x, z = (*found, found[0])[:3]  # z is Y itself where inputs are summed
        self.cross += (x.float() - z.float()).T @ y.float()

    def mean(self) -> Float[Tensor, "lacking in"]:
        """E[(x - y) y^T]; W times it where outputs are summed."""
        return self.cross / max(self.read.tokens, 1)

    def lost(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W C: what the outputs of W lack, against what it reads."""
        return self.mean() if self.outputs else W.to(torch.float32) @ self.mean()


def made_up_for(
    W: Float[Tensor, "out in"], lost: Float[Tensor, "out in"], factor: Factor, *, alpha: float
) -> Float[Tensor, "out in"]:
    """The weights that give, on what a linear reads now, `alpha` of the way to what the original gave.

        minimise over T:   E|W x - T y|^2 + damp mean(diag H) |T - W|^2
        T = W + W C (H + damp mean(diag H) I)^-1,    H = E[y y^T],  C = E[(x - y) y^T]

    It returns W + alpha (T - W); `lost` is W C. Undamped, E|W x - Q y|^2 is tr (Q - T) H (Q - T)^T and what
    no Q changes, so a sweep that begins at T and knows nothing of x solves the asymmetric problem. GPTAQ
    (arXiv:2504.02692) poses it, and has each column's part of W (x - y) made up for by the columns behind it
    alone; here all columns do, at once and before the sweep (QEP, arXiv:2504.09629, of which `alpha` is the
    strength). So any grid, mask or device that a sweep knows goes with it. `factor` is that of H, damped. W
    and `lost` are left untouched.
    """
    Z = torch.linalg.solve_triangular(factor.M, lost.T, upper=True, unitriangular=True)
    Z.div_(factor.d[:, None])
    change = torch.linalg.solve_triangular(factor.M.T, Z, upper=False, unitriangular=True).T
    return W + alpha * change


def pulled_back(factor: Factor, beta: float) -> Factor:
    """The factor with which a column is rounded `beta` of the way back from its corrections to itself.

        w_k + (1 - beta) sum_{j<k} e_j M_jk   instead of   w_k + sum_{j<k} e_j M_jk

    Corrections fit the calibration text, the more so the more of them add up: a first-order term beside the
    second-order one that draws weights back to the original (FOEM, arXiv:2507.11017). Errors e count from the
    weights of the target, in full; the authors' code leaves part of what was drawn back out of them.
    """
    if beta == 0:
        return factor
    M = factor.M * (1 - beta)
    M.diagonal().fill_(1)
    return replace(factor, M=M)
