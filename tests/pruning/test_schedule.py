"""How many weights are zero when, and which: as the plain versions say, and exactly as many as asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oracles import gradual as oracle
from pocketsize.pruning.movement import above, penalty_slope, score_slope
from pocketsize.pruning.pattern import Pattern, pattern_of
from pocketsize.pruning.rigl import drop_and_grow, share_moved
from pocketsize.pruning.schedule import (
    cubic,
    cuts,
    erdos_renyi,
    largest,
    masks,
    ramp,
    stairs,
    within,
    zeros_of,
)

WHOLE = Pattern(0.5)


def scores(seed: int, *shapes: tuple[int, int], ties: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(4 * s).round() / 4 for s in drawn] if ties else drawn


@pytest.mark.parametrize("done", [0.0, 0.1, 0.2, 0.333, 0.5, 0.749, 0.75, 1.0])
def test_schedules_are_those_of_their_papers(done: float) -> None:
    part = ramp(done, 0.1, 0.75)
    assert cubic(part, 0.2, 0.9) == pytest.approx(oracle.cubic(done, 0.1, 0.75, 0.2, 0.9))
    for cycles in (1, 3, 7):
        want = oracle.stairs(done, 0.1, 0.75, 0.2, 0.9, cycles)
        assert stairs(part, 0.2, 0.9, cycles) == pytest.approx(want)
    assert share_moved(part, 0.3) == pytest.approx(oracle.moved_share(part, 0.3))


def test_every_cycle_is_a_training_of_its_own() -> None:
    edges = [0.0, 0.35, 0.6, 1.0]
    for a, b, number in zip(edges, edges[1:], range(3), strict=False):
        middle = (a + b) / 2
        assert cuts(ramp(middle, 0.1, 0.6), 2) == number
        assert within(middle, 0.1, 0.6, 2) == pytest.approx(0.5)
        assert within(a, 0.1, 0.6, 2) == pytest.approx(0.0, abs=1e-9)
    assert within(1.0, 0.1, 1.0, 2) == 1.0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [0, 1, 17, 60, 95, 96])
def test_the_largest_are_exactly_so_many(count: int, ties: bool) -> None:
    given = scores(count, (4, 8), (8, 8), ties=ties)
    given[0][0, 0], given[1][0, :2], given[1][1, :2] = float("inf"), float("-inf"), torch.tensor([0.0, -0.0])
    before = [s.clone() for s in given]
    found = largest(given, count)
    assert sum(int(m.sum()) for m in found) == count
    assert all(torch.equal(m, want) for m, want in zip(found, oracle.largest(given, count), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_numbers_that_differ_in_their_last_bit_are_told_apart() -> None:
    low = torch.tensor([1.0])
    up = torch.nextafter(low, torch.tensor([2.0]))
    assert largest([torch.cat([low, up, low])], 1)[0].tolist() == [False, True, False]
    assert largest([torch.cat([-up, -low, -up])], 1)[0].tolist() == [False, True, False]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", ["2:4", "1:4", "4:8"])
def test_of_neighbours_so_many_stay(name: str, ties: bool) -> None:
    (score,), pattern = scores(3, (6, 16), ties=ties), pattern_of(name, 0.5)
    (whole,) = masks([score], pattern, pattern.sparsity, "matrix")
    assert torch.equal(whole, oracle.neighbours(score, pattern.kept, pattern.of))


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5])
def test_on_the_way_to_a_pattern_only_those_go_that_it_will_not_keep(sparsity: float) -> None:
    (score,) = scores(4, (6, 16))
    (found,) = masks([score], pattern_of("2:4", 0.5), sparsity, "matrix")
    assert torch.equal(found, oracle.towards(score, 2, 4, round(96 * sparsity)))


@pytest.mark.parametrize("scope", ["matrix", "model", "erk"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.97])
def test_the_share_of_zeros_is_what_was_asked_for(scope: str, sparsity: float) -> None:
    shapes = [(16, 16), (16, 64), (64, 16)]
    given = [s.abs() for s in scores(5, *shapes)]
    given[1] *= 3
    found = masks(given, WHOLE, sparsity, scope)
    zeros = [int((~m).sum()) for m in found]
    if scope == "model":
        assert sum(zeros) == round(sum(m.numel() for m in found) * sparsity)
        assert zeros[1] / found[1].numel() < zeros[2] / found[2].numel()
    elif scope == "matrix":
        assert zeros == [round(m.numel() * sparsity) for m in found]
    else:
        assert zeros == zeros_of(shapes, sparsity, "erk")
        assert abs(sum(zeros) - sum(m.numel() for m in found) * sparsity) <= 2
    for score, mask in zip(given, found, strict=True):
        assert not mask.any() or mask.all() or score[mask].min() > score[~mask].max()


@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_small_matrices_keep_more(density: float) -> None:
    shapes = [(8, 8), (64, 64), (64, 256), (512, 128)]
    found = erdos_renyi(shapes, density)
    assert found == pytest.approx(oracle.erdos_renyi(shapes, density), rel=1e-6)
    assert found == sorted(found, reverse=True) and max(found) <= 1


@pytest.mark.parametrize("count", [0, 1, 9, 20])
def test_weights_change_places_as_in_rigl(count: int) -> None:
    W, g, s = scores(6, (8, 12), (8, 12), (8, 12))
    mask = largest([s], 40)[0]
    found = drop_and_grow(W, g, mask, count, WHOLE)
    assert torch.equal(found, oracle.drop_and_grow(W, g, mask, count))
    assert int(found.sum()) == 40
    # What is left of the weights that were there is the largest of them.
    gone = mask & ~found
    assert not gone.any() or W[gone].abs().max() <= W[mask & found].abs().max()


@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_in_a_pattern_weights_change_places_with_neighbours(count: int) -> None:
    W, g, s = scores(7, (8, 12), (8, 12), (8, 12))
    pattern = pattern_of("2:4", 0.5)
    mask = oracle.neighbours(s, 2, 4)
    found = drop_and_grow(W, g, mask, count, pattern)
    assert torch.equal(found, oracle.swapped(W, g, mask, count, 4))
    assert bool((found.view(-1, 4).sum(1) == 2).all()) and int((found != mask).sum()) == 2 * count


def test_scores_add_up_what_moves_away_from_zero() -> None:
    """One step of plain descent, against autograd through a mask that is let through."""
    W, S, x = (t.double().requires_grad_(True) for t in scores(8, (4, 6), (4, 6), (3, 6)))
    mask = (S.detach() > 0).double()
    through = mask + S - S.detach()  # straight through
    loss = ((x @ (W * through).T) ** 2).sum()
    loss.backward()
    assert W.grad is not None and S.grad is not None
    product = (W * mask).detach().requires_grad_(True)
    ((x.detach() @ product.T) ** 2).sum().backward()
    assert product.grad is not None
    assert torch.allclose(score_slope(W.detach(), product.grad), S.grad)
    moves = -W.grad * W.detach() > 0  # the step makes |W| larger
    assert torch.equal(-S.grad[mask.bool()] > 0, moves[mask.bool()])


def test_the_penalty_has_the_slope_of_what_it_says() -> None:
    given = [s.double().requires_grad_(True) for s in scores(9, (4, 6), (8, 2))]
    (7.0 * torch.stack([torch.sigmoid(s).mean() for s in given]).mean()).backward()
    for s in given:
        assert torch.allclose(penalty_slope(s.detach(), 7.0, 2), s.grad)
    S = scores(9, (4, 6))[0]
    assert torch.equal(above(S, 0.1), torch.sigmoid(S) > 0.1)
