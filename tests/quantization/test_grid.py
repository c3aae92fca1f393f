from __future__ import annotations

import pytest
import torch

from oracles.grid import best_grid, error_of, stored
from pocketsize.quantization.grid import fit_grid, snap
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import BITS, Scheme


def weights(rows: int = 6, columns: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g) * 0.05
    W[0, 3] = 0.9  # an outlier
    return W, torch.rand(columns, generator=g) ** 3 * 10 + 1e-3


GRIDS = {
    "symmetric": {"symmetric": True},
    "integer zeros": {"symmetric": False},
    "float zeros": {"symmetric": False, "float_zeros": True},
}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


@each_grid
@pytest.mark.parametrize("bits", BITS)
def test_search_reaches_the_error_of_the_slow_search(bits: int, grid: dict[str, bool]) -> None:
    W, d = weights()
    scheme = Scheme(bits, 32, **grid)
    scale, zero = fit_grid(W, scheme, d)
    for r in range(W.shape[0]):
        for k in range(2):
            part = slice(32 * k, 32 * k + 32)
            reached, _ = error_of(W[r, part], d[part], float(scale[r, k]), float(zero[r, k]), scheme.top)
            assert reached <= best_grid(W[r, part], d[part], scheme) * (1 + 2e-3)


def test_plain_rounding_spans_the_range() -> None:
    W, _ = weights()
    scale, zero = fit_grid(W, Scheme(4, 32))
    w = W.view(6, 2, 32)
    lo, hi = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    expected = torch.tensor([[stored(float(x), 8) for x in row] for row in (hi - lo) / 15])
    assert torch.equal(scale, expected)
    assert torch.equal(zero, (-lo / scale).round())


@each_grid
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_search_is_never_worse_than_the_range(bits: int, grid: dict[str, bool]) -> None:
    W, d = weights(seed=3)
    scheme = Scheme(bits, 32, **grid)

    def loss(q: torch.Tensor) -> torch.Tensor:
        return ((q - W) ** 2 * d).view(6, 2, 32).sum(-1)

    assert bool(
        (loss(rtn(W, scheme, weight=d).dequantize()) <= loss(rtn(W, scheme).dequantize()) * (1 + 1e-5)).all()
    )


def test_rows_are_independent_and_inputs_untouched() -> None:
    W, d = weights()
    before = W.clone(), d.clone()
    scale, zero = fit_grid(W, Scheme(3, 32), d)
    flipped = fit_grid(W.flip(0), Scheme(3, 32), d)
    assert torch.equal(flipped[0], scale.flip(0)) and torch.equal(flipped[1], zero.flip(0))
    assert torch.equal(W, before[0]) and torch.equal(d, before[1])


@pytest.mark.parametrize("factor", [2.0, 0.25])
def test_scaling_the_weights_scales_the_grid(factor: float) -> None:
    W, d = weights()
    a, b = rtn(W, Scheme(4, 32), weight=d), rtn(W * factor, Scheme(4, 32), weight=d)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale * factor, b.scale)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.5, -3.5])
@each_grid
def test_constant_groups_stay_finite_and_close(value: float, grid: dict[str, bool]) -> None:
    W = torch.full((2, 32), value)
    out = rtn(W, Scheme(4, 32, **grid), weight=torch.ones(32)).dequantize()
    assert bool(torch.isfinite(out).all())
    assert torch.allclose(out, W, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("weight", [None, torch.ones(64)], ids=["range", "searched"])
@pytest.mark.parametrize("size", [1e-6, 0.05, 30.0])
def test_a_float_zero_puts_code_0_on_a_float16(size: float, weight: torch.Tensor | None) -> None:
    W = weights()[0] * size / 0.05
    q = rtn(W, Scheme(4, 32, float_zeros=True), weight=weight)
    assert torch.equal(q.minimum, q.minimum.half().float())
    assert torch.allclose(q.minimum, -q.scale * q.zero, rtol=1e-6)
    of_code_0 = q.dequantize()[q.codes == 0]
    assert set(of_code_0.tolist()) <= set(q.minimum.flatten().tolist())


def test_float_zeros_are_free_to_leave_the_codes_and_lose_less() -> None:
    W, d = weights()
    W[1] = W[1].abs() + 0.5  # all on one side of zero
    losses = [
        ((rtn(W, Scheme(3, 32, float_zeros=free), weight=d).dequantize() - W) ** 2 * d).view(6, 2, 32).sum(-1)
        for free in (True, False)
    ]
    assert float(losses[0][2:].sum()) < 0.9 * float(losses[1][2:].sum())
    assert float(losses[0][1].sum()) < 0.3 * float(losses[1][1].sum())


@pytest.mark.parametrize("digits", [6, 7, 8])
def test_scales_are_stored_exactly(digits: int) -> None:
    W, d = weights()
    q = rtn(W, Scheme(4, 32, False, digits), weight=d)
    assert torch.equal(q.scale, q.scale.bfloat16().float()) and torch.equal(q.scale, q.scale.half().float())
    if digits == 7:  # 11 - 4: the minimum of a Q4_1 block is then exact too
        product = q.scale * q.zero
        assert torch.equal(product, product.half().float())


def test_codes_are_the_nearest() -> None:
    W, d = weights()
    scale, zero = fit_grid(W, Scheme(4, 32), d)
    codes = snap(W, scale, zero, 15).view(6, 2, 32).float()
    grid = scale[..., None, None] * (torch.arange(16.0) - zero[..., None, None])
    distance = (W.view(6, 2, 32, 1) - grid).abs()
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    assert torch.allclose(chosen, distance.amin(-1), atol=1e-6)
