"""Targets that make up for a drift, from the tokens themselves; and columns drawn back, one at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pocketsize.quantization.gptq import group_order
from pocketsize.quantization.grid import fit_grid
from pocketsize.quantization.scheme import Scheme


def made_up_for_slow(W: Tensor, X: Tensor, Y: Tensor, *, alpha: float, damp: float) -> Tensor:
    """Least squares over all tokens, damping being as many tokens more on which nothing may change."""
    W, X, Y = W.double(), X.double(), Y.double()
    few = len(Y) * damp * (Y * Y).mean()
    A = torch.cat((Y, few.sqrt() * torch.eye(Y.shape[1])))
    B = torch.cat((X @ W.T, few.sqrt() * W.T))
    T = torch.linalg.lstsq(A, B).solution.T
    return (W + alpha * (T - W)).float()


def drawn_back_slow(W: Tensor, H: Tensor, scheme: Scheme, beta: float) -> tuple[Tensor, Tensor]:
    """GPTQ in which each column is rounded `beta` of the way back; codes and dequantized matrix.

    Where the columns of a group would lie, were none of them rounded, is what its grid is fitted to.
    """
    n = W.shape[1]
    width = scheme.width(n)
    H = H.double()
    perm = group_order(H.diagonal(), width)
    damped = H[perm][:, perm] + 0.01 * H.diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    M = torch.linalg.inv(U / U.diagonal()[:, None]).float()
    weight = (1 / U.diagonal() ** 2).float()
    W = W[:, perm]
    codes, E = torch.empty_like(W), torch.zeros_like(W)
    for i in range(n):
        if i % width == 0:
            part, left = slice(i, i + width), E.clone()
            for k in range(i, i + width):
                left[:, k] = -(1 - beta) * left[:, :k] @ M[:k, k]
            one = replace(scheme, group=None)
            scale, zero = (t[:, 0] for t in fit_grid(W[:, part] - left[:, part], one, weight[part]))
        v = W[:, i] + (1 - beta) * E[:, :i] @ M[:i, i]
        codes[:, i] = (v * (1 / scale) + zero).round().clamp(0, scheme.top)
        E[:, i] = W[:, i] - scale * (codes[:, i] - zero)
    back = torch.argsort(perm)
    return codes[:, back], (W - E)[:, back]
