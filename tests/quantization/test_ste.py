"""Straight-through ternary weights: exact forward, the plain gradient backward, and a toy that learns."""

from __future__ import annotations

import pytest
import torch

from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED
from pocketsize.quantization.ste import ternarised, ternary


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
