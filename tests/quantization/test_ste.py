"""Straight-through ternary weights: exact forward, the plain gradient backward, and a toy that learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oracles.ste import on_grid_slowly
from pocketsize.quantization.learned import places_of, still
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme
from pocketsize.quantization.ste import on_grid, rescaled, settled, ternarised, ternary


def matrix(rows: int = 16, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("name", ["TERNARY", "TQ2_0", "TQ1_0"])
def test_forward_is_what_is_stored(name: str) -> None:
    W, scheme = matrix(), NAMED[name]
    Q = ternary(W, scheme)
    assert torch.equal(Q, ternarised(W, scheme).dequantize())
    assert torch.allclose(Q, rtn(W, scheme).dequantize(), rtol=2**-7)
    groups = Q.view(len(W), -1, scheme.width(256))
    assert all(len(group.unique()) == 3 for group in groups.flatten(0, 1))


def test_backward_is_the_gradient_of_a_linear_whose_weight_is_the_ternary_one() -> None:
    W, X = matrix().requires_grad_(), torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    (X @ ternary(W).T).square().sum().backward()
    Q = ternary(W.detach()).requires_grad_()
    (X @ Q.T).square().sum().backward()
    assert W.grad is not None and torch.equal(W.grad, Q.grad)  # type: ignore[arg-type]


def test_a_ternary_layer_learns_what_a_ternary_layer_gives() -> None:
    g, steps = torch.Generator().manual_seed(2), 200
    X, teacher = torch.randn(256, 32, generator=g), ternary(torch.randn(8, 32, generator=g))
    wanted = X @ teacher.T
    W = torch.randn(8, 32, generator=g).requires_grad_()
    optimizer = torch.optim.Adam([W])
    before = float((X @ ternary(W.detach()).T - wanted).square().mean())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        loss = (X @ ternary(W).T - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((X @ ternary(W.detach()).T - wanted).square().mean()) < 0.05 * before


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="NF4 is no ternary scheme"):
        ternary(matrix(), NAMED["NF4"])


GRIDS = {
    "integer zeros": Scheme(2, 32),
    "symmetric": Scheme(3, 32, symmetric=True),
    "float zeros": Scheme(2, 32, float_zeros=True),
    "NF4": NAMED["NF4"],
    "TERNARY": NAMED["TERNARY"],
    "Q2_K": NAMED["Q2_K"],
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_starts_from_the_codes_of_any_solver(grid: str) -> None:
    W = matrix()
    start = rtn(W, GRIDS[grid])
    codes = (start.codes.int() + 1).clamp(0, start.scheme.top).to(torch.uint8)  # no nearest codes
    other = replace(start, codes=codes)
    place, moved = places_of(W, other), still(other)
    assert torch.equal(settled(place, moved, other).codes, codes)
    assert torch.equal(on_grid(place, moved, other), other.dequantize())


@pytest.mark.parametrize("grid", ["integer zeros", "symmetric", "float zeros"])
def test_the_slope_is_that_of_lsq(grid: str) -> None:
    """Against a graph in which only the roundings are passed straight."""
    W, g = matrix(), torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    start = rtn(W, GRIDS[grid])
    place = places_of(W, start) * 1.3 - 0.2  # some beyond the ends
    place.requires_grad_()
    moved = [(0.1 * torch.ones_like(m)).requires_grad_() for m in still(start)]
    (on_grid(place, moved, start) * g).sum().backward()
    found = [place.grad, *(m.grad for m in moved)]
    place.grad = None
    for m in moved:
        m.grad = None
    slow = on_grid_slowly(place, moved, start)
    assert torch.allclose(slow, on_grid(place, moved, start), atol=1e-6)
    (slow * g).sum().backward()
    for mine, theirs in zip(found, [place.grad, *(m.grad for m in moved)], strict=True):
        assert mine is not None and theirs is not None
        assert torch.allclose(mine, theirs, rtol=2e-2, atol=1e-5)


def test_places_beyond_the_ends_learn_nothing() -> None:
    W = matrix()
    start = rtn(W, Scheme(2, 32))
    place = torch.full((16, 8, 32), 3.6).requires_grad_()
    on_grid(place, [], start).sum().backward()
    assert place.grad is not None and not place.grad.any()


@pytest.mark.parametrize("grid", ["integer zeros", "symmetric", "float zeros", "NF4"])
def test_scales_learn_alone_as_beside_codes(grid: str) -> None:
    W, g = matrix(), torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    start = rtn(W, GRIDS[grid])
    place, top = start.codes.to(torch.float32).view(*start.scale.shape, -1), start.scheme.top
    beside = [(0.3 * torch.ones_like(m)).requires_grad_() for m in still(start)]
    alone = [(m.detach() * top).requires_grad_() for m in beside]
    Q = rescaled(alone, start)
    assert torch.equal(Q, settled(None, [m.detach() for m in alone], start).dequantize())
    assert torch.allclose(Q, on_grid(place, beside, start)) and not torch.equal(Q, start.dequantize())
    for moved, matrix_ in ((alone, Q), (beside, on_grid(place, beside, start))):
        (matrix_ * g).sum().backward()
        assert all(m.grad is not None and bool(m.grad.any()) for m in moved)
    for mine, theirs in zip(alone, beside, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.allclose(mine.grad * top, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(4, 32), Scheme(8, 32)], ids=lambda s: f"{s.bits}")
def test_a_step_moves_the_outermost_value_by_as_many_codes_in_every_grid(scheme: Scheme) -> None:
    start = rtn(matrix(), scheme)
    far = torch.where(start.zero > scheme.top / 2, start.zero, scheme.top - start.zero)
    moved = [torch.ones_like(start.scale)]
    grown = settled(None, moved, start).scale - start.scale
    assert float((grown / start.scale * far).abs().max()) < 0.11
