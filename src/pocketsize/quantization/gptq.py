"""GPTQ: columns are rounded one after the other, and those still to come absorb the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.linalg import Factor, feedback_factor
from pocketsize.quantization import codebook_loops
from pocketsize.quantization.codebook import unit_of
from pocketsize.quantization.codebook_grid import told
from pocketsize.quantization.compiled import LANES, STEPS, sweep_block, sweep_kept_block
from pocketsize.quantization.drift import pulled_back
from pocketsize.quantization.floats import sweep_floats
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import SUPER_BLOCK, Scheme
from pocketsize.quantization.superblock_loops import sweep_super_block

BLOCK = 64
# What the weights of an input that was always zero count beside others, where a grid is fitted.
UNHEARD = 1e-6


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
    mask: Bool[Tensor, "out in"] | None = None,
    beta: float = 0.0,
) -> GptqResult:
    """Quantize W column by column; columns still to come absorb each column's error.

        minimise over Q:   tr (W - Q) H (W - Q)^T,     H = E[x x^T]

    arXiv:2210.17323, in the form that needs no inverse (`feedback_factor`). `order` takes whole
    groups by their most active input, and the inputs of a group by falling activity: the gain of
    activation order with groups still contiguous, so nothing has to be gathered at inference.
    Scale and zero of a group are fitted when the sweep reaches it, on its weights as corrected so
    far: to its range, or (`search`) by the error the sweep itself sums up, in which the error of
    column i counts d_i, the part that later columns cannot absorb. What the groups of a super-block share
    is fitted to all of them when the sweep reaches the first. `damp` is a fraction of the mean of diag H.
    Where `mask` is False weights become zero: no grid is fitted to them, what they were is made up for as any
    error (SparseGPT, arXiv:2301.00774, section 3.5). `beta`: see `pulled_back`. W and H are left untouched.
    """
    columns = W.shape[1]
    width = scheme.width(columns)
    activity = H.diagonal().to(torch.float32)
    together = SUPER_BLOCK if scheme.super_blocks else width
    perm = group_order(activity, width, together) if order else torch.arange(columns, device=H.device)
    dead = torch.nonzero(activity[perm] == 0)[:, 0]
    factor = pulled_back(_factored(H, perm, dead, damp), beta)
    transposed = W.to(torch.float32).T.contiguous()[perm]
    transposed[dead] = 0
    if W.device.type != "cpu":
        _require_gpu_grid(scheme)
    if mask is not None:
        kept = mask.T.contiguous()[perm].to("cpu", torch.uint8)
        codes, scale, zero = sweep(transposed.cpu(), _on_cpu(factor), scheme, search=search, kept=kept)
        codes, scale, zero = (T.to(W.device) for T in (codes, scale, zero))
    elif scheme.floats:
        codes, scale, zero = sweep_floats(transposed, factor, scheme, search=search)
    elif W.device.type == "cpu":
        codes, scale, zero = sweep(transposed, factor, scheme, search=search)
    else:
        codes, scale, zero = _gpu_sweep()(transposed, factor, scheme, search=search)
    back, groups = torch.argsort(perm), torch.argsort(perm[::width] // width)
    codes, scale, zero = (T[of].T.contiguous() for T, of in ((codes, back), (scale, groups), (zero, groups)))
    return GptqResult(QWeight(codes, scale, zero, scheme), factor.damp, factor.escalations, len(dead))


def _require_gpu_grid(scheme: Scheme) -> None:
    """Refuse what the sweep of a GPU does not know."""
    if scheme.super_blocks or scheme.table is not None:
        what = "super-blocks" if scheme.super_blocks else f"codebook {scheme.name}"
        raise UnsupportedError(
            f"GPTQ on a GPU has no {what}: set POCKETSIZE_DEVICE=cpu, or use step awq or rtn"
        )


def _gpu_sweep() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The sweep of a GPU, which needs Triton; torch for CUDA brings it."""
    try:
        from pocketsize.quantization import gpu
    except ImportError as error:
        raise UnsupportedError(
            f"GPTQ on a GPU needs Triton ({error}): python -m pip install 'pocketsize[gpu]', "
            "or set POCKETSIZE_DEVICE=cpu"
        ) from error
    return gpu.sweep


def _factored(
    H: Float[Tensor, "in in"], perm: Int64[Tensor, "in"], dead: Int64[Tensor, "dead"], damp: float
) -> Factor:
    """`feedback_factor` of H in the order of the sweep.

    An input that was always zero stands for itself, as active as the mean of the others, so that damping does
    not depend on the unit inputs are in; where a grid is fitted its weights count next to nothing.
    """
    ordered = H.to(torch.float32)[perm]
    if H.device.type == "cpu":  # numpy gathers columns several times faster than torch
        ordered = torch.from_numpy(ordered.numpy().take(perm.numpy(), axis=1))
    else:
        ordered = ordered[:, perm]
    live = ordered.shape[0] - len(dead)
    ordered[dead, dead] = ordered.diagonal().sum() / live if live else 1.0
    factor = feedback_factor(ordered, damp)
    factor.d[dead] *= UNHEARD
    return factor


