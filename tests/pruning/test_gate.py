from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles.gate import (
    agreed_level_slow,
    budget_level_slow,
    gated_mlp_slow,
    gated_product_slow,
    leaves_slow,
    saving_level_slow,
)
from pocketsize.errors import UsageError
from pocketsize.pruning.gate import (
    FACTOR,
    Gates,
    Tally,
    agreed_level,
    budget_level,
    confidence_of,
    exits_at,
    fit_factor,
    fit_line,
    fit_map,
    line,
    mapped,
    quantile_threshold,
    saving_level,
    sensitivity,
    thresholds,
    token_factor,
)
from pocketsize.pruning.gate_loops import gated_channels, gated_rows


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("budget", [0.0, 1.0, 7.5, 20.0, 34.9, 35.0, 40.0])
def test_the_level_of_a_budget_equals_its_oracle(budget: float) -> None:
    scores = [some(4, 5).square(), some(9, seed=1).square(), 3 * some(11, seed=2).square()]
    prices = [10.0, 5.0, 20.0]
    found, wanted = budget_level(scores, prices, budget), budget_level_slow(scores, prices, budget)
    assert found == pytest.approx(wanted)


def test_one_level_saves_at_less_cost_than_the_same_share_everywhere() -> None:
    scores, prices = [some(500, seed=i).square() * 10.0**i for i in range(3)], [1.0, 1.0, 1.0]
    level = budget_level(scores, prices, 1.5)
    cost = sum(float(s[s <= level].sum()) for s in scores)
    uniform = [s[s <= quantile_threshold(s, 0.5)] for s in scores]
    assert sum(len(s) for s in uniform) == sum(int((s <= level).sum()) for s in scores)
    assert cost < 0.5 * sum(float(s.sum()) for s in uniform)


def test_a_quantile_threshold_leaves_out_its_share() -> None:
    scores = some(200).abs()
    for share in (0.0, 0.25, 0.5, 1.0):
        assert int((scores <= quantile_threshold(scores, share)).sum()) == round(200 * share)


def test_thresholds_are_where_the_cost_of_an_operation_is_the_level() -> None:
    weights, x = torch.tensor([0.5, 2.0, 0.0]), some(50, 3)
    t = thresholds(weights, 0.3, 4.0)
    assert torch.equal(x.abs() <= t, weights * x.square() / 4.0 <= 0.3)
    assert t[2] == math.inf


def test_sensitivity_is_half_the_mean_squared_slope() -> None:
    x, slopes = some(30, 4), some(30, 4, seed=1)
    x[:, 2] = 0
    wanted = [0.5 * sum(float(g) ** 2 for g in slopes[:, i]) / 30 for i in range(4)]
    wanted[2] = 0.0
    assert sensitivity(x, slopes).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("wished", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_the_level_of_an_agreement_equals_its_oracle(wished: float) -> None:
    confidence = some(3, 60).sigmoid()
    agrees = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)) < confidence
    assert agreed_level(confidence, agrees, wished) == agreed_level_slow(confidence, agrees, wished)


@pytest.mark.parametrize("wished", [-1.0, 0.5, 3.0, 5.0, 100.0])
@pytest.mark.parametrize("reads", [0.0, 0.7])
def test_the_level_of_a_saving_equals_its_oracle(wished: float, reads: float) -> None:
    confidence, saves, asks = some(3, 50).sigmoid(), [9.0, 6.0, 3.0], [0.1, 0.1, 0.2]
    found = saving_level(confidence, torch.tensor(saves), torch.tensor(asks), reads, wished)
    assert found == saving_level_slow(confidence, saves, asks, reads, wished - 1e-7)


def test_a_token_leaves_once_at_the_first_exit_that_is_sure() -> None:
    confidence = some(4, 40)
    found = exits_at(confidence, 0.4)
    for t, e in enumerate(leaves_slow(confidence, 0.4)):
        assert found[:, t].nonzero().flatten().tolist() == ([] if e is None else [e])


def test_confidence_is_0_of_even_odds_and_1_of_certainty() -> None:
    even, certain = torch.zeros(1, 16), torch.zeros(1, 16)
    certain[0, 3] = 200.0
    assert float(confidence_of("probability", even)) == pytest.approx(1 / 16)
    assert float(confidence_of("entropy", even)) == pytest.approx(0.0, abs=1e-6)
    for kind in ("probability", "entropy"):
        assert float(confidence_of(kind, certain)) == pytest.approx(1.0)
    with pytest.raises(UsageError, match="saturation"):
        confidence_of("saturation", even)


