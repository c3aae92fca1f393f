"""Super-blocks: the search among multiples, the sweep, and what a matrix is stored as."""

from __future__ import annotations

import pytest
import torch

from oracles.superblocks import error_of, gptq_slow, grid_within, units_of
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.quantization.awq import scaled_loss
from pocketsize.quantization.gptq import _require_gpu_grid, gptq, group_order
from pocketsize.quantization.grid import QWeight, multiples
from pocketsize.quantization.learned import Learned
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme

KINDS = {name: scheme for name, scheme in NAMED.items() if scheme.super_blocks}
each = pytest.mark.parametrize("scheme", KINDS.values(), ids=KINDS.keys())


def layer(rows: int = 6, columns: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of groups of unlike size, and the Gram matrix of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(2048, columns, generator=g)
    X = X @ (torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns))
    X[:, ::17] *= 4
    sizes = torch.exp2(torch.rand(rows, columns // 16, generator=g) * 3).repeat_interleave(16, 1)
    return torch.randn(rows, columns, generator=g) * 0.02 * sizes, X.T @ X / 2048


def loss(W: torch.Tensor, q: QWeight, H: torch.Tensor) -> float:
    E = (W - q.dequantize()).double()
    return float(((E @ H.double()) * E).sum())


@pytest.mark.parametrize(
    ("name", "bits"), [("Q2_K", 2.625), ("Q3_K", 3.4375), ("Q4_K", 4.5), ("Q5_K", 5.5), ("Q6_K", 6.5625)]
)
def test_bits_per_weight_are_those_of_the_format(name: str, bits: float) -> None:
    assert NAMED[name].bits_per_weight(512) == bits


@each
def test_the_search_equals_the_slow_one(scheme: Scheme) -> None:
    W, H = layer(rows=3)
    d = H.diagonal()
    q = rtn(W, scheme, weight=d)
    E = d * (W - q.dequantize()) ** 2
    slow = torch.zeros(3, 2)
    for row in range(3):
        for block in range(2):
            at = slice(256 * block, 256 * block + 256)
            units = units_of(W[row, at], d[at], scheme)
            for a in range(at.start, at.stop, scheme.group):
                w, own = W[row, a : a + scheme.group], d[a : a + scheme.group]
                slow[row, block] += error_of(w, own, *grid_within(w, own, scheme, units), scheme.top)[0]
    # Where two grids are as good as each other the last digit decides from which the search goes on.
    assert torch.allclose(E.view(3, 2, 256).sum(-1), slow, rtol=0.05, atol=0)
    assert float(E.sum()) == pytest.approx(float(slow.sum()), rel=0.01)


@each
def test_the_sweep_equals_the_slow_one(scheme: Scheme) -> None:
    W, H = layer()
    done = gptq(W, H, scheme).weight
    codes, Q = gptq_slow(W, H, scheme)
    rows = (done.codes.float() == codes).all(dim=1)
    assert float(rows.float().mean()) >= 0.5
    assert torch.allclose(done.dequantize()[rows], Q[rows], atol=1e-6)
    slow = float((((W - Q).double() @ H.double()) * (W - Q).double()).sum())
    assert loss(W, done, H) == pytest.approx(slow, rel=0.03)


@each
def test_scales_are_multiples_of_a_float16_exactly(scheme: Scheme) -> None:
    W, H = layer(rows=40)
    W[0], W[1], W[2, :256], W[3] = 0, 0.25, -1e-7, W[3] * 1e-5
    for q in (gptq(W, H, scheme).weight, rtn(W, scheme)):
        for (unit, count), values in zip(multiples(q), (q.scale, -q.minimum), strict=False):
            assert torch.equal(unit, unit.half().float())
            assert int(count.abs().max()) <= scheme.top_scale
            per = count.shape[1] // unit.shape[1]
            assert torch.equal(unit.repeat_interleave(per, 1) * count, values)
        assert bool(q.dequantize().isfinite().all()) and bool((q.dequantize()[0] == 0).all())
    assert float((rtn(W, scheme).dequantize()[1] - 0.25).abs().max()) < 0.01


@each
def test_error_feedback_and_search_lower_the_error(scheme: Scheme) -> None:
    W, H = layer(rows=32)
    swept, searched, plain = gptq(W, H, scheme).weight, rtn(W, scheme, weight=H.diagonal()), rtn(W, scheme)
    assert loss(W, swept, H) < 0.9 * loss(W, searched, H)
    assert loss(W, searched, H) < loss(W, plain, H)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_weights_that_lie_on_a_grid_of_sixteen_are_found_again(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 16, 32), generator=g).float()
    codes[..., 0], codes[..., 1] = 0, 15
    W = (0.01 * (codes - 7.5)).view(8, 512)
    q = rtn(W, KINDS[name], weight=torch.ones(512))
    assert float((q.dequantize() - W).abs().max()) < 0.001


@each
def test_outputs_can_be_divided_as_far_as_is_said(scheme: Scheme) -> None:
    W, H = layer()
    q = rtn(W, scheme, weight=H.diagonal())
    least = q.divided(q.most)
    assert torch.equal(least.dequantize() * q.most[:, None], q.dequantize())
    for (unit, count), (before, same) in zip(multiples(least), multiples(q), strict=True):
        assert torch.equal(unit * q.most[:, None], before) and torch.equal(count, same)


def test_rows_are_independent_of_how_many_there_are() -> None:
    W, H = layer(rows=300)
    whole, some = gptq(W, H, KINDS["Q4_K"]).weight, gptq(W[256:], H, KINDS["Q4_K"]).weight
    assert torch.equal(whole.codes[256:], some.codes) and torch.equal(whole.scale[256:], some.scale)


def test_order_parts_no_super_block() -> None:
    activity = torch.rand(1024, generator=torch.Generator().manual_seed(0))
    order = group_order(activity, 32, 256)
    blocks, groups = order.view(4, 256) // 256, order.view(32, 32) // 32
    assert bool((blocks == blocks[:, :1]).all()) and bool((groups == groups[:, :1]).all())
    assert torch.equal(order.sort().values, torch.arange(1024))
    inside = activity[order].view(4, 8, 32)
    assert bool((inside.diff(dim=-1) <= 0).all())
    assert bool((inside.amax(-1).diff(dim=-1) <= 0).all())
    assert bool((inside.amax((-1, -2)).diff() <= 0).all())
    assert torch.equal(group_order(activity, 32), group_order(activity, 32, 32))


@each
def test_codes_are_learned_and_scales_stay(scheme: Scheme) -> None:
    W, H = layer()
    q = rtn(W, scheme)
    learned = Learned(W, q)
    for step in range(60):
        learned.update(2 * (learned.weight().dequantize() - W) @ H, step, 60)
    after = learned.weight()
    assert torch.equal(after.scale, q.scale) and torch.equal(after.zero, q.zero)
    assert not torch.equal(after.codes, q.codes)
    assert loss(W, after, H) < loss(W, q, H)


def test_awq_can_judge_scales_on_super_blocks() -> None:
    W, H = layer()
    assert scaled_loss(W, H, torch.ones(512), KINDS["Q4_K"]) > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 7, "group": 16, "symmetric": True, "scale_bits": 6}, "7-bit codes"),
        ({"bits": 4, "group": 32, "symmetric": True, "scale_bits": 5}, "5-bit scales"),
        ({"bits": 4, "group": 96, "float_zeros": True, "scale_bits": 6}, "divides 256"),
        ({"bits": 4, "group": 32, "scale_bits": 6}, "no zeros or float ones"),
        ({"bits": 6, "group": 32}, "bits must be one of"),
    ],
)
def test_super_blocks_that_no_format_has_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Scheme(**options)  # type: ignore[arg-type]


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="super-blocks of 256 do not divide a row of 576"):
        KINDS["Q4_K"].width(576)


def test_a_gpu_refuses_and_says_what_to_do() -> None:
    with pytest.raises(UnsupportedError, match="POCKETSIZE_DEVICE=cpu"):
        _require_gpu_grid(KINDS["Q4_K"])


def test_scales_that_share_nothing_are_refused() -> None:
    q = rtn(layer()[0], KINDS["Q4_K"])
    with pytest.raises(UnsupportedError, match="no multiples"):
        multiples(QWeight(q.codes, q.scale * torch.rand(q.scale.shape), q.zero, q.scheme))