def group_order(
    activity: Float[Tensor, "in"], width: int, together: int | None = None
) -> Int64[Tensor, "in"]:
    """Columns by falling activity inside each group, groups by their most active column.

    `together` columns, whole groups of them, are not parted: they follow by the most active of all.
    """
    grouped = activity.view(-1, width)
    inner = grouped.argsort(dim=1, descending=True, stable=True)
    start = torch.arange(len(grouped), device=activity.device) * width
    columns, most = inner + start[:, None], grouped.amax(dim=1).view(-1, (together or width) // width)
    inside = most.argsort(dim=1, descending=True, stable=True)
    columns = columns.view(*most.shape, width).take_along_dim(inside[..., None], dim=1)
    return columns[most.amax(dim=1).argsort(descending=True, stable=True)].reshape(-1)


def _on_cpu(factor: Factor) -> Factor:
    return replace(factor, M=factor.M.cpu(), d=factor.d.cpu())


def sweep(
    W: Float[Tensor, "in out"],
    factor: Factor,
    scheme: Scheme,
    *,
    search: bool,
    kept: UInt8[Tensor, "in out"] | None = None,
) -> tuple[UInt8[Tensor, "in out"], Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """Codes, scales and zeros of a transposed W, in the order of its inputs, block by block.

    Transposed, so that neighbours in memory are outputs, which do not wait for one another. Where `kept` is 0
    codes stand for zero.
    """
    columns, rows = W.shape
    width = scheme.width(columns)
    step = SUPER_BLOCK if scheme.super_blocks else width * max(1, BLOCK // width)
    codes, E = torch.empty_like(W, dtype=torch.uint8), torch.empty_like(W)  # E: W less what codes stand for
    scale, zero = torch.zeros(2, columns // width, rows)
    unit = 1.0 if scheme.table is None else unit_of(W, scheme.table)
    blocks = [slice(a, min(a + step, columns)) for a in range(0, columns, step)]
    inner = [_feedback(factor.M[part, part]) for part in blocks]

    def run(p: int, q: int) -> None:
        for part, N in zip(blocks, inner, strict=True):
            a, groups = part.start, slice(part.start // width, part.stop // width)
            V = W[part, p:q] + N.T @ (factor.M[:a, part].T @ E[:a, p:q])
            filled = (W[part], V, codes[part], scale[groups], zero[groups], E[part])
            if kept is not None:
                _sweep_kept(N, factor.d[part], scheme, p, (*filled, kept[part]), search=search)
                continue
            _sweep_part(N, factor.d[part], (scheme, unit), p, filled, search=search)

    over_rows(rows, run)
    return codes, scale, zero


def _sweep_kept(
    N: Float[Tensor, "part part"],
    d: Float[Tensor, "part"],
    scheme: Scheme,
    p: int,
    filled: tuple[Tensor, ...],
    *,
    search: bool,
) -> None:
    """`_sweep_part` where some weights must be zero."""
    W, V, C, S, Z, E, kept = (T.numpy() for T in filled)
    width = len(N) // len(S)
    room = np.empty((len(N), LANES), np.float32), *(np.empty(width, np.float32) for _ in range(2))
    grid = (width, scheme.top, scheme.grid, scheme.scale_digits, STEPS if search else 0)
    sweep_kept_block(N.numpy(), d.numpy(), *grid, p, W, V, kept, C, S, Z, E, *room)


def _feedback(M: Float[Tensor, "part part"]) -> Float[Tensor, "part part"]:
    """N = M^-1: rows of the paper's U over their diagonal.

    Where every later column is free to absorb what the earlier ones left, the best weights of a block are
    w + (E M) N, E the errors of all columns before it; in the sweep all is transposed.
    """
    eye = torch.eye(len(M))
    return torch.linalg.solve_triangular(M, eye, upper=True, unitriangular=True).contiguous()


def _sweep_part(
    N: Float[Tensor, "part part"],
    d: Float[Tensor, "part"],
    how: tuple[Scheme, float],
    p: int,
    filled: tuple[Tensor, ...],
    *,
    search: bool,
) -> None:
    """Fill codes, scales, zeros and errors of a block of inputs, from output p on, compiled.

    `how` is the scheme and, where it has a codebook, the unit of its scales.
    """
    scheme, unit = how
    W, V, C, S, Z, E = (T.numpy() for T in filled)
    width = len(N) // len(S)
    room = np.empty((len(N), LANES), np.float32), np.empty(width, np.float32)
    if scheme.table is not None:
        values, middles = (T.numpy() for T in scheme.table.padded())
        grid = (width, values, middles, told(scheme, unit, search=search))
        codebook_loops.sweep_block(N.numpy(), d.numpy(), *grid, p, W, V, C, S, E, *room)
        return
    steps, block = STEPS if search else 0, (p, W, V, C, S, Z, E)
    if scheme.super_blocks:
        grid = (width, scheme.top, scheme.grid, steps, scheme.top_scale)
        sweep_super_block(N.numpy(), d.numpy(), *grid, *block, *room)
    else:
        grid = (width, scheme.top, scheme.grid, scheme.scale_digits, steps)
        sweep_block(N.numpy(), d.numpy(), *grid, *block, *room)
