from __future__ import annotations

import pytest
import torch

from pocketsize.distillation.divergence import Divergence, divergence
from pocketsize.linalg import narrow_products
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


def test_narrow_products_leave_loss_and_slopes_nearly_as_they_were() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*s, generator=draw) for s in ((96, 64), (512, 64), (96, 512)))
    found: list[list[torch.Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        x, W = hidden.clone().requires_grad_(), (0.2 * weight).requires_grad_()
        with narrow_products(dtype):
            loss = mean_over_vocabulary(
                x, Head(W), lambda logits, part: divergence(logits, teacher[part], Divergence())
            )
        loss.backward()
        assert x.grad is not None and W.grad is not None
        found.append([loss.detach(), x.grad, W.grad])
    for mine, wanted in zip(found[1], found[0], strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - wanted).norm() / wanted.norm()) < 0.01
