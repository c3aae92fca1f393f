from __future__ import annotations

import pytest
import torch

from oracles import distillation as oracle
from pocketsize.distillation.divergence import Divergence, divergence
from pocketsize.distillation.signal import Signal, sampled, signal_divergence, top_k


def logits(seed: int, rows: int = 5, vocabulary: int = 12) -> torch.Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 4, 11])
def test_top_k_with_its_tail_equals_the_coarse_kl(k: int) -> None:
    student, teacher = logits(0), logits(1)
    found, slope = signal_divergence(student, top_k(teacher, k))
    x = student.double().requires_grad_()
    wanted = oracle.top_k(x, teacher, k)
    wanted.sum().backward()
    assert torch.allclose(found.double(), wanted.detach(), atol=1e-5)
    assert torch.allclose(slope.double(), x.grad, atol=1e-5)


def test_all_of_the_vocabulary_is_the_dense_kl() -> None:
    student, teacher = logits(0), logits(1)
    found, slope = signal_divergence(student, top_k(teacher, 12))
    dense, wanted = divergence(student, teacher, Divergence())
    assert torch.allclose(found, dense, atol=1e-5) and torch.allclose(slope, wanted, atol=1e-5)


def test_samples_are_right_on_average() -> None:
    student, teacher = logits(0, rows=1), logits(1, rows=1)
    draws = [sampled(teacher, 8, torch.Generator().manual_seed(i)) for i in range(4000)]
    found = [signal_divergence(student, draw) for draw in draws]
    dense, slope = divergence(student, teacher, Divergence())
    values = torch.stack([value for value, _ in found])
    assert (values.mean(0) - dense).abs() < 4 * values.std() / len(values) ** 0.5
    assert torch.allclose(torch.stack([s for _, s in found]).mean(0), slope, atol=0.02)


@pytest.mark.parametrize(
    "make", [lambda t: top_k(t, 4), lambda t: sampled(t, 6, torch.Generator().manual_seed(0))]
)
def test_it_is_zero_where_both_agree(make) -> None:  # type: ignore[no-untyped-def]
    found, _ = signal_divergence(logits(0), make(logits(0)))
    assert found.abs().max() < 1e-5


def test_weights_that_do_not_add_up_are_refused() -> None:
    part = top_k(logits(0), 3)
    with pytest.raises(ValueError, match="add up to 1"):
        Signal(part.ids, part.weight, part.log_p)
    with pytest.raises(ValueError, match="k must be 1 to 12, got 13"):
        top_k(logits(0), 13)
    with pytest.raises(ValueError, match="at least one draw"):
        sampled(logits(0), 0, torch.Generator())
