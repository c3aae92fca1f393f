"""Rotations: orthogonal, by seed, and undone by the matrices on the other side."""

from __future__ import annotations

import pytest
import torch

from pocketsize.linalg import hadamard
from pocketsize.quantization.rotate import rotation, turned_inputs, turned_outputs


@pytest.mark.parametrize("n", [1, 2, 12, 20, 24, 28, 36, 60, 64, 128, 576, 896, 960, 1536])
def test_hadamard_matrices_are_orthonormal_and_flat(n: int) -> None:
    H = hadamard(n)
    assert torch.allclose(H @ H.T, torch.eye(n), atol=1e-5)
    assert torch.allclose(H.abs(), torch.full((n, n), n**-0.5))


@pytest.mark.parametrize("n", [0, 3, 18, 92])
def test_orders_without_a_matrix(n: int) -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix"):
        hadamard(n)


@pytest.mark.parametrize("n", [16, 18, 36])
def test_rotations_are_orthogonal_and_drawn_by_seed(n: int) -> None:
    R = rotation(n, 1)
    assert torch.allclose(R @ R.T, torch.eye(n), atol=1e-5)
    assert torch.equal(R, rotation(n, 1)) and not torch.equal(R, rotation(n, 2))


def test_outputs_turned_and_inputs_turned_meet() -> None:
    g = torch.Generator().manual_seed(0)
    first, second, x = (torch.randn(*s, generator=g) for s in ((24, 10), (7, 24), (10, 5)))
    bias, gain, R = torch.randn(24, generator=g), torch.rand(24, generator=g), rotation(12, 0)
    wanted = second @ (first @ x + bias[:, None])
    turned = turned_outputs(first, R) @ x + turned_outputs(bias, R)[:, None]
    assert torch.allclose(turned_inputs(second, R) @ turned, wanted, atol=1e-4)
    scaled = second @ (gain[:, None] * (first @ x + bias[:, None]))
    assert torch.allclose(turned_inputs(second, R, gain) @ turned, scaled, atol=1e-4)
    # One head at a time, as plain sums say.
    slow = torch.zeros(24, 10)
    for head in range(2):
        for j in range(12):
            slow[head * 12 + j] = sum(R[i, j] * first[head * 12 + i] for i in range(12))
    assert torch.allclose(turned_outputs(first, R), slow, atol=1e-5)
