"""What a dense grid of the same size would lose, where weights are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import TypedDict

import torch
from torch import Tensor

from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import BITS, GROUPS, Scheme
from pocketsize.recipes.record import Finding, LayerReport

# Rows that are compared, evenly spaced.
ROWS = 32
# A row's offset, where weights that are not quantized are stored sparse.
_OFFSET = 64


class Beside(TypedDict, total=False):
    """The fields of a layer's report that tell of its dense rival."""

    rival: float
    rival_bits: float
    rivalled: float


def sparse_bits(zeros: float, columns: int, scheme: Scheme | None = None) -> float:
    """Bits of a weight of a matrix whose zeros are left out: its mask, and what is not zero."""
    if scheme is None:
        return 1 + 16 * (1 - zeros) + _OFFSET / columns
    grids = scheme.bits_per_weight(columns) - scheme.bits
    return 1 + scheme.bits * (1 - zeros) + grids


def some_rows(W: Tensor) -> Tensor:
    """The numbers of the rows that are compared."""
    return torch.linspace(0, len(W) - 1, min(len(W), ROWS)).round().long().to(W.device)


def beside_dense(W: Tensor, X: Tensor, H: Tensor | None, bits: float) -> Beside:
    """The error of W on the widest plain grid of at most so many bits a weight, and that of X.

    Nothing where no grid is so small.
    """
    if (scheme := _within(bits, W.shape[1])) is None:
        return {}
    errors = [W, W - X, W - _rounded(W, H, scheme)]
    whole, own, other = (float(((E if H is None else E @ H) * E).sum(dtype=torch.float64)) for E in errors)
    whole = max(whole, 1e-30)
    return {
        "rival": other / whole,
        "rival_bits": round(scheme.bits_per_weight(W.shape[1]), 4),
        "rivalled": own / whole,
    }


def _rounded(W: Tensor, H: Tensor | None, scheme: Scheme) -> Tensor:
    """W on the grid: by GPTQ, but to nearest where no input is known or 8 bits leave little to gain."""
    if scheme.bits == 8:
        groups = W.view(len(W), -1, scheme.width(W.shape[1]))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((groups / scale).round() * scale).view(W.shape)
    return (rtn(W, scheme) if H is None else gptq(W, H, scheme).weight).dequantize()


def sparse_report(report: LayerReport, W: Tensor, X: Tensor, H: Tensor, scheme: Scheme) -> LayerReport:
    """The report of a quantized matrix of a pruned model, W being what it was before it was pruned."""
    zeros = 1 - int(X.count_nonzero()) / X.numel()
    bits = sparse_bits(zeros, W.shape[1], scheme)
    told = replace(report, zeros=round(zeros, 6), bits_per_weight=round(bits, 4))
    pick = some_rows(W)
    return replace(told, **beside_dense(W[pick], X[pick], H, bits))


def _within(bits: float, columns: int) -> Scheme | None:
    """The widest grid in groups of 64 or more of at most so many bits a weight, give or take 1 %."""
    group = next((g for g in sorted(GROUPS) if columns % g == 0 and g >= 64), None)
    for width in sorted(BITS, reverse=True):
        scheme = Scheme(
            width, group, symmetric=width == 8, scale_digits=8 if width == 8 else min(8, 11 - width)
        )
        if scheme.bits_per_weight(columns) <= 1.01 * bits:
            return scheme
    return None


def denser(reports: Sequence[LayerReport], what: str) -> Iterator[Finding]:
    """What is said where a dense grid of no more bits errs less in most matrices."""
    told = [r for r in reports if r.rival is not None and r.rivalled is not None and r.rivalled > 0]
    if not told:
        return
    ratio = median((r.rival or 0.0) / (r.rivalled or 1.0) for r in told)
    bits, other = (
        median(x) for x in ([r.bits_per_weight for r in told], [r.rival_bits or 0.0 for r in told])
    )
    if ratio < 1:
        said = (
            f"with zeros left out {what} take {bits:.2f} bits; a dense grid of {other:.2f} bits would leave "
            f"{ratio:.2g} of the error (median of {len(told)} matrices)"
        )
        yield Finding("dense-is-better", f"{said}: quantize instead where no runtime gains by zeros")
    else:
        said = (
            f"{what} with zeros left out take {bits:.2f} bits and err less than a dense grid of {other:.2f}"
        )
        yield Finding("sparse-is-better", f"{said} bits: {1 / ratio:.2g} of its error (median)")
