"""Patterns and their names."""

import pytest

from pocketsize.errors import UsageError
from pocketsize.pruning.pattern import Pattern, pattern_of


def test_an_n_of_m_pattern_says_its_sparsity_by_itself():
    assert pattern_of("2:4", 0.9) == Pattern(0.5, 2, 4)
    assert pattern_of("1:4", 0.5).sparsity == 0.75
    assert pattern_of("2:4", 0.5).name == "2:4"


def test_unstructured_takes_the_sparsity_that_is_asked_for():
    assert pattern_of("unstructured", 0.6) == Pattern(0.6)
    assert Pattern(0.6).name == "unstructured"


@pytest.mark.parametrize("name", ["4:4", "5:4", "0:4", "2-4", "2:", "dense"])
def test_what_is_no_pattern_is_refused(name):
    with pytest.raises(UsageError, match="pattern"):
        pattern_of(name, 0.5)


@pytest.mark.parametrize("sparsity", [0, 1, 1.5, -0.1, float("nan")])
def test_a_sparsity_that_leaves_all_or_nothing_is_refused(sparsity):
    with pytest.raises(UsageError, match="sparsity"):
        pattern_of("unstructured", sparsity)
