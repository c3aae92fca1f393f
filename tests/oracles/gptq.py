"""GPTQ as the paper writes it, from the inverse: one column, then every column to its right."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pocketsize.quantization.floats import fit_floats
from pocketsize.quantization.gptq import UNHEARD, group_order
from pocketsize.quantization.grid import fit_grid
from pocketsize.quantization.scheme import Scheme


def gptq_slow(
    W: Tensor, H: Tensor, scheme: Scheme, damp: float = 0.01, *, search: bool = True, order: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes and dequantized matrix."""
    n = W.shape[1]
    width = scheme.width(n)
    H = H.double()
    dead = H.diagonal() == 0
    perm = group_order(H.diagonal(), width) if order else torch.arange(n)
    H.diagonal()[dead] = H.diagonal()[~dead].mean()
    damped = H[perm][:, perm] + damp * H.diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    weight = 1 / U.diagonal() ** 2 * torch.where(dead[perm], UNHEARD, 1)
    W = W[:, perm].clone()
    W[:, dead[perm]] = 0
    codes, Q = torch.empty_like(W), torch.empty_like(W)
    for i in range(n):
        if i % width == 0:
            part = slice(i, i + width)
            one = replace(scheme, group=None)
            scale, zero = (t[:, 0] for t in fit_grid(W[:, part], one, weight[part] if search else None))
        if scheme.table is None:
            codes[:, i] = (W[:, i] * (1 / scale) + zero).round().clamp(0, scheme.top)
            Q[:, i] = scale * (codes[:, i] - zero)
        else:
            values = torch.tensor(scheme.table.values)
            codes[:, i] = ((W[:, i] / scale)[:, None] - values).abs().argmin(dim=1)
            Q[:, i] = scale * values[codes[:, i].long()]
        W[:, i + 1 :] -= torch.outer((W[:, i] - Q[:, i]) / U[i, i], U[i, i + 1 :])
    back = torch.argsort(perm)
    return codes[:, back], Q[:, back]


def floats_slow(W: Tensor, H: Tensor, scheme: Scheme, *, search: bool = True) -> tuple[Tensor, Tensor]:
    """The same with float8 codes, whose scales are known before the first column."""
    n = W.shape[1]
    width = scheme.width(n)
    H = H.double().clone()
    dead = H.diagonal() == 0
    perm = group_order(H.diagonal(), width)
    H.diagonal()[dead] = H.diagonal()[~dead].mean()
    U = torch.linalg.cholesky(
        torch.linalg.inv(H[perm][:, perm] + 0.01 * H.diagonal().mean() * torch.eye(n)), upper=True
    ).float()
    W = W[:, perm].clone()
    W[:, dead[perm]] = 0
    weight = 1 / U.diagonal() ** 2 * torch.where(dead[perm], UNHEARD, 1)
    scale = fit_floats(W, scheme, weight if search else None)
    codes, Q = torch.empty_like(W, dtype=torch.uint8), torch.empty_like(W)
    for i in range(n):
        s = scale[:, i // width]
        code = (W[:, i] / s).clamp(-448, 448).to(torch.float8_e4m3fn)
        codes[:, i], Q[:, i] = code.view(torch.uint8), s * code.float()
        W[:, i + 1 :] -= torch.outer((W[:, i] - Q[:, i]) / U[i, i], U[i, i + 1 :])
    back = torch.argsort(perm)
    return codes[:, back], Q[:, back]
