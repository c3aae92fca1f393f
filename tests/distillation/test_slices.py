"""Importance of slices against its oracle, and which heads share which keys."""

from __future__ import annotations

import pytest
import torch

from oracles.slices import importance_slow
from pocketsize.distillation.slices import Heads, Importance, added, best, kept_heads, pooled, rows_of, summed


@pytest.mark.parametrize("width", [1, 4])
def test_importance_is_that_of_the_slow_way_in_any_batches(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(5, 7, 12, generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.7
    mask[:, 0] = True
    whole, parts = Importance.zeros(12 // width, width), Importance.zeros(12 // width, width)
    whole.update(X, mask)
    for i in (3, 0, 4, 1, 2):
        parts.update(X[i : i + 1], mask[i : i + 1])
    wanted = torch.tensor(importance_slow(X, mask, width), dtype=torch.float64)
    torch.testing.assert_close(whole.value(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.value(), whole.value(), rtol=1e-12, atol=0)


def test_padding_counts_nothing() -> None:
    X, mask = torch.ones(1, 4, 2), torch.tensor([[True, True, False, False]])
    X[:, 2:] = 1e6
    found = Importance.zeros(2)
    found.update(X, mask)
    assert found.value().tolist() == [1.0, 1.0]


def test_best_are_rising_and_ties_go_to_the_first() -> None:
    assert best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2) == [1, 2]
    assert best(torch.ones(4), 2) == [0, 1]
    with pytest.raises(ValueError, match="5 of 4 slices"):
        best(torch.ones(4), 5)


def test_no_place_outweighs_another() -> None:
    found = summed([torch.tensor([1.0, 3.0]), torch.tensor([300.0, 100.0])])
    assert found.tolist() == [2.0, 2.0]


def test_whole_groups_go_where_each_key_keeps_its_queries() -> None:
    importance = torch.tensor([1.0, 1.0, 5.0, 5.0, 3.0, 3.0])
    assert kept_heads(importance, 3, 4, 2) == Heads((2, 3, 4, 5), ((1,), (2,)))


def test_queries_go_group_by_group_where_all_keys_stay() -> None:
    importance = torch.tensor([1.0, 2.0, 3.0, 9.0, 8.0, 7.0])
    assert kept_heads(importance, 2, 4, 2) == Heads((1, 2, 3, 4), ((0,), (1,)))


def test_multi_head_becomes_grouped_by_neighbours() -> None:
    assert kept_heads(torch.ones(4), 4, 4, 2) == Heads((0, 1, 2, 3), ((0, 1), (2, 3)))
    assert kept_heads(torch.tensor([1.0, 2.0, 4.0, 3.0]), 4, 2, 1) == Heads((2, 3), ((0, 1, 2, 3),))


@pytest.mark.parametrize(
    "of,keys,left,keys_left,why",
    [
        (6, 3, 5, 3, "5 heads cannot share 3 keys"),
        (6, 3, 6, 2, "only if one of"),
        (4, 4, 8, 4, "those are fewer"),
        (4, 2, 4, 4, "those are fewer"),
    ],
)
def test_shapes_that_cannot_be(of: int, keys: int, left: int, keys_left: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        kept_heads(torch.ones(of), keys, left, keys_left)


def test_pooled_rows_are_means_and_single_ones_are_copies() -> None:
    W = torch.arange(24.0).view(6, 4)
    two = pooled(W, [(0, 1), (2,)], 2)
    torch.testing.assert_close(two, torch.cat([(W[0:2] + W[2:4]) / 2, W[4:6]]))
    assert torch.equal(pooled(W, [(0,), (1,), (2,)], 2), W)
    assert rows_of([2, 0], 2) == [4, 5, 0, 1]


def test_costs_of_several_places_add_up() -> None:
    a, b = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([4.0, 2.0, 1.0])
    torch.testing.assert_close(added([a, b]) ** 2, a**2 + b**2)
