"""What was lost before a linear, made up for; corrections drawn back."""

from __future__ import annotations

import pytest
import torch

from oracles.drift import drawn_back_slow, made_up_for_slow
from pocketsize.linalg import feedback_factor
from pocketsize.quantization.drift import Drift, made_up_for, pulled_back
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.scheme import Scheme, named

Tensor = torch.Tensor


def layer(rows: int = 24, columns: int = 128, tokens: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, what they read in the original, and what they read behind linears that were rounded."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    X = torch.randn(tokens, columns, generator=g) @ mix
    lost = torch.eye(columns) - 0.1 * torch.randn(columns, columns, generator=g) / columns**0.5
    Y = 0.95 * X @ lost + 0.05 * torch.randn(tokens, columns, generator=g)
    return torch.randn(rows, columns, generator=g) * 0.05, X, Y


def sums(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    drift = Drift.zeros(X.shape[1])
    drift.update(Y, X)
    return drift.read.mean(), drift.mean()


def aimed(W: Tensor, H: Tensor, C: Tensor, *, alpha: float, damp: float) -> Tensor:
    return made_up_for(W, W @ C, feedback_factor(H, damp), alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_inputs_in_16_bits_are_not_rounded(dtype: torch.dtype) -> None:
    _, X, Y = layer(tokens=256)
    x, y = X.to(dtype), Y.to(dtype)
    _, C = sums(x, y)
    wanted = (x.double() - y.double()).T @ y.double() / len(y)
    torch.testing.assert_close(C.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("alpha", "damp"), [(1.0, 0.01), (0.25, 0.01), (1.0, 0.3)])
def test_equals_least_squares_over_all_tokens(alpha: float, damp: float) -> None:
    W, X, Y = layer()
    before = W.clone()
    made = aimed(W, *sums(X, Y), alpha=alpha, damp=damp)
    assert torch.allclose(made, made_up_for_slow(W, X, Y, alpha=alpha, damp=damp), atol=1e-4)
    assert torch.equal(W, before)


def test_sums_of_outputs_say_the_same_in_fewer_numbers() -> None:
    """Of the inputs it takes 128 x 128 sums, of the outputs 24 x 128."""
    W, X, Y = layer()
    inputs, outputs = Drift.zeros(128), Drift.zeros(128, outputs=24)
    inputs.update(Y, X)
    outputs.update(Y, X @ W.T, own=Y @ W.T)
    assert outputs.cross.shape == (24, 128)
    assert torch.allclose(outputs.lost(W), inputs.lost(W), atol=1e-5)
    assert torch.equal(outputs.read.mean(), inputs.read.mean())
    nothing = Drift.zeros(128, outputs=24)
    nothing.update(Y, Y @ W.T, own=Y @ W.T)
    assert not bool(nothing.lost(W).any())


def test_where_nothing_was_lost_nothing_changes() -> None:
    W, X, _ = layer()
    H, C = sums(X, X)
    assert not bool(C.any())
    assert torch.equal(aimed(W, H, C, alpha=1.0, damp=0.01), W)


def test_an_input_that_is_always_zero_takes_nothing_over() -> None:
    W, X, Y = layer()
    Y[:, 5] = 0
    made = aimed(W, *sums(X, Y), alpha=1.0, damp=0.01)
    assert torch.equal(made[:, 5], W[:, 5]) and bool(torch.isfinite(made).all())


def test_sums_leave_padding_out_and_add_up() -> None:
    _, X, Y = layer(tokens=60)
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[2, 4:] = False
    whole = Drift.zeros(128)
    whole.update(Y[:30].view(3, 10, -1), X[:30].view(3, 10, -1), mask[:3])
    whole.update(Y[30:].view(3, 10, -1), X[30:].view(3, 10, -1), mask[3:])
    x, y = X[mask.flatten()], Y[mask.flatten()]
    assert whole.read.tokens == len(y) == 54
    assert torch.allclose(whole.mean(), (x - y).T @ y / 54, atol=1e-5)
    assert torch.allclose(whole.read.mean(), y.T @ y / 54, atol=1e-5)


@pytest.mark.parametrize("word", ["plain", "Q4_1", "NF4", "FP8", "Q4_K"])
def test_outputs_come_nearer_to_the_original_on_every_grid(word: str) -> None:
    W, X, Y = layer(columns=256)
    scheme = Scheme(4, 64) if word == "plain" else named(word)
    assert scheme is not None
    H, C = sums(X, Y)
    aim = aimed(W, H, C, alpha=1.0, damp=0.01)

    def lost(Q: Tensor) -> float:
        return float((X @ W.T - Y @ Q.T).square().mean())

    plain, ours = (lost(gptq(T, H, scheme).weight.dequantize()) for T in (W, aim))
    assert ours < 0.8 * plain


def test_zeros_of_a_pruned_matrix_stay_and_are_made_up_for() -> None:
    W, X, Y = layer()
    kept = W.abs() > W.abs().median()
    H, C = sums(X, Y)
    aim = aimed(W * kept, H, C, alpha=1.0, damp=0.01)
    plain, ours = (gptq(T, H, Scheme(4, 64), mask=kept).weight.dequantize() for T in (W * kept, aim))
    assert not bool(ours[~kept].any())
    lost = [float((X @ (W * kept).T - Y @ Q.T).square().mean()) for Q in (plain, ours)]
    assert lost[1] < 0.95 * lost[0]


@pytest.mark.parametrize("grid", [{"symmetric": True}, {}, {"float_zeros": True}])
@pytest.mark.parametrize(
    ("bits", "group", "beta"), [(4, 32, 0.2), (3, 48, 0.5), (2, None, 0.2), (2, 96, 0.9)]
)
def test_columns_drawn_back_equal_the_slow_version(
    bits: int, group: int | None, beta: float, grid: dict[str, bool]
) -> None:
    W, X, _ = layer(columns=288)
    H, scheme = X.T @ X / len(X), Scheme(bits, group, **grid)
    done = gptq(W, H, scheme, beta=beta).weight
    codes, Q = drawn_back_slow(W, H, scheme, beta)
    rows = (done.codes.float() == codes).all(dim=1)  # a weight on an edge may fall on the other side of it
    assert float(rows.float().mean()) >= 0.9
    assert torch.allclose(done.dequantize()[rows], Q[rows], atol=1e-6)


def test_nothing_drawn_back_is_the_sweep_as_it_was() -> None:
    W, X, _ = layer()
    H = X.T @ X / len(X)
    factor = feedback_factor(H, 0.01)
    assert pulled_back(factor, 0.0) is factor
    plain, same = gptq(W, H, Scheme(3, 32)), gptq(W, H, Scheme(3, 32), beta=0.0)
    assert torch.equal(plain.weight.codes, same.weight.codes)
    assert not torch.equal(plain.weight.codes, gptq(W, H, Scheme(3, 32), beta=0.2).weight.codes)


@pytest.mark.parametrize("word", ["Q4_1", "NF4", "FP8", "Q4_K", "Q6_K"])
def test_all_the_way_back_is_rounding_to_nearest_in_place(word: str) -> None:
    """On every kind of grid: without corrections each weight has the code nearest to it on its grid."""
    W, X, _ = layer(columns=256)
    scheme = named(word)
    assert scheme is not None
    done = gptq(W, X.T @ X / len(X), scheme, beta=1.0 - 1e-7).weight
    step = done.scale.abs().repeat_interleave(256 // done.scale.shape[1], 1)
    nearest = done.dequantize()
    half = {"Q4_1": 0.5, "Q4_K": 0.5, "Q6_K": 0.5, "NF4": 0.16, "FP8": 16.0}[word]
    inside = (W - nearest).abs() <= (half + 1e-3) * step
    assert float(inside.float().mean()) > 0.99  # all but what lies beyond the ends of its grid
