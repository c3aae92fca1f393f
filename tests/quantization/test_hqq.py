from __future__ import annotations

import pytest
import torch

from oracles.hqq import hqq_slow, loss_of
from pocketsize.quantization.hqq import hqq
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme


def weights(rows: int = 6, columns: int = 128, seed: int = 0) -> torch.Tensor:
    """Heavy tails, as weights have them."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g) * 0.05
    W[:, ::23] *= 5
    return W


def losses(W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The p-norm of each group."""
    groups = W.view(*scale.shape, -1)
    return torch.tensor(
        [
            [loss_of(groups[r, k], float(scale[r, k]), float(zero[r, k]), scheme, 0.7) for k in range(n)]
            for r, n in enumerate([scale.shape[1]] * len(W))
        ]
    )


@pytest.mark.parametrize("float_zeros", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (5, 32), (4, 64), (3, None), (2, 32)])
def test_equals_the_slow_version(bits: int, group: int | None, float_zeros: bool) -> None:
    W, scheme = weights(), Scheme(bits, group, float_zeros=float_zeros)
    found, (scale, zero) = hqq(W, scheme), hqq_slow(W, scheme)
    assert torch.equal(found.scale, scale)
    ours, theirs = losses(W, found.scale, found.zero, scheme), losses(W, scale, zero, scheme)
    # A weight on the edge between two codes may fall on either side, and the zero with it.
    assert float(((ours - theirs).abs() <= 1e-3 * theirs).float().mean()) >= 0.9
    assert float(ours.sum()) == pytest.approx(float(theirs.sum()), rel=0.01)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_no_group_ends_worse_than_its_range_and_most_end_better(bits: int) -> None:
    W, scheme = weights(seed=1), Scheme(bits, 64, float_zeros=True)
    found, plain = hqq(W, scheme), rtn(W, scheme)
    ours = losses(W, found.scale, found.zero, scheme)
    before = losses(W, plain.scale, plain.zero, scheme)
    assert bool((ours <= before * (1 + 1e-5)).all())
    assert float((ours < 0.98 * before).float().mean()) > 0.5


def test_the_unit_of_the_weights_does_not_matter() -> None:
    W, scheme = weights(), Scheme(4, 64)
    assert torch.equal(hqq(W, scheme).codes, hqq(W * 8, scheme).codes)


def test_weights_stay_untouched_and_constant_groups_finite() -> None:
    W = weights()
    W[0] = 0.0
    W[1] = 3.5
    before = W.clone()
    Q = hqq(W, Scheme(4, 64)).dequantize()
    assert torch.equal(W, before) and bool(torch.isfinite(Q).all())
    assert torch.equal(Q[0], W[0]) and torch.allclose(Q[1], W[1], rtol=0.01)
