"""Texts of which a part is hidden."""

from __future__ import annotations

import numpy as np
import torch

from pocketsize.training.examples import Batch, Order, of_rows
from pocketsize.training.masking import Masking

FRAME, MASK = (0, 1, 2, 3), 3
TEXTS = of_rows([np.array([1, *range(10, 10 + 7 * (i + 1)), 2]) for i in range(12)], 0, "numbers")
ORDER = Order(TEXTS, 4, seed=0)


def batches(share: float, seed: int = 0, count: int = 60) -> list[tuple[Batch, Batch]]:
    read = Masking(share, MASK, FRAME, seed).over(ORDER.batch)
    return [(ORDER.batch(i), read(i)) for i in range(count)]


def test_the_share_is_hidden_and_nothing_else_changes() -> None:
    found = batches(0.2)
    hidden = torch.cat([(after.ids != before.ids).flatten() for before, after in found])
    words = torch.cat([(before.ids >= 10).flatten() for before, _ in found])
    assert not hidden[~words].any()  # neither padding nor frame
    assert 0.18 < float(hidden[words].float().mean()) < 0.22
    for before, after in found:
        assert bool((after.ids[after.ids != before.ids] == MASK).all())
        assert torch.equal(before.mask, after.mask)
        assert before.rows == after.rows


def test_each_reading_hides_other_tokens_and_the_same_when_it_is_asked_again() -> None:
    again = batches(0.3)
    for (_, one), (_, same) in zip(batches(0.3), again, strict=True):
        assert torch.equal(one.ids, same.ids)
    of_text: dict[int, set[tuple[int, ...]]] = {}
    for _, after in again:
        for row, ids, mask in zip(after.rows, after.ids, after.mask, strict=True):
            of_text.setdefault(row, set()).add(tuple(ids[mask].tolist()))
    longest = max(of_text)
    assert len(of_text[longest]) == 20  # once an epoch
    other = batches(0.3, seed=1)
    assert any(not torch.equal(a.ids, b.ids) for (_, a), (_, b) in zip(again, other, strict=True))
