"""The scale search of a group and the column sweep of GPTQ on a GPU, in Triton (on a CPU: `compiled`).

Imported where a matrix lies on a GPU; torch for CUDA brings Triton with it. In Triton's interpreter
(TRITON_INTERPRET=1) the same kernels run on a CPU, slowly.
"""

# Triton's language is no Python that pyright could follow.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.linalg import Factor
from pocketsize.quantization.compiled import HOPELESS, ROUNDS, SHRINK, SMALLEST_SCALE, STEPS
from pocketsize.quantization.scheme import FLOAT_ZEROS, INTEGER_ZEROS, SYMMETRIC, Scheme

# Inputs that are swept at once, and outputs of one program: 16 registers a thread hold them.
BLOCK, LANES, TILE = 64, 32, 128


def sweep(
    W: Float[Tensor, "in out"], factor: Factor, scheme: Scheme, *, search: bool
) -> tuple[UInt8[Tensor, "in out"], Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """Codes, scales and zeros of a transposed W, in the order of its inputs, group by group."""
    columns, rows = W.shape
    width = scheme.width(columns)
    codes, E = torch.empty_like(W, dtype=torch.uint8), torch.empty_like(W)  # E: W less what codes stand for
    scale, zero = W.new_empty(2, columns // width, rows)
    groups = [slice(a, a + width) for a in range(0, columns, width)]
    with torch.cuda.device(W.device) if W.is_cuda else nullcontext():  # kernels go to the current GPU
        for g, group in enumerate(groups):
            _one_group(W, factor, scheme, group, (codes, scale[g], zero[g], E), search=search)
    return codes, scale, zero


def _one_group(
    W: Float[Tensor, "in out"],
    factor: Factor,
    scheme: Scheme,
    group: slice,
    filled: tuple[Tensor, ...],
    *,
    search: bool,
) -> None:
    """Fill the scales and zeros of a group, and codes and errors of its inputs."""
    codes, scale, zero, E = filled
    rows, width = W.shape[1], group.stop - group.start
    grid = (triton.cdiv(rows, LANES),)
    V, _ = _corrected(W, E, factor, group)
    _fit[grid](
        *(V, factor.d[group], scale, zero, rows, width, float(scheme.top)),
        *(float(scheme.middle), 2.0 ** (24 - scheme.scale_digits) + 1.0),
        **{"GRID": scheme.grid, "STEPS": STEPS if search else 0},
        **{"TURNS": ROUNDS + 1 if search else 1, "TILE": TILE, "LANES": LANES},
        enable_fp_fusion=False,  # `_stored` needs every operation rounded
    )
    for a in range(group.start, group.stop, BLOCK):
        part = slice(a, min(a + BLOCK, group.stop))
        V, N = _corrected(W, E, factor, part)
        _round[grid](
            *(N, W[part], V, scale, zero, codes[part], E[part], rows, len(N), float(scheme.top)),
            **{"BLOCK": BLOCK, "LANES": LANES},
        )


def _corrected(W: Tensor, E: Tensor, factor: Factor, part: slice) -> tuple[Tensor, Tensor]:
    """The weights of some inputs as corrected for all before them, and N, by which these correct each other.

    What is explained at `gptq.sweep`. Where nothing is before them N is not needed for that: it can be wide.
    """
    a, width = part.start, part.stop - part.start
    if a == 0 and width > TILE:
        return W[part], W.new_empty(0)
    M = factor.M[part, part]
    eye = torch.eye(width, dtype=M.dtype, device=M.device)
    N = torch.linalg.solve_triangular(M, eye, upper=True, unitriangular=True).contiguous()
    return (W[part] + N.T @ (factor.M[:a, part].T @ E[:a])).contiguous(), N


@triton.jit
def _fit(  # pragma: no cover - compiled
    V, d, scale, zero, rows, width, top, middle, splitter,
    GRID: tl.constexpr, STEPS: tl.constexpr, TURNS: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Scale and zero of a group, for `LANES` outputs (see `grid.fit_grid`)."""
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    lo, hi, wd, total = _sums(V, d, lanes, rows, width, GRID, TILE, LANES)
    best = tl.full((LANES,), float("inf"), tl.float32)
    s_best = tl.zeros((LANES,), tl.float32)
    z_best = tl.zeros((LANES,), tl.float32)
    edge = tl.where(-lo >= hi, lo, hi)
    for k in range(STEPS + 1):
        f = 1.0 - 0.08 * k
        for end in range(2 if GRID == 0 else 1):
            if GRID == 0:
                # Once the extreme on the far code, which is one step further out, once on the near one.
                reach = tl.where(end == 0, -edge / middle, tl.abs(edge) / (middle - 1.0))
                s = _stored(f * reach, splitter)
                z = tl.zeros((LANES,), tl.float32) + middle
            else:
                s = _stored(f * (hi - lo) / top, splitter)
                low = f * lo
                if GRID == 2:
                    low = lo + (1.0 - f) * (hi - lo) / 2.0
                z = _zero(-low / s, s, top, GRID)
            refined = best > -1.0  # all
            for _ in range(TURNS):
                error, qd, qqd, qwd = _moments(V, d, s, z, lanes, rows, width, top, TILE, LANES)
                better = refined & (error < best)
                if GRID != 0:
                    refined = refined & (error <= 1.5 * best)
                best = tl.where(better, error, best)
                s_best = tl.where(better, s, s_best)
                z_best = tl.where(better, z, z_best)
                s, z = _resolve(qd, qqd, qwd, wd, total, s, z, top, splitter, GRID)
    tl.store(scale + lanes, s_best, mask=lanes < rows)
    tl.store(zero + lanes, z_best, mask=lanes < rows)


@triton.jit
def _sums(  # pragma: no cover - compiled
    V, d, lanes, rows, width, GRID: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr
):
    """The range, with 0 unless zeros are floats; the weighted sum; the sum of the weights `d`."""
    lo = tl.zeros((LANES,), tl.float32)
    if GRID == 2:
        lo += tl.load(V + lanes, mask=lanes < rows, other=0.0)
    hi = lo
    wd = tl.zeros((LANES,), tl.float32)
    total = 0.0
    for a in range(0, width, TILE):
        w, of = _tile(V, d, a, lanes, rows, width, TILE)
        inside = (a + tl.arange(0, TILE) < width)[:, None]
        lo = tl.minimum(lo, tl.min(tl.where(inside, w, lo[None, :]), 0))
        hi = tl.maximum(hi, tl.max(tl.where(inside, w, hi[None, :]), 0))
        wd += tl.sum(w * of, 0)
        total += tl.sum(of)
    return lo, hi, wd, total


@triton.jit
def _moments(  # pragma: no cover - compiled
    V, d, s, z, lanes, rows, width, top, TILE: tl.constexpr, LANES: tl.constexpr
):
    """Weighted error of a grid on the group, and the moments its least-squares update needs."""
    error = tl.zeros((LANES,), tl.float32)
    qd = tl.zeros((LANES,), tl.float32)
    qqd = tl.zeros((LANES,), tl.float32)
    qwd = tl.zeros((LANES,), tl.float32)
    inverse = (1.0 / s)[None, :]
    for a in range(0, width, TILE):
        w, of = _tile(V, d, a, lanes, rows, width, TILE)
        q = _whole(w * inverse + z[None, :], top)
        e = s[None, :] * (q - z[None, :]) - w
        error += tl.sum(e * e * of, 0)
        qd += tl.sum(q * of, 0)
        qqd += tl.sum(q * q * of, 0)
        qwd += tl.sum(q * w * of, 0)
    return error, qd, qqd, qwd


@triton.jit
def _tile(V, d, a, lanes, rows, width, TILE: tl.constexpr):  # pragma: no cover - compiled
    """Weights of some inputs, and what each input counts: beyond the group nothing."""
    j = a + tl.arange(0, TILE)
    inside = (j < width)[:, None] & (lanes < rows)[None, :]
    w = tl.load(V + j[:, None] * rows + lanes[None, :], mask=inside, other=0.0)
    return w, tl.load(d + j, mask=j < width, other=0.0)[:, None]


@triton.jit
def _resolve(  # pragma: no cover - compiled
    qd, qqd, qwd, wd, total, s, z, top, splitter, GRID: tl.constexpr
):
    """Scale and zero that fit best the codes whose weighted moments are given (least squares)."""
    if GRID == 0:
        norm = qqd - 2.0 * z * qd + z * z * total
        known = norm > 0.0
        return tl.where(known, _stored((qwd - z * wd) / tl.where(known, norm, 1.0), splitter), s), z
    variance = qqd * total - qd * qd
    covariance = qwd * total - qd * wd
    known = (variance > 1e-12 * qqd * total) & (covariance > 0.0)
    s_next = _stored(covariance / tl.where(known, variance, 1.0), splitter)
    z_next = _zero((qd - wd / s_next) / total, s_next, top, GRID)
    return tl.where(known, s_next, s), tl.where(known, z_next, z)


@triton.jit
def _zero(z, s, top, GRID: tl.constexpr):  # pragma: no cover - compiled
    """The nearest zero to z that can be stored: a code, or what makes the value of code 0 a float16."""
    if GRID == 1:
        return _whole(z, top)
    least = -s * z
    c = 8193.0 * least  # Veltkamp's splitting to 11 digits
    tiny = (least * 16777216.0 + 12582912.0) - 12582912.0  # in units of 2^-24
    least = tl.where(tl.abs(least) < 0.0001220703125, tiny * 0.000000059604644775390625, c - (c - least))
    return -least / s


@triton.jit
def _stored(s, splitter):  # pragma: no cover - compiled
    """The nearest scale with so many significant binary digits that is not too small to store."""
    c = splitter * s  # Veltkamp's splitting
    least = tl.where(s < 0.0, -0.00000762939453125, 0.00000762939453125)
    return tl.where(tl.abs(s) < 0.00000762939453125, least, c - (c - s))


@triton.jit
def _whole(x, top):  # pragma: no cover - compiled
    """The nearest whole number from 0 to `top`, halves to the even one."""
    # So far out float32 has no fractions: adding and taking away 1.5 * 2^23 rounds.
    return (tl.minimum(tl.maximum(x, 0.0), top) + 12582912.0) - 12582912.0


@triton.jit
def _round(  # pragma: no cover - compiled
    N, W, V, scale, zero, codes, E, rows, n, top, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    """Quantize n inputs of one group, for `LANES` outputs; later inputs absorb the error of each."""
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = lanes < rows
    j = tl.arange(0, BLOCK)
    v = tl.load(V + j[:, None] * rows + lanes[None, :], mask=(j < n)[:, None] & there[None, :], other=0.0)
    s = tl.load(scale + lanes, mask=there, other=1.0)
    z = tl.load(zero + lanes, mask=there, other=0.0)
    for i in range(n):
        own = tl.sum(tl.where((j == i)[:, None], v, 0.0), 0)
        q = _whole(own * (1.0 / s) + z, top)
        left = own - s * (q - z)
        w = tl.load(W + i * rows + lanes, mask=there, other=0.0)
        tl.store(E + i * rows + lanes, w - s * (q - z), mask=there)
        tl.store(codes + i * rows + lanes, q.to(tl.uint8), mask=there)
        v -= tl.load(N + i * n + j, mask=j < n, other=0.0)[:, None] * left[None, :]


assert (SHRINK, HOPELESS, SMALLEST_SCALE) == (0.08, 1.5, 2.0**-17), "kernels hold these as literals"
assert (SYMMETRIC, INTEGER_ZEROS, FLOAT_ZEROS) == (0, 1, 2), "and these"
