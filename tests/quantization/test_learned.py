"""Learned rounding: the slow version's steps, nothing without steps, less error where there is some."""

from __future__ import annotations

import pytest
import torch

from oracles.learned import learned_slowly
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.learned import INSIDE, Learned, hardens, places_of, softness
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme

SCHEMES = {
    "symmetric": Scheme(4, 32, symmetric=True),
    "whole zeros": Scheme(3, 32),
    "float zeros": Scheme(2, 32, float_zeros=True),
    "one scale a row": Scheme(4, None, symmetric=True),
}
TABLES = {name: NAMED[name] for name in ("NF4", "IQ4_NL", "NVFP4", "MXFP4", "TERNARY")}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


each_table = pytest.mark.parametrize("scheme", TABLES.values(), ids=TABLES.keys())


def matrix(seed: int = 0, rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


@each_scheme
def test_equals_the_slow_version(scheme: Scheme) -> None:
    W, generator = matrix(), torch.Generator().manual_seed(1)
    start = rtn(W, scheme)
    gradients = [torch.randn(W.shape, generator=generator) + 0.5 * W for _ in range(12)]
    learned = Learned(W, start)
    for step, gradient in enumerate(gradients):
        learned.update(gradient, step, len(gradients))
    mine, slow = learned.weight(), learned_slowly(W, start, gradients)
    assert float((mine.codes != slow.codes).float().mean()) < 0.01  # sums in another order
    assert torch.allclose(mine.scale, slow.scale, rtol=2**-8) and torch.allclose(
        mine.zero, slow.zero, rtol=0.01
    )
    assert not torch.equal(mine.codes, start.codes) and not torch.equal(mine.scale, start.scale)


@each_scheme
def test_without_steps_nothing_changes(scheme: Scheme) -> None:
    W = matrix()
    start = gptq(W, torch.eye(64) + 0.3, scheme).weight
    same = Learned(W, start).weight()
    assert torch.equal(same.codes, start.codes) and torch.equal(same.dequantize(), start.dequantize())


def test_what_is_learned_is_stored_exactly() -> None:
    for scheme in SCHEMES.values():
        W = matrix(3)
        learned = Learned(W, rtn(W, scheme))
        for step in range(4):
            learned.update(W, step, 4)
        weight = learned.weight()
        assert torch.equal(weight.scale, weight.scale.to(torch.bfloat16).float())
        if scheme.float_zeros:
            assert torch.equal(weight.minimum, weight.minimum.half().float())
        else:
            assert torch.equal(weight.zero, weight.zero.round())


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_error_of_what_is_read_falls(bits: int) -> None:
    """Outputs of a matrix on inputs it did not learn from; GPTQ knew the inputs of the others."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator)
    X, held = (torch.randn(2048, 64, generator=generator) @ mixing for _ in range(2))
    W, scheme = matrix(2, rows=64), Scheme(bits, 32)
    start = rtn(W, scheme)

    def error(weight: QWeight) -> float:
        return float((held @ (weight.dequantize() - W).T).square().mean())

    learned = Learned(W, start)
    for step in range(60):
        few = X[torch.randint(0, 2048, (256,), generator=generator)]
        Q = learned.soft(softness(step, 60) if hardens(scheme) else 0.0)
        learned.update((Q - W) @ few.T @ few, step, 60)
    assert error(learned.weight()) < 0.9 * error(start)


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *TABLES.values()], ids=[*SCHEMES, *TABLES])
def test_a_soft_matrix_lies_between_the_original_and_what_is_stored(scheme: Scheme) -> None:
    W = matrix(5)
    start = gptq(W, torch.eye(64) + 0.3, scheme).weight
    learned, stored = Learned(W, start), start.dequantize()
    assert torch.equal(learned.soft(0.0), stored)
    inside = (places_of(W, start).view_as(W) - start.codes.float()).abs() < INSIDE - 1e-3
    assert float(inside.float().mean()) > 0.3
    assert torch.allclose(learned.soft(1.0)[inside], W[inside], atol=1e-5)
    middle = (learned.soft(1.0) + stored) / 2
    assert torch.allclose(learned.soft(0.5), middle, atol=1e-5)


def test_two_bits_that_harden_end_nearer_than_two_that_were_always_hard() -> None:
    """Two matrices around a kink, each from GPTQ: what they give together on inputs that taught neither."""
    assert _mean_after(soft=True) < _mean_after(soft=False) - 0.01 < 0.97


def _mean_after(*, soft: bool) -> float:
    """The error after learning over that before, over five draws."""
    return sum(_error_after(seed, soft=soft) for seed in range(5)) / 5


def _error_after(seed: int, *, soft: bool, steps: int = 20) -> float:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 64, generator=generator) / torch.arange(1, 65)[:, None] ** 0.5
    X, held = (torch.randn(4096, 64, generator=generator) @ mixing for _ in range(2))
    A = torch.randn(128, 64, generator=generator) / 8
    B, scheme = torch.randn(64, 128, generator=generator) / 11, Scheme(2, 32)

    def off(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return ((x @ a.T).relu() @ b.T - (x @ A.T).relu() @ B.T).square().mean()

    first = gptq(A, X.T @ X, scheme).weight
    Y = (X @ first.dequantize().T).relu()
    starts = (first, gptq(B, Y.T @ Y, scheme).weight)
    learned = [Learned(W, start) for W, start in zip((A, B), starts, strict=True)]
    for step in range(steps):
        few = X[torch.randint(0, 4096, (512,), generator=generator)]
        matrices = [one.soft(softness(step, steps) if soft else 0.0).requires_grad_() for one in learned]
        off(*matrices, few).backward()
        for one, matrix in zip(learned, matrices, strict=True):
            assert matrix.grad is not None
            one.update(matrix.grad, step, steps)
    before, after = ([q.dequantize() for q in qs] for qs in (starts, [one.weight() for one in learned]))
    return float(off(*after, held)) / float(off(*before, held))


def test_places_harden_before_the_last_steps() -> None:
    shares = [softness(step, 20) for step in range(20)]
    assert shares[0] == 0.5 and shares == sorted(shares, reverse=True)
    assert shares[14] > 0 and not any(shares[15:])
    assert hardens(Scheme(2, 64)) and hardens(NAMED["TERNARY"]) and not hardens(Scheme(3, 64))


def test_a_group_of_zeros_stays_one() -> None:
    W = matrix()
    W[:, :32] = 0
    for scheme in SCHEMES.values():
        learned = Learned(W, rtn(W, scheme))
        learned.update(torch.ones_like(W), 0, 1)
        assert bool(learned.weight().dequantize().isfinite().all())


@each_table
def test_a_table_is_learned_as_the_slow_version_learns_it(scheme: Scheme) -> None:
    W, generator = matrix(), torch.Generator().manual_seed(1)
    start = rtn(W, scheme)
    gradients = [torch.randn(W.shape, generator=generator) + 0.5 * W for _ in range(12)]
    learned = Learned(W, start)
    for step, gradient in enumerate(gradients):
        learned.update(gradient, step, len(gradients))
    mine, slow = learned.weight(), learned_slowly(W, start, gradients)
    assert float((mine.codes != slow.codes).float().mean()) < 0.01
    assert torch.allclose(mine.scale, slow.scale, rtol=2**-7) and not bool(mine.zero.any())
    assert scheme.bits == 2 or not torch.equal(mine.codes, start.codes)  # cells of three codes are wide
    assert int((mine.codes.int() - start.codes.int()).abs().max()) <= 1


@each_table
def test_a_table_stays_without_steps(scheme: Scheme) -> None:
    W = matrix()
    start = gptq(W, torch.eye(64) + 0.3, scheme).weight
    same = Learned(W, start).weight()
    assert torch.equal(same.codes, start.codes) and torch.equal(same.scale, start.scale)
