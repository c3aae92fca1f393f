"""GPTQ: columns are rounded one after the other, and those still to come absorb the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from pocketsize.linalg import Factor, feedback_factor
from pocketsize.quantization.compiled import STEPS, sweep_block
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import Scheme

BLOCK = 64


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

    arXiv:2210.17323, in the form that needs no inverse (`feedback_factor`). `order` takes whole
    groups by their most active input, and the inputs of a group by falling activity: the gain of
    activation order with groups still contiguous, so nothing has to be gathered at inference.
    Scale and zero of a group are fitted when the sweep reaches it, on its weights as corrected so
    far: to its range, or (`search`) by the error the sweep itself sums up, in which the error of
    column i counts d_i, the part that later columns cannot absorb. `damp` is a fraction of the
    mean of diag H. W and H are left untouched.
    """
    columns = W.shape[1]
    width = scheme.width(columns)
    activity = H.diagonal().to(torch.float32)
    perm = group_order(activity, width) if order else torch.arange(columns)
    dead = torch.nonzero(activity[perm] == 0)[:, 0]
    factor = feedback_factor(_ordered(H, perm, dead), damp)
    W = _columns(W.to(torch.float32), perm)
    W[:, dead] = 0
    codes, scale, zero = sweep(W, factor, scheme, search=search)
    back, groups = torch.argsort(perm), torch.argsort(perm[::width] // width)
    weight = QWeight(_columns(codes, back), _columns(scale, groups), _columns(zero, groups), scheme)
    return GptqResult(weight, factor.damp, factor.escalations, len(dead))


def _ordered(
    H: Float[Tensor, "in in"], perm: Int64[Tensor, "in"], dead: Int64[Tensor, "dead"]
) -> Float[Tensor, "in in"]:
    """H in the order of the sweep; an input that was always zero stands for itself."""
    ordered = _columns(H.to(torch.float32)[perm], perm)
    ordered[dead, dead] = 1
    return ordered


def _columns(T: Shaped[Tensor, "out in"], picked: Int64[Tensor, "in"]) -> Shaped[Tensor, "out in"]:
    """T[:, picked]; numpy gathers columns several times faster than torch on a CPU."""
    return torch.from_numpy(T.numpy().take(picked.numpy(), axis=1))


def group_order(activity: Float[Tensor, "in"], width: int) -> Int64[Tensor, "in"]:
    """Columns by falling activity inside each group, groups by their most active column."""
    grouped = activity.view(-1, width)
    inner = grouped.argsort(dim=1, descending=True, stable=True)
    outer = grouped.amax(dim=1).argsort(descending=True, stable=True)
    return (inner + torch.arange(len(grouped))[:, None] * width)[outer].reshape(-1)


def sweep(
    W: Float[Tensor, "out in"], factor: Factor, scheme: Scheme, *, search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of W, in the order of its columns, block by block."""
    rows, columns = W.shape
    block = scheme.width(columns) * max(1, BLOCK // scheme.width(columns))
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    E = torch.empty(rows, columns)  # W less what the codes stand for
    for a in range(0, columns, block):
        part = slice(a, min(a + block, columns))
        w, M = W[:, part].contiguous(), factor.M[part, part]
        # N = M^-1: rows of the paper's U over their diagonal. Where every later column is free to absorb
        # what the earlier ones left, the best weights here are w + (E M) N.
        N = torch.linalg.solve_triangular(M, torch.eye(len(M)), upper=True, unitriangular=True).contiguous()
        v = w + E[:, :a] @ factor.M[:a, part] @ N
        codes, scale, zero, E[:, part] = _sweep_part(w, v, N, factor.d[part], scheme, search=search)
        done.append((codes, scale, zero))
    codes, scale, zero = (torch.cat(parts, dim=1) for parts in zip(*done, strict=True))
    return codes, scale, zero


def _sweep_part(
    w: Float[Tensor, "out part"],
    v: Float[Tensor, "out part"],
    N: Float[Tensor, "part part"],
    d: Float[Tensor, "part"],
    scheme: Scheme,
    *,
    search: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zeros and errors of a block of columns, compiled; v is used up."""
    e, codes = torch.empty_like(w), torch.empty_like(w, dtype=torch.uint8)
    width = min(scheme.group or w.shape[1], w.shape[1])
    scale, zero = torch.empty(2, w.shape[0], w.shape[1] // width)
    grid = (width, scheme.top, scheme.symmetric, scheme.scale_digits, STEPS if search else 0)
    n, weight = N.numpy(), d.numpy()
    W, V, C, S, Z, E = (T.numpy() for T in (w, v, codes, scale, zero, e))

    def run(p: int, q: int) -> None:
        sweep_block(n, weight, *grid, W[p:q], V[p:q], C[p:q], S[p:q], Z[p:q], E[p:q])

    over_rows(w.shape[0], run)
    return codes, scale, zero, e
