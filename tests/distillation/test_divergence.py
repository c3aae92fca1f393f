from __future__ import annotations

import pytest
import torch

from oracles import distillation as oracle
from pocketsize.distillation.divergence import DIVERGENCES, Divergence, cross_entropy, divergence


def logits(seed: int, rows: int = 6, vocabulary: int = 11, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "mix"), [(1.0, None), (2.0, 0.3), (0.5, 0.9)])
def test_value_and_slope_equal_the_formula(kind: str, temperature: float, mix: float | None) -> None:
    how = Divergence(kind, temperature, mix)
    student, teacher = logits(0), logits(1)
    found, slope = divergence(student, teacher, how)
    x = student.double().requires_grad_()
    wanted = oracle.divergence(x, teacher, kind, temperature, how.share)
    wanted.sum().backward()
    assert torch.allclose(found.double(), wanted.detach(), atol=1e-5, rtol=1e-5)
    assert torch.allclose(slope.double(), x.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_it_is_zero_with_no_slope_where_both_agree_and_above_elsewhere(kind: str) -> None:
    how = Divergence(kind, 2.0)
    same, slope = divergence(logits(0), logits(0) + 5.0, how)  # a constant changes no probability
    assert same.abs().max() < 1e-5 and slope.abs().max() < 1e-5
    assert divergence(logits(0), logits(1), how)[0].min() > 0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_probabilities_too_small_for_float32_give_finite_losses(kind: str) -> None:
    far = torch.tensor([[300.0, -300.0, 0.0], [-300.0, 300.0, 0.0]])
    found, slope = divergence(far, far.flip(0), Divergence(kind))
    assert bool(found.isfinite().all()) and bool(slope.isfinite().all())


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_inputs_stay_and_the_order_of_the_vocabulary_does_not_matter(kind: str) -> None:
    student, teacher = logits(0), logits(1)
    before = student.clone(), teacher.clone()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    found, slope = divergence(student, teacher, Divergence(kind))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    turned, turned_slope = divergence(student[:, order], teacher[:, order], Divergence(kind))
    assert torch.allclose(found, turned, atol=1e-6) and torch.allclose(
        slope[:, order], turned_slope, atol=1e-6
    )


def test_cross_entropy_is_torchs_own() -> None:
    x = logits(0).requires_grad_()
    targets = torch.tensor([0, 3, 3, 10, 1, 0])
    found, slope = cross_entropy(x.detach(), targets)
    wanted = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    wanted.sum().backward()
    assert torch.allclose(found, wanted.detach(), atol=1e-6) and torch.allclose(slope, x.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": "kl"}, "forward_kl"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"mix": 1.0}, "mix"),
    ],
)
def test_what_is_no_divergence_is_refused(options: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Divergence(**options)  # type: ignore[arg-type]
