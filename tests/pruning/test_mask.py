"""Masks against sorting."""

import pytest
import torch
from tests.oracles.pruning import highest_slow

from pocketsize.errors import UnsupportedError
from pocketsize.pruning.mask import about, highest, lacking, require_fitting
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


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.name} {p.sparsity}")
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("gone", [0.2, 0.7])
def test_what_is_not_there_goes_first_and_never_stays(pattern, scope, gone):
    """Scores of 0 are no reason to stay behind what is gone already."""
    generator = torch.Generator().manual_seed(3)
    score = torch.randint(0, 3, (7, 40), generator=generator).float()
    there = torch.rand(7, 40, generator=generator) > gone
    mask = highest(score, pattern, scope, there=there)
    assert torch.equal(mask, highest_slow(score, pattern, scope, there))
    assert not bool((mask & ~there).any())
    if scope == "matrix" and not pattern.of and int((~there).sum()) <= pattern.sparsity * 280:
        assert int((~mask).sum()) == int((~highest(score, pattern)).sum())


def test_an_edge_that_is_estimated_leaves_out_what_is_not_there():
    generator = torch.Generator().manual_seed(4)
    score = torch.rand(300, 300, generator=generator)
    there = torch.rand(300, 300, generator=generator) > 0.3
    mask = about(score, Pattern(0.5), there=there)
    assert not bool((mask & ~there).any())
    assert float(mask.double().mean()) == pytest.approx(0.5, abs=0.02)


WHOLE = torch.ones(4, 8)
HALVES = torch.tensor([1.0, 0, 1, 0]).repeat(4, 2)
FRONT = torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 0]).repeat(4, 1)
LACKS = [
    (WHOLE, Pattern(0.5), "0 of its weights are zero"),
    (HALVES, Pattern(0.5), None),
    (FRONT, Pattern(0.4), None),
    (FRONT, Pattern(0.9), "0.5 of its weights are zero"),
    (HALVES, pattern_of("2:4", 0.5), None),
    (HALVES, pattern_of("1:4", 0.5), "8 of 8 groups of 4 keep more than 1"),
    (FRONT, pattern_of("2:4", 0.5), "4 of 8 groups of 4 keep more than 2"),
    (FRONT, pattern_of("1:3", 0.5), "rows have 8 weights"),
    (FRONT, pattern_of("4:8", 0.5), None),
]


@pytest.mark.parametrize(("W", "pattern", "said"), LACKS)
def test_what_a_matrix_lacks_of_a_pattern(W, pattern, said):
    assert lacking(W, pattern) == said


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.name} {p.sparsity}")
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_no_mask_lacks_what_it_was_made_for(pattern, scope):
    score = torch.rand(7, 40, generator=torch.Generator().manual_seed(1))
    assert lacking(highest(score, pattern, scope).float(), pattern) is None
    assert lacking(highest(score.T.reshape(40, 7).T, pattern, scope).float(), pattern) is None


def test_one_weight_always_stays():
    assert int(highest(torch.rand(1, 8), Pattern(0.99)).sum()) == 1


def test_rows_that_a_pattern_does_not_divide_are_refused_by_name():
    require_fitting(pattern_of("2:4", 0.5), 12, "a.weight")
    with pytest.raises(UnsupportedError, match=r"a\.weight: rows have 10 weights, which pattern 2:4"):
        require_fitting(pattern_of("2:4", 0.5), 10, "a.weight")
