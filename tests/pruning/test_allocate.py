"""Shares of matrices against counting."""

import pytest
import torch

from pocketsize.pruning.allocate import by_outliers, by_threshold, evened, outlier_share, sketch


def test_outliers_are_counted():
    score = torch.ones(10, 10)
    score[0, :3] = 100.0
    assert outlier_share(score) == pytest.approx(0.03)


def test_the_part_with_most_outliers_loses_least_and_the_mean_is_what_was_asked_for():
    found = by_outliers([0.01, 0.03, 0.02], 0.5, 0.1)
    assert sum(found) / 3 == pytest.approx(0.5)
    assert found[1] < found[2] < found[0]
    assert max(found) - min(found) == pytest.approx(0.2)
    assert by_outliers([0.02, 0.02], 0.6, 0.1) == [0.6, 0.6]


def test_the_lowest_scores_of_all_go():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(40, 50, generator=generator), "b": 2 * torch.rand(30, 20, generator=generator)}
    weights = {name: s.numel() for name, s in scores.items()}
    found = by_threshold({n: sketch(s) for n, s in scores.items()}, weights, 0.5, 0.5)
    every = torch.cat([s.flatten() for s in scores.values()]).sort().values
    edge = every[len(every) // 2]
    for name, score in scores.items():
        assert found[name] == pytest.approx(float((score < edge).double().mean()), abs=0.01)


def test_no_matrix_is_further_from_the_mean_than_the_spread():
    scores = {"a": sketch(torch.full((8, 8), 1.0)), "b": sketch(torch.full((8, 8), 5.0))}
    found = by_threshold(scores, {"a": 64, "b": 64}, 0.5, 0.1)
    assert found["a"] == pytest.approx(0.6, abs=0.01) and found["b"] == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("sparsity", [0.002, 0.3, 0.5, 0.9, 0.97, 0.995])
def test_the_mean_is_what_was_asked_for_whatever_lies_at_an_edge(sparsity: float):
    shares, weights = {"a": sparsity - 0.2, "b": sparsity, "c": sparsity + 0.2}, {"a": 10, "b": 70, "c": 40}
    found = evened(shares, weights, sparsity)
    assert sum(found[n] * weights[n] for n in found) / 120 == pytest.approx(sparsity, abs=1e-9)
    assert all(min(0.01, sparsity) <= share <= max(0.99, sparsity) for share in found.values())
    assert found["a"] <= found["b"] <= found["c"]
    by_block = by_outliers([0.01, 0.03, 0.02], sparsity, 0.2)
    assert sum(by_block) / 3 == pytest.approx(sparsity, abs=1e-9)