def test_a_line_is_found_again() -> None:
    x, slopes = some(300, 5), some(5, seed=1)
    found = fit_line(x, x @ slopes + 0.7, ridge=1e-9)
    assert torch.allclose(found, torch.cat([slopes, torch.tensor([0.7])]), atol=1e-4)
    assert torch.allclose(line(found, x), x @ slopes + 0.7, atol=1e-3)


def test_tokens_that_cost_more_have_larger_factors() -> None:
    x = some(2000, 3)
    relative = (1.2 * x[:, 0]).exp() * some(2000, seed=4).square()
    values = fit_factor(x, relative, ridge=1e-6)
    factor = token_factor(values, x).flatten()
    assert float(factor.square().mean()) == pytest.approx(1.0, abs=1e-4)
    dear = x[:, 0] > 1
    assert float(factor[dear].square().mean()) > 3 * float(factor[~dear].square().mean())
    assert torch.allclose(token_factor(values, 1e6 * x).log().abs(), torch.tensor(FACTOR), atol=1e-5)


def test_a_map_of_full_rank_is_ridge_regression_and_of_its_own_rank_exact() -> None:
    x = some(400, 6)
    low = some(6, 2, seed=1) @ some(2, 6, seed=2)
    y = x + x @ low + some(6, seed=3)
    for rank in (2, 6):
        assert torch.allclose(mapped(x, *fit_map(x, y, rank, ridge=1e-10)), y, atol=1e-3)
    worse = [float((mapped(x, *fit_map(x, y, r)) - y).square().mean()) for r in (1, 2)]
    assert worse[0] > 10 * worse[1]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_rows_equal_their_oracle(share: float) -> None:
    x, W = some(37), some(19, 37, seed=1)
    t, half = torch.full((37,), quantile_threshold(x.abs(), share)), np.float32(0.5)
    y = np.zeros(19, np.float32)
    kept = gated_rows(x.numpy(), half * t.numpy(), half, np.ascontiguousarray(W.T.numpy()), y)
    assert kept == 37 - round(37 * share)
    assert np.allclose(y, gated_product_slow(x, t, W).numpy(), atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_channels_equal_their_oracle(share: float) -> None:
    a, x, up, down = some(23), some(11, seed=1), some(23, 11, seed=2), some(11, 23, seed=3)
    t = torch.full((23,), quantile_threshold(a.abs(), share))
    y, bias = np.zeros(11, np.float32), np.zeros(23, np.float32)
    rows = np.ascontiguousarray(down.T.numpy())
    kept = gated_channels(a.numpy(), t.numpy(), x.numpy(), up.numpy(), bias, rows, y)
    assert kept == 23 - round(23 * share)
    assert np.allclose(y, gated_mlp_slow(a, t, x, up, down).numpy(), atol=1e-3)


def test_inputs_stay_as_they_are() -> None:
    x, y = some(40, 4), some(40, seed=1)
    before = x.clone(), y.clone()
    fit_line(x, y)
    fit_map(x, x.flip(1), 2)
    budget_level([x], [1.0], 0.5)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_gates_that_cannot_be_are_refused() -> None:
    one = {"a": torch.zeros(3)}
    with pytest.raises(UsageError, match="did you mean 'inputs'"):
        Gates("input", one)
    with pytest.raises(UsageError, match="there is none"):
        Gates("inputs", {})
    with pytest.raises(UsageError, match="confidence is for the kind exit"):
        Gates("inputs", one, "entropy")
    with pytest.raises(UsageError, match="confidence is one of"):
        Gates("exit", one)
    with pytest.raises(UsageError, match="a: holds NaN"):
        Gates("inputs", {"a": torch.tensor([math.nan])})


def test_shares_are_of_everything_and_of_the_blocks() -> None:
    tally = Tally(tokens=2, blocks=60.0, head=40.0, saved_blocks=15.0, saved_head=10.0)
    assert (tally.share, tally.share_of_blocks) == (0.25, 0.25)
    assert Tally().share == 0.0
