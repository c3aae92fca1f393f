from __future__ import annotations

import pytest
import torch

from pocketsize.distillation.divergence import Divergence, divergence
from pocketsize.training import head as chunks
from pocketsize.training.head import Head, mean_over_vocabulary


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2**22, 24])
def test_chunks_give_the_whole_losses_gradient(
    cap: float | None, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "LOGITS", rows)
    draw = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*s, generator=draw) for s in ((10, 6), (8, 6), (10, 8)))
    b = torch.randn(8, generator=draw) if bias else None
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, *([b] if b is not None else []))]
    how = Divergence("reverse_kl")
    found = mean_over_vocabulary(
        leaves[0],
        Head(leaves[1], leaves[2] if bias else None, cap),
        lambda logits, part: divergence(logits, teacher[part], how),
    )
    (3 * found).backward()

    others = [t.clone().double().requires_grad_() for t in (hidden, weight, *([b] if b is not None else []))]
    logits = others[0] @ others[1].T + (others[2] if bias else 0.0)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    p, q = torch.log_softmax(teacher.double(), -1), torch.log_softmax(logits, -1)
    wanted = (q.exp() * (q - p)).sum(-1).mean()
    (3 * wanted).backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for mine, theirs in zip(leaves, others, strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    found = mean_over_vocabulary(
        hidden, Head(weight), lambda x, _: divergence(x, torch.zeros_like(x), Divergence())
    )
    found.backward()
    assert hidden.grad is not None and weight.grad is None
