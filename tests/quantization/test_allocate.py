"""Widths for a size: as good as the best of all combinations, never over budget."""

from __future__ import annotations

import random
import time

import pytest

from oracles.allocate import least_loss
from pocketsize.errors import ResourceError
from pocketsize.quantization import allocate as allocating
from pocketsize.quantization.allocate import Choice, allocate


def matrices(seed: int, count: int = 6, unit: int = 32) -> list[list[Choice]]:
    chance = random.Random(seed)
    return [
        [Choice(unit * chance.randint(1, 40), chance.random() / bits) for bits in (2, 3, 4, 8)]
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_best_of_all_combinations(seed: int) -> None:
    given = matrices(seed, unit=random.Random(seed).choice([1, 7, 32, 1000]))
    least, most = (sum(end(c.bytes for c in choices) for choices in given) for end in (min, max))
    for share in (0.0, 0.1, 0.37, 0.8, 1.0, 1.5):
        budget = least + int(share * (most - least))
        found = allocate(given, budget, points=9)
        assert found.bytes <= budget
        assert found.loss == pytest.approx(least_loss(given, budget))
        picked = [choices[k] for choices, k in zip(given, found.chosen, strict=True)]
        assert found.bytes == sum(choice.bytes for choice in picked)
        for size, loss in found.curve:
            assert loss == pytest.approx(least_loss(given, size))
        losses = [loss for _, loss in found.curve]
        assert losses == sorted(losses, reverse=True)


def test_rounded_sizes_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    given = matrices(3, unit=1)
    budget = sum(max(c.bytes for c in choices) for choices in given) * 2 // 3
    monkeypatch.setattr(allocating, "STATES", 24)
    found = allocate(given, budget)
    assert found.bytes <= budget
    assert least_loss(given, budget) <= found.loss < 1.5 * least_loss(given, budget)


def test_a_budget_below_the_smallest_is_an_error() -> None:
    with pytest.raises(ResourceError, match="below the smallest choices"):
        allocate([[Choice(10, 1.0), Choice(20, 0.5)]], 9)


def test_thousands_of_matrices_take_seconds() -> None:
    chance, start = random.Random(0), time.process_time()
    sizes = [1 << 20, 3 << 20, 11 << 20]
    given = [
        [Choice(size * bits // 8 + size // 16, chance.random() / 4**bits) for bits in (2, 3, 4, 5, 8)]
        for size in chance.choices(sizes, k=1000)
    ]
    found = allocate(given, sum(choices[2].bytes for choices in given))
    assert found.bytes <= sum(choices[2].bytes for choices in given)
    assert time.process_time() - start < 20
