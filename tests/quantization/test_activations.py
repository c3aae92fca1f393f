"""Tokens rounded as a runtime with 8-bit inputs rounds them."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from oracles.activations import rounded_slow
from pocketsize.quantization.activations import rounded

KINDS = pytest.mark.parametrize("floats", [False, True], ids=["int8", "float8"])


def tokens(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(24, 40, generator=g) * torch.logspace(-4, 3, 24)[:, None]
    X[::5, 7] *= 60
    X[3] = 0
    return X


@KINDS
def test_equals_the_loop(floats: bool) -> None:
    X = tokens()
    assert torch.equal(rounded(X, floats=floats), rounded_slow(X, floats=floats))


@KINDS
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_format_library_bit_for_bit(floats: bool, seed: int) -> None:
    X = tokens(seed).view(2, 12, 40)
    kind = "float" if floats else "int"
    args = QuantizationArgs(num_bits=8, type=kind, symmetric=True, dynamic=True, strategy="token")
    scale, zero = compute_dynamic_scales_and_zp(X, args, torch.nn.Linear(1, 1))
    assert torch.equal(rounded(X, floats=floats), fake_quantize(X, scale, zero, args))


@KINDS
def test_tokens_do_not_know_of_each_other_and_powers_of_two_pass(floats: bool) -> None:
    X = tokens()
    before, order = X.clone(), torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
    whole = rounded(X, floats=floats)
    assert torch.equal(rounded(X[order], floats=floats), whole[order])
    assert torch.equal(rounded(X * 2**-6, floats=floats), whole * 2**-6)
    assert torch.equal(X, before)


@KINDS
def test_of_the_type_that_was_given_and_nothing_of_nothing(floats: bool) -> None:
    X = tokens().to(torch.bfloat16)
    assert rounded(X, floats=floats).dtype == torch.bfloat16
    assert rounded(X[:0], floats=floats).shape == (0, 40)
