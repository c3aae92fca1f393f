from __future__ import annotations

import sys

import pytest
import torch

from oracles.gptq import gptq_slow
from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.linalg import Gram, feedback_factor
from pocketsize.quantization import gptq as gptq_module
from pocketsize.quantization.gptq import gptq, group_order, sweep
from pocketsize.quantization.rows import CHUNK
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme

GRIDS = {
    "symmetric": {"symmetric": True},
    "integer zeros": {"symmetric": False},
    "float zeros": {"symmetric": False, "float_zeros": True},
}


def layer(
    rows: int = 24, columns: int = 256, tokens: int = 2048, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Gram matrix of correlated inputs with a few loud channels."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    X = torch.randn(tokens, columns, generator=g) @ mix
    X[:, ::17] *= 6
    return torch.randn(rows, columns, generator=g) * 0.05, X.T @ X / tokens


def loss(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> float:
    E = (W - Q).double()
    return float(((E @ H.double()) * E).sum())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (2, 128), (4, 96), (8, 256), (5, None)])
def test_equals_the_slow_version(bits: int, group: int | None, grid: dict[str, bool]) -> None:
    columns = 288 if group == 96 else 256
    W, H = layer(columns=columns)
    scheme = Scheme(bits, group, **grid)
    done = gptq(W, H, scheme)
    codes, Q = gptq_slow(W, H, scheme)
    # The blocked update adds the same numbers in another order: a weight that lies on the edge
    # between two codes may fall on the other side, after which the rest of its row differs.
    rows = (done.weight.codes.float() == codes).all(dim=1)
    assert float(rows.float().mean()) >= 0.9
    assert torch.allclose(done.weight.dequantize()[rows], Q[rows], atol=1e-6)
    assert loss(W, done.weight.dequantize(), H) == pytest.approx(loss(W, Q, H), rel=0.02)


def test_order_and_search_off_equal_the_slow_version_too() -> None:
    W, H = layer()
    done = gptq(W, H, Scheme(4, 64), order=False, search=False)
    codes, _ = gptq_slow(W, H, Scheme(4, 64), order=False, search=False)
    assert float((done.weight.codes == codes).all(dim=1).float().mean()) >= 0.9


def test_identity_gram_means_round_to_nearest() -> None:
    W, _ = layer()
    done = gptq(W, torch.eye(256), Scheme(4, 64))
    flat = rtn(W, Scheme(4, 64), weight=torch.ones(256))
    assert torch.equal(done.weight.codes, flat.codes) and torch.equal(done.weight.scale, flat.scale)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_output_error_is_well_below_round_to_nearest(bits: int) -> None:
    W, H = layer()
    scheme = Scheme(bits, 64)
    ours = loss(W, gptq(W, H, scheme).weight.dequantize(), H)
    assert ours <= 0.6 * loss(W, rtn(W, scheme).dequantize(), H)
    assert ours <= 0.9 * loss(W, gptq(W, H, scheme, search=False).weight.dequantize(), H)


def test_wrong_statistics_are_noticed() -> None:
    """A negative control: with another layer's Gram matrix the result is worse."""
    W, H = layer()
    _, other = layer(seed=9)
    right = loss(W, gptq(W, H, Scheme(3, 64)).weight.dequantize(), H)
    assert loss(W, gptq(W, other, Scheme(3, 64)).weight.dequantize(), H) > 1.2 * right


def test_without_triton_a_gpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pocketsize.quantization.gpu", raising=False)
    monkeypatch.delattr("pocketsize.quantization.gpu", raising=False)
    with pytest.raises(UnsupportedError, match=r"needs Triton .*pocketsize\[gpu\].*POCKETSIZE_DEVICE=cpu"):
        gptq_module._gpu_sweep()


def test_groups_help() -> None:
    """In a fixed order of columns; one group for a whole row is also free to order all of them."""
    W, H = layer()
    errors = [
        loss(W, gptq(W, H, Scheme(3, g), order=False).weight.dequantize(), H) for g in (32, 64, 128, None)
    ]
    assert errors == sorted(errors)


def test_rows_permute_and_inputs_stay_untouched() -> None:
    W, H = layer()
    before = W.clone(), H.clone()
    a, b = gptq(W, H, Scheme(4, 64)), gptq(W.flip(0), H, Scheme(4, 64))
    assert torch.equal(a.weight.codes.flip(0), b.weight.codes)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


