"""Windows of tokens that run together."""

from __future__ import annotations

import random

import pytest
import torch

from pocketsize.models.batches import batches_of, full_windows, in_batches, worth


def masked(widths: list[int], length: int) -> torch.Tensor:
    return torch.arange(length) < torch.tensor(widths)[:, None]


@pytest.mark.parametrize(("count", "length", "tokens"), [(1, 5, 60), (20, 12, 36), (7, 12, 30), (9, 12, 4)])
def test_windows_of_one_length_are_split_evenly(count: int, length: int, tokens: int) -> None:
    rows = max(1, tokens // length)
    mask = masked([length] * count, length)
    wanted = [(slice(a, min(a + rows, count)), length) for a in range(0, count, rows)]
    assert batches_of(mask, tokens) == wanted
    assert full_windows(mask) == count
    assert [worth(mask, n) for n in range(1, count + 1)] == list(range(1, count + 1))


@pytest.mark.parametrize("seed", range(20))
def test_each_window_runs_once_with_its_tokens_and_little_padding(seed: int) -> None:
    drawn = random.Random(seed)
    tokens, widths = drawn.randint(1, 64), [drawn.randint(0, 16) for _ in range(drawn.randint(1, 30))]
    mask = masked(widths, 16)
    ids = torch.arange(mask.numel()).view(mask.shape)
    batches = list(in_batches(ids, mask, tokens))
    assert torch.equal(torch.cat([ids[real] for ids, real in batches]), ids[mask])
    assert sum(len(ids) for ids, _ in batches) == len(widths)
    for (rows, width), (own, _) in zip(batches_of(mask, tokens), batches, strict=True):
        real = [max(1, one) for one in widths[rows]]
        assert own.shape == (len(real), width) and width == max(real) < 2 * min(real) + (len(real) == 1)
        assert own.numel() <= tokens or len(own) == 1


def test_windows_are_worth_their_tokens() -> None:
    mask = masked([8, 4, 4, 2, 2, 2, 2, 8], 8)
    assert full_windows(mask) == 4
    assert [worth(mask, n) for n in (1, 2, 3, 4, 9)] == [1, 3, 7, 8, 8]


@pytest.mark.parametrize("rows", [1, 5])
def test_there_may_be_fewer_than_asked(rows: int) -> None:
    assert worth(masked([3] * rows, 3), 7) == rows
