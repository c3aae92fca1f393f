"""Pruning as the papers write it: one weight, one row, one column at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketsize.pruning.pattern import Pattern


def highest_slow(
    score: Tensor, pattern: Pattern, scope: str = "matrix", there: Tensor | None = None
) -> Tensor:
    """The mask, by sorting; of equal scores the first stay, and nothing that is not there."""
    if there is not None:
        return highest_slow(torch.where(there, score, -torch.inf), pattern, scope) & there
    if pattern.of:
        lines, keep = score.reshape(-1, pattern.of), pattern.kept
    elif scope == "row":
        lines = score
        keep = lines.shape[1] - min(round(pattern.sparsity * lines.shape[1]), lines.shape[1] - 1)
    else:
        lines = score.reshape(1, -1)
        keep = lines.shape[1] - min(round(pattern.sparsity * lines.shape[1]), lines.shape[1] - 1)
    mask = torch.zeros(lines.shape, dtype=torch.bool)
    for i, line in enumerate(lines.tolist()):
        order = sorted(range(len(line)), key=lambda j: (-line[j], j))
        mask[i, order[:keep]] = True
    return mask.view(score.shape)


def refit_slow(W: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    """Least squares, row by row."""
    X = torch.zeros(W.shape, dtype=torch.float64)
    for i in range(len(W)):
        kept = mask[i].nonzero()[:, 0]
        if len(kept):
            wanted = (H.double() @ W[i].double())[kept]
            X[i, kept] = torch.linalg.solve(H.double()[kept][:, kept], wanted)
    return X


def surgeon_slow(W: Tensor, H: Tensor, damp: float = 0.01) -> Tensor:
    """The saliencies of optimal brain surgeon."""
    damped = H.double() + damp * H.double().diagonal().mean() * torch.eye(len(H))
    return W.double().square() / torch.linalg.inv(damped).diagonal()


def sparsegpt_slow(
    W: Tensor,
    H: Tensor,
    pattern: Pattern,
    damp: float = 0.01,
    block: int = 128,
    there: Tensor | None = None,
) -> Tensor:
    """Algorithm 1: the inverse's Cholesky factor, each error sent on to all columns behind it."""
    n = W.shape[1]
    damped = H.double() + damp * H.double().diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    W = W.double().clone()
    mask = torch.ones(W.shape, dtype=torch.bool)
    for j in range(n):
        if j % (pattern.of or block) == 0:
            part = slice(j, min(j + (pattern.of or block), n))
            worth = W[:, part].square() / U.diagonal()[part].square()
            mask[:, part] = highest_slow(worth, pattern, there=None if there is None else there[:, part])
        gone = torch.where(mask[:, j], 0, W[:, j])
        W[:, j:] -= torch.outer(gone / U[j, j], U[j, j:])
        W[:, j] *= mask[:, j]
    return W * mask


def alps_slow(
    W: Tensor,
    H: Tensor,
    pattern: Pattern,
    *,
    damp: float = 0.01,
    rounds: int = 4,
    scope: str = "matrix",
    there: Tensor | None = None,
) -> Tensor:
    """The same rounds by an eigendecomposition, with V instead of V over the penalty, and exact values."""
    root = H.double().diagonal().sqrt()
    unit = H.double() / torch.outer(root, root) + damp * torch.eye(len(H))
    values, Q = torch.linalg.eigh(unit)
    wanted = W.double() * root
    mask = highest_slow(wanted.abs(), pattern, scope, there)
    T, D, V = wanted, wanted * mask, torch.zeros_like(wanted)
    last = -(-rounds // 2) - 1
    for i in range(rounds):
        penalty = 0.5**0.5 if rounds <= 4 else 0.25 * 8 ** (i // 2 / last)
        B = (wanted @ unit - V + penalty * D) @ Q @ torch.diag(1 / (values + penalty)) @ Q.T
        T = B + V / penalty
        D = T * highest_slow(T.abs(), pattern, scope, there)
        V = V + penalty * (B - D)
    return refit_slow(wanted, highest_slow(T.abs(), pattern, scope, there), unit) / root


def error(W: Tensor, X: Tensor, H: Tensor) -> float:
    """tr (W - X) H (W - X)^T over tr W H W^T."""
    E, V = W.double() - X.double(), W.double()
    return float((E @ H.double() * E).sum() / (V @ H.double() * V).sum())


def oats_slow(
    W: Tensor,
    H: Tensor,
    pattern: Pattern,
    rank: int,
    *,
    rounds: int = 20,
    scope: str = "row",
    damp: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """The same turns with whole singular value decompositions; S and L."""
    root = H.double().diagonal().sqrt()
    wanted = W.double() * root
    S = wanted * highest_slow(wanted.abs(), pattern, scope)
    for _ in range(rounds + 1):
        U, values, V = torch.linalg.svd(wanted - S, full_matrices=False)
        L = U[:, :rank] @ torch.diag(values[:rank]) @ V[:rank]
        S = (wanted - L) * highest_slow((wanted - L).abs(), pattern, scope)
    unit = H.double() / torch.outer(root, root) + damp * torch.eye(len(H))
    mask = highest_slow((wanted - L).abs(), pattern, scope)
    return refit_slow(wanted - L, mask, unit) / root, L / root
