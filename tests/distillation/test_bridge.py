"""The bridge between embeddings of different widths, against its oracle and by what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oracles.bridge import bridge_slow
from pocketsize.distillation.bridge import bridge


def drawn(n: int, width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, 0.3, width)
    return torch.randn(n, width, generator=draw) * spread + torch.randn(width, generator=draw)


def test_it_is_what_the_oracle_finds() -> None:
    student, teacher = drawn(60, 4, 0), drawn(60, 7, 1)
    wanted = bridge_slow(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(bridge(student, teacher).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize(("a", "b"), [(4, 7), (5, 5), (7, 4)])
def test_it_only_turns(a: int, b: int) -> None:
    W = bridge(drawn(60, a, 0), drawn(60, b, 1)).double()
    assert W.shape == (b, a)
    product = W.T @ W if a <= b else W @ W.T
    assert torch.allclose(product, torch.eye(min(a, b), dtype=torch.float64), atol=1e-6)


def test_what_differs_by_a_turn_alone_is_found_whole() -> None:
    student = drawn(60, 4, 0)
    turn, _ = torch.linalg.qr(torch.randn(7, 4, generator=torch.Generator().manual_seed(2)))
    teacher = 2.5 * student @ turn.T
    there = student @ bridge(student, teacher).T
    assert float(F.cosine_similarity(there, teacher).min()) > 1 - 1e-6


def test_no_other_turn_among_the_same_directions_comes_nearer() -> None:
    student, teacher = drawn(60, 4, 0), drawn(60, 7, 1)
    x, y, W = F.normalize(student), F.normalize(teacher), bridge(student, teacher)
    best = float((x @ W.T * y).sum())
    for seed in range(50):
        turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))
        assert float((x @ (W @ turn).T * y).sum()) < best


def test_fewer_texts_than_directions_are_enough() -> None:
    W = bridge(drawn(3, 4, 0), drawn(3, 7, 1))
    assert torch.allclose(W.T @ W, torch.eye(4), atol=1e-5)
