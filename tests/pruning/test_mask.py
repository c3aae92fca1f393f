"""Masks against sorting."""

import pytest
import torch
from tests.oracles.pruning import highest_slow

from pocketsize.errors import UnsupportedError
from pocketsize.pruning.mask import highest, require_fitting
from pocketsize.pruning.pattern import Pattern, pattern_of

PATTERNS = [pattern_of(name, 0.5) for name in ("2:4", "4:8", "1:4", "3:4")] + [
    Pattern(share) for share in (0.01, 0.5, 0.9, 0.999)
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.name} {p.sparsity}")
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_the_highest_scores_stay(pattern, scope):
    score = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)).abs()
    assert torch.equal(highest(score, pattern, scope), highest_slow(score, pattern, scope))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.name} {p.sparsity}")
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_of_equal_scores_the_first_stay_and_the_count_is_exact(pattern, scope):
    score = torch.randint(0, 3, (5, 16), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(highest(score, pattern, scope), highest_slow(score, pattern, scope))


def test_one_weight_always_stays():
    assert int(highest(torch.rand(1, 8), Pattern(0.99)).sum()) == 1


def test_rows_that_a_pattern_does_not_divide_are_refused_by_name():
    require_fitting(pattern_of("2:4", 0.5), 12, "a.weight")
    with pytest.raises(UnsupportedError, match=r"a\.weight: rows have 10 weights, which pattern 2:4"):
        require_fitting(pattern_of("2:4", 0.5), 10, "a.weight")
