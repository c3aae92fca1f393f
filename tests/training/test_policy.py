"""Text that the student writes: its share, its sameness after a break, and what is remembered of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise
from pocketsize.training import policy
from pocketsize.training.examples import Order, of_rows
from pocketsize.training.objective import Losses, NextToken, Teacher
from pocketsize.training.policy import Policy
from tiny import write_tiny


@pytest.fixture
def student(tmp_path: Path) -> nn.Module:
    return materialise(load(write_tiny(tmp_path / "m", "llama"))).requires_grad_(True).train()


def order(rows: int = 12) -> Order:
    draw = np.random.default_rng(0)
    return Order(of_rows([draw.integers(5, 300, 12 + i % 3) for i in range(rows)], 2, "numbers"), 3, 0)


def test_a_share_of_batches_goes_on_from_training_text(student: nn.Module) -> None:
    own = Policy(order(), student, 0.5, seed=1)
    written = [n for n in range(40) if own.batch(n).written]
    assert 12 <= len(written) <= 28
    for number in (written[0], next(n for n in range(40) if n not in written)):
        batch, text = own.batch(number), order().batch(number)
        kept = round(0.5 * int(text.mask.sum(1).min()))
        assert batch.ids.shape == text.ids.shape
        assert torch.equal(batch.ids[:, :kept], text.ids[:, :kept])
        assert torch.equal(batch.ids, text.ids) != batch.written
        assert batch.mask.all() or not batch.written
    assert student.training


def test_the_same_number_gives_the_same_text_and_another_student_other_text(student: nn.Module) -> None:
    first, again = (Policy(order(), student, 1.0, seed=1).batch(7).ids for _ in range(2))
    assert torch.equal(first, again)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.5)
    assert not torch.equal(first, Policy(order(), student, 1.0, seed=1).batch(7).ids)
    assert not torch.equal(first, Policy(order(), student, 1.0, seed=2).batch(7).ids)


def test_what_was_written_is_what_the_student_says(student: nn.Module) -> None:
    """Sampled by the probabilities that the student itself gives: over many texts both agree."""
    examples = of_rows([np.full(2, 9)] * 3000, 2, "one word")
    ids = Policy(Order(examples, 3000, 0), student, 1.0).batch(0).ids
    with torch.no_grad():
        p = student.eval()(input_ids=ids[:1, :1]).logits[0, -1].softmax(-1)  # type: ignore[operator]
    share = torch.bincount(ids[:, 1], minlength=len(p)) / 3000
    assert float((share - p).abs().max()) < 0.03


def test_replay_reads_again_and_is_whole_after_a_break(
    student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "KEPT", 4)

    def batches(own: Policy, numbers: range) -> list[Tensor]:
        return [own.batch(n).ids for n in numbers]

    whole = batches(Policy(order(), student, 1.0, 0.6, seed=3), range(16))
    again = sum(any(torch.equal(x, y) for y in whole[:i]) for i, x in enumerate(whole))
    assert 4 <= again <= 13
    first = Policy(order(), student, 1.0, 0.6, seed=3)
    begun = batches(first, range(9))
    second = Policy(order(), student, 1.0, 0.6, seed=3)
    second.restore({name: T.clone() for name, T in first.tensors().items()})
    assert len(first.buffer) <= 4
    assert all(torch.equal(x, y) for x, y in zip(begun + batches(second, range(9, 16)), whole, strict=True))


def test_true_tokens_do_not_count_in_what_the_student_wrote(student: nn.Module, tmp_path: Path) -> None:
    teacher = Teacher(materialise(load(write_tiny(tmp_path / "t", "llama", seed=4))))
    batch = Policy(order(), student, 1.0).batch(0)
    both, soft = (NextToken(student, Losses(hard=hard), (teacher,)).loss(batch) for hard in (1.0, 0.0))
    assert torch.equal(both, soft)
