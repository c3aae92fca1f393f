"""Weights as float8: nearest values, scales within an octave, GPTQ's sweep over them."""

from __future__ import annotations

import pytest
import torch

from oracles.activations import FLOATS
from oracles.gptq import floats_slow
from pocketsize.errors import UsageError
from pocketsize.quantization.floats import fit_floats, round_floats
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme

FP8 = NAMED["FP8"]
GROUPED = Scheme(8, 32, symmetric=True, floats=True)


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with outliers and a row of zeros, and what it reads."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(20, 96, generator=g) * 0.05
    W[:, ::17] *= 12
    W[3] = 0
    X = torch.randn(400, 96, generator=g) @ torch.randn(96, 96, generator=g)
    return W, X.T @ X / 400


def test_every_weight_is_the_nearest_of_all_values() -> None:
    W, _ = layer()
    q = round_floats(W, FP8)
    values = torch.tensor(FLOATS)
    away = (W[..., None].double() - q.scale[..., None].double() * values).abs().amin(-1)
    assert torch.allclose((W.double() - q.dequantize()).abs(), away, rtol=0, atol=1e-9)
    assert not bool(q.codes.view(torch.float8_e4m3fn).float().isnan().any())
    assert torch.equal(q.scale, q.scale.bfloat16().float()) and not bool(q.zero.any())
    assert FP8.bits_per_weight(96) == 8 + 16 / 96


@pytest.mark.parametrize("scheme", [FP8, GROUPED], ids=["row", "group"])
def test_searched_scales_lose_no_more(scheme: Scheme) -> None:
    W, H = layer()
    d, before = H.diagonal(), W.clone()
    plain, found = (rtn(W, scheme, weight=weight).dequantize() for weight in (None, d))
    own = [(d * (Q - W).square()).sum(1) for Q in (found, plain)]
    assert bool((own[0] <= own[1] * (1 + 1e-6)).all()) and float(own[0].sum()) < 0.97 * float(own[1].sum())
    assert torch.equal(W, before)
    assert bool((fit_floats(W, scheme, d) >= fit_floats(W, scheme)).all())


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("scheme", [FP8, GROUPED], ids=["row", "group"])
def test_feedback_equals_column_by_column(scheme: Scheme, search: bool) -> None:
    W, H = layer()
    H[5], H[:, 5] = 0, 0
    before = W.clone(), H.clone()
    done = gptq(W, H, scheme, search=search)
    codes, Q = floats_slow(W, H, scheme, search=search)
    same = done.weight.codes == codes
    assert float(same.float().mean()) > 0.995  # sums in another order: a tie may fall to the other side
    assert torch.allclose(done.weight.dequantize()[same], Q[same]) and done.dead == 1
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


def test_feedback_loses_less_than_rounding_to_nearest() -> None:
    W, H = layer()
    errors = []
    for q in (gptq(W, H, FP8).weight, rtn(W, FP8, weight=H.diagonal())):
        E = W - q.dequantize()
        errors.append(float(((E @ H) * E).sum()))
    assert errors[0] < 0.6 * errors[1]


def test_rows_that_are_divided_by_powers_of_two_stay_exact() -> None:
    q = rtn(layer()[0], FP8)
    assert torch.equal(q.divided(q.most).dequantize() * q.most[:, None], q.dequantize())


def test_floats_have_eight_bits_and_no_zeros() -> None:
    with pytest.raises(UsageError, match="8 bits and no zeros"):
        Scheme(4, 32, symmetric=True, floats=True)
    with pytest.raises(UsageError, match="8 bits and no zeros"):
        Scheme(8, 32, floats=True)
    with pytest.raises(UsageError, match="one scale a row"):
        Scheme(8, 32, symmetric=True, activations=True)
