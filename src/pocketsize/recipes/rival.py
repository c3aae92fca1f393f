"""What a dense grid of the same size would lose, where weights are pruned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import TypedDict

import torch
from torch import Tensor

from pocketsize.models.model import Model
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import BITS, GROUPS, Scheme
from pocketsize.recipes.record import Finding, LayerReport
from pocketsize.recipes.step import Context

# Rows that are compared, evenly spaced.
ROWS = 32
# A row's offset, where weights that are not quantized are stored sparse.
_OFFSET = 64
# Give or take so much a grid takes no more bits; grids that take about as many are both tried.
_SLACK, _NEAR = 1.01, 0.95
# The share of zeros from which on a model was pruned before.
_ZEROS = 0.05
# Steps behind which weights are others for other reasons than what was taken.
_MOVING = frozenset({"gradual", "finetune"})


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


def whole_of(model: Model, ctx: Context) -> Model | None:
    """What pruned matrices are held against: the model before its first zeros.

    None where nothing tells what weights would be without zeros: where these were there from the start, or
    weights became others since for other reasons.
    """
    if _is_whole(model):
        return model
    if ctx.whole is None:
        return None
    kinds = [report.kind for report in ctx.reports]
    moved = _MOVING.intersection(kinds[kinds.index("prune") :])
    return None if moved or _shapes(model) != _shapes(ctx.whole) else ctx.whole


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: model.matrix_shape(name) for name in model.linears}


def _is_whole(model: Model) -> bool:
    """Whether nothing was taken from a model. Not all say so of their zeros: two matrices are looked at.

    Those of a quantized source lie on grids, which have zeros by themselves.
    """
    if model.pattern is not None or model.low_rank:
        return False
    names = model.linears_of(model.blocks[len(model.blocks) // 2])
    return model.origin.dequantized_from is not None or all(
        float((model.weight(name) == 0).double().mean()) < _ZEROS for name in (names[0], names[-1])
    )


def _stored_bits(model: Model, name: str) -> float:
    """Bits of a weight of a matrix as it came, at which nothing is lost: at most 16."""
    entry, origin = model.checkpoint.entries[name], model.origin
    own = 16.0 if name in model.changed else 8 * (entry.end - entry.begin) / math.prod(entry.shape)
    source = 16.0 if origin.dequantized_from is None else 8 * origin.source_bytes / origin.parameters
    return min(16.0, own, source)


def beside(
    whole: Model | None,
    name: str,
    moved: Tensor | None,
    X: Tensor,
    H: Tensor | None,
    *,
    bits: float,
    like: Scheme | None = None,
) -> Beside:
    """What is told of the dense rival of a pruned matrix X, that of `whole` being what it was before.

    `moved` is what was added to it before anything was taken, `like` how X is quantized. Nothing where it is
    not known, or where no grid is so small.
    """
    if whole is None:
        return {}
    pick = some_rows(X)
    W = whole.as_stored(name, whole.weight(name))[pick.to("cpu")].to(X.device)
    W = W if moved is None else W + moved[pick]
    return beside_dense(W, X[pick], H, bits, lossless=_stored_bits(whole, name), like=like)


def beside_dense(
    W: Tensor,
    X: Tensor,
    H: Tensor | None,
    bits: float,
    *,
    lossless: float = 16.0,
    like: Scheme | None = None,
) -> Beside:
    """The error of W on the best plain grid of at most so many bits a weight, and that of X.

    At `lossless` bits there is none. Nothing where no grid is so small.
    """
    free = lossless <= _SLACK * bits
    found = [] if free else rivals(bits, W.shape[1], like)
    if not free and not found:
        return {}
    whole, own = max(_energy(W, H), 1e-30), _energy(W - X, H)
    tried = [(_energy(W - _rounded(W, H, s), H), s.bits_per_weight(W.shape[1])) for s in found]
    other, taken = min(tried, default=(0.0, lossless))
    return {"rival": other / whole, "rival_bits": round(taken, 4), "rivalled": own / whole}


def _energy(E: Tensor, H: Tensor | None) -> float:
    return float(((E if H is None else E @ H) * E).sum(dtype=torch.float64))


def rivals(bits: float, columns: int, like: Scheme | None = None) -> list[Scheme]:
    """The plain grids of at most so many bits a weight, give or take 1 %, that come nearest to them.

    The one that takes most bits, and one of another width that takes about as many. Groups are all that can
    be stored and that of `like`; grids are as symmetric as that, else have zeros below 8 bits.
    """
    groups = dict.fromkeys((*GROUPS, None, *(() if like is None else (like.group,))))
    groups = [g for g in groups if g is None or columns % g == 0]
    found: list[tuple[float, Scheme]] = []
    for width in BITS:
        symmetric = width == 8 or (like is not None and like.symmetric)
        digits = 8 if symmetric else min(8, 11 - width)
        own = [Scheme(width, g, symmetric=symmetric, scale_digits=digits) for g in groups]
        sizes = [(s.bits_per_weight(columns), s) for s in own]
        found += sorted((t for t in sizes if t[0] <= _SLACK * bits), key=lambda t: t[0])[-1:]
    found.sort(key=lambda t: t[0], reverse=True)
    return [s for taken, s in found[:2] if taken >= _NEAR * found[0][0]]


def _rounded(W: Tensor, H: Tensor | None, scheme: Scheme) -> Tensor:
    """W on the grid: by GPTQ, but to nearest where no input is known or 8 bits leave little to gain."""
    if scheme.bits == 8:
        groups = W.view(len(W), -1, scheme.width(W.shape[1]))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((groups / scale).round() * scale).view(W.shape)
    return (rtn(W, scheme) if H is None else gptq(W, H, scheme).weight).dequantize()


def compared(
    W: Tensor, X: Tensor, H: Tensor | None, plain: Tensor, stored: tuple[float, float]
) -> LayerReport:
    """The report of a matrix that is pruned, held against a `plain` mask.

    On at most 32 evenly spaced rows. `stored` are the share of its zeros and its bits a weight.
    """
    pick = some_rows(W)
    w, x, mask = W[pick], X[pick], plain[pick]
    whole, (zeros, bits) = max(_energy(w, H), 1e-30), stored
    return LayerReport(
        name="",
        rows=W.shape[0],
        columns=W.shape[1],
        bits=16,
        bits_per_weight=round(bits, 4),
        error=_energy(w - x, H) / whole,
        rtn_error=_energy(w * ~mask, H) / whole,
        zeros=round(zeros, 6),
    )


def sparse_report(report: LayerReport, X: Tensor, scheme: Scheme) -> LayerReport:
    """The report of a quantized matrix of a pruned model, with its zeros left out."""
    zeros = 1 - int(X.count_nonzero()) / X.numel()
    bits = sparse_bits(zeros, X.shape[1], scheme)
    return replace(report, zeros=round(zeros, 6), bits_per_weight=round(bits, 4))


def denser(reports: Sequence[LayerReport], what: str, *, known: bool) -> Iterator[Finding]:
    """What is said where a dense grid of no more bits errs less in most matrices.

    That cannot be told where what they would be without zeros is not `known`.
    """
    pruned = [r for r in reports if r.zeros is not None]
    told = [r for r in pruned if r.rival is not None and r.rivalled is not None and r.rivalled > 0]
    if pruned and not known:
        yield Finding(
            "dense-unknown",
            f"whether {what} with zeros left out are better than a dense grid of as many bits is not told: "
            "nothing says what the weights would be without zeros (a run that prunes the original knows it)",
        )
    if not told or not known:
        return
    ratio = median((r.rival or 0.0) / (r.rivalled or 1.0) for r in told)
    bits, other = (
        median(x) for x in ([r.bits_per_weight for r in told], [r.rival_bits or 0.0 for r in told])
    )
    if ratio == 0:
        yield Finding(
            "dense-is-better",
            f"with zeros left out {what} take {bits:.2f} bits; as they were they take {other:.2f} and lose "
            "nothing: leave them where no runtime gains by zeros",
        )
    elif ratio < 1:
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