def test_threads_do_not_change_the_answer() -> None:
    W, H = layer(rows=2 * CHUNK + 31)
    factor, threads = feedback_factor(H, 0.01), torch.get_num_threads()
    found: list[tuple[torch.Tensor, ...]] = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(sweep(W.T.contiguous(), factor, Scheme(4, 64), search=True))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_dead_inputs_are_zeroed_and_counted() -> None:
    W, H = layer()
    H[5, :] = H[:, 5] = 0
    done = gptq(W, H, Scheme(4, 64))
    assert done.dead == 1
    assert bool((done.weight.dequantize()[:, 5].abs() < 1e-6).all())


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(4, 32, float_zeros=True), NAMED["Q4_K"], NAMED["NF4"]]
)
@pytest.mark.parametrize("share", [50, 2])
def test_the_unit_of_inputs_changes_nothing_where_some_are_dead(scheme: Scheme, share: int) -> None:
    W, H = layer()
    H[::share, :] = H[:, ::share] = 0
    done, small = gptq(W, H, scheme), gptq(W, H * 2.0**-20, scheme)
    assert torch.equal(done.weight.codes, small.weight.codes)
    assert torch.equal(done.weight.scale, small.weight.scale)
    rounded = rtn(W, scheme, weight=H.diagonal())
    assert loss(W, done.weight.dequantize(), H) < loss(W, rounded.dequantize(), H)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 64, float_zeros=True)])
def test_dead_inputs_equal_the_slow_version_too(scheme: Scheme) -> None:
    W, H = layer()
    H[::50, :] = H[:, ::50] = 0
    done, (codes, Q) = gptq(W, H, scheme), gptq_slow(W, H, scheme)
    rows = (done.weight.codes.float() == codes).all(dim=1)
    assert float(rows.float().mean()) >= 0.9
    assert torch.allclose(done.weight.dequantize()[rows], Q[rows], atol=1e-6)


@pytest.mark.parametrize(
    "scheme",
    [*(NAMED[n] for n in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "NVFP4")), Scheme(4, 32)],
)
@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_whole_groups_of_dead_inputs_are_quantized(scheme: Scheme, quantizer: str) -> None:
    W, H = layer(columns=512)
    H[:256, :] = H[:, :256] = 0
    H[300:400, :] = H[:, 300:400] = 0
    weight = gptq(W, H, scheme).weight if quantizer == "gptq" else rtn(W, scheme, weight=H.diagonal())
    Q = weight.dequantize()
    assert bool(torch.isfinite(Q).all())
    assert loss(W, Q, H) < (0.3 if scheme.bits == 2 else 0.1) * loss(W, torch.zeros_like(W), H)


def test_group_order_keeps_groups_whole() -> None:
    perm = group_order(torch.rand(256, generator=torch.Generator().manual_seed(0)), 64)
    assert sorted(perm.tolist()) == list(range(256))
    assert all(len(set((perm[i : i + 64] // 64).tolist())) == 1 for i in range(0, 256, 64))


def test_the_factor_is_what_it_says() -> None:
    _, H = layer(columns=64)
    factor = feedback_factor(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(64)
    assert torch.allclose(factor.M * factor.d @ factor.M.T, damped, rtol=1e-4, atol=1e-4)
    assert torch.equal(factor.M, factor.M.triu()) and torch.allclose(factor.M.diagonal(), torch.ones(64))
    assert factor.escalations == 0


def test_what_a_column_costs_is_what_the_paper_says() -> None:
    _, H = layer(columns=64)
    damped = H.double() + 0.01 * H.diagonal().mean() * torch.eye(64)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(feedback_factor(H, 0.01).d.double(), 1 / U.diagonal() ** 2, rtol=1e-4)


def test_damping_escalates_and_is_counted() -> None:
    H = torch.eye(32)
    H[0, 0] = -0.05  # not positive definite until the damping exceeds 5 %
    factor = feedback_factor(H, 0.01)
    assert factor.escalations == 2 and factor.damp == pytest.approx(0.09)
    with pytest.raises(NumericalError, match="not positive definite"):
        feedback_factor(-torch.eye(8), 0.01)


def test_gram_adds_up_and_skips_padding() -> None:
    X = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, 5:] = False
    whole, parts = Gram.zeros(16), Gram.zeros(16)
    whole.update(X, mask)
    parts.update(X[:2], mask[:2])
    parts.update(X[2:])
    rows = X[mask]
    assert whole.tokens == parts.tokens == 29
    assert torch.allclose(whole.mean(), rows.T @ rows / 29, atol=1e-5)
    wide = torch.randn(64, 521, generator=torch.Generator().manual_seed(1))
    panels = Gram.zeros(521)
    panels.update(wide)
    assert torch.allclose(panels.mean(), wide.T @ wide / 64, atol=1e-5)
    with pytest.raises(NumericalError, match="no calibration token"):
        Gram.zeros(4).mean()
