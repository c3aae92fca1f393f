"""GPTQ: columns are rounded one after the other, and those still to come absorb the error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pocketsize.linalg import inverse_cholesky
from pocketsize.quantization.compiled import STEPS, sweep_block
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import Scheme

BLOCK = 128


@dataclass(frozen=True, slots=True)
class GptqResult:
    """The quantized matrix and what it took: final damping, escalations, dead inputs."""

    weight: QWeight
    damp: float
    escalations: int
    dead: int


def gptq(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    scheme: Scheme,
    *,
    damp: float = 0.01,
    search: bool = True,
    order: bool = True,
) -> GptqResult:
    """Quantize W column by column; columns still to come absorb each column's error.

        minimise over Q:   tr (W - Q) H (W - Q)^T,     H = E[x x^T]

    arXiv:2210.17323: lazy batch updates (step 2), Cholesky form of the inverse (step 3). `order`
    takes whole groups by their most active input, and the inputs of a group by falling activity:
    the gain of activation order with groups still contiguous, so nothing has to be gathered at
    inference. Scale and zero of a group are fitted when the sweep reaches it, on its weights as
    corrected so far: to its range, or (`search`) by the error the sweep itself sums up, in which
    the error of column i counts 1 / U_ii^2: the part that later columns cannot absorb. `damp` is a
    fraction of the mean of diag H. W and H are left untouched.
    """
    columns = W.shape[1]
    width = scheme.width(columns)
    H = H.to(torch.float32).clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    perm = group_order(H.diagonal(), width) if order else torch.arange(columns)
    factor = inverse_cholesky(H[perm][:, perm], damp)
    W = W.to(torch.float32)[:, perm]
    W[:, dead[perm]] = 0
    codes, scale, zero = sweep(W, factor.U.contiguous(), scheme, search=search)
    back = torch.argsort(perm)
    groups = torch.argsort(perm[::width] // width)
    weight = QWeight(
        codes[:, back].contiguous(), scale[:, groups].contiguous(), zero[:, groups].contiguous(), scheme
    )
    return GptqResult(weight, factor.damp, factor.escalations, int(dead.sum()))


def group_order(activity: Float[Tensor, "in"], width: int) -> Int64[Tensor, "in"]:
    """Columns by falling activity inside each group, groups by their most active column."""
    grouped = activity.view(-1, width)
    inner = grouped.argsort(dim=1, descending=True, stable=True)
    outer = grouped.amax(dim=1).argsort(descending=True, stable=True)
    return (inner + torch.arange(len(grouped))[:, None] * width)[outer].reshape(-1)


def sweep(
    W: Float[Tensor, "out in"],
    U: Float[Tensor, "in in"],
    scheme: Scheme,
    *,
    search: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of W (which is overwritten), in the order of its columns."""
    rows, columns = W.shape
    width = scheme.width(columns)
    block = BLOCK if width > BLOCK else width * (BLOCK // width)
    codes = np.empty((rows, columns), np.uint8)
    scale, zero = (np.empty((rows, columns // width), np.float32) for _ in range(2))
    w, u = W.numpy(), U.numpy()
    d = (1 / U.diagonal() ** 2).numpy()
    steps = STEPS if search else 0
    for a in range(0, columns, block):
        b = min(a + block, columns)
        E = torch.empty(rows, b - a)
        e = E.numpy()

        def run(p: int, q: int, a: int = a, b: int = b, e: np.ndarray = e) -> None:
            grid = (width, scheme.top, scheme.symmetric, scheme.scale_digits, steps)
            sweep_block(w[p:q], u, d, a, b, *grid, codes[p:q], scale[p:q], zero[p:q], e[p:q])

        over_rows(rows, run)
        if b < columns:
            W[:, b:].addmm_(E, U[a:b, b:], alpha=-1)  # everything to the right of the block, once
    return torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(zero)
