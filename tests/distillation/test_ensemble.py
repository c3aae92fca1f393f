from __future__ import annotations

import pytest
import torch

from pocketsize.distillation.ensemble import blended, by_loss
from pocketsize.distillation.schedule import rate
from pocketsize.distillation.vocabulary import aligned


def test_a_blend_is_the_mixture_of_distributions() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 7, generator=draw) for _ in range(3)]
    weights = torch.softmax(torch.randn(3, 4, generator=draw), 0)
    found = blended(logits, weights).exp()
    wanted = sum(w[:, None] * torch.softmax(x, -1) for x, w in zip(logits, weights, strict=True))
    assert torch.allclose(found, wanted, atol=1e-6)
    alone = torch.tensor([[1.0] * 4, [0.0] * 4, [0.0] * 4])
    assert torch.allclose(blended(logits, alone), torch.log_softmax(logits[0], -1), atol=1e-5)


def test_the_teacher_with_the_smaller_loss_counts_for_more() -> None:
    found = by_loss(torch.tensor([[1.0, 3.0], [2.0, 1.0]]))
    assert (
        torch.allclose(found.sum(0), torch.ones(2))
        and found[0, 0] > found[1, 0]
        and found[0, 1] < found[1, 1]
    )


def test_the_rate_rises_and_falls() -> None:
    assert rate(0.05, warmup=0.1, floor=0.1) == pytest.approx(0.5) and rate(0.1, warmup=0.1, floor=0.1) == 1
    assert rate(1.0, warmup=0.1, floor=0.1) == pytest.approx(0.1) and rate(2.0, warmup=0.1, floor=0.1) == 0.1
    assert rate(0.0, warmup=0.0, floor=0.0) == 1 and rate(0.5, warmup=0.0, floor=0.0) == pytest.approx(0.5)


def test_vocabularies_are_compared_token_by_token() -> None:
    teacher = {"a": 0, "b": 1, "c": 2}
    assert aligned(teacher, teacher, 3, 4) is None  # the teacher's padding does not matter
    assert aligned({"c": 0, "a": 1}, teacher, 3, 3) == [2, 0, 2]
    with pytest.raises(ValueError, match="token 1 of the student, 'x', is none of the teacher's"):
        aligned({"a": 0, "y": 2, "x": 1}, teacher, 3, 3)
