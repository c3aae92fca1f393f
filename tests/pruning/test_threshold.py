"""One threshold for many matrices, against sorting all weights at once."""

import pytest
import torch
from tests.oracles.pruning import highest_slow

from pocketsize.pruning import threshold
from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.threshold import edge_of

SHAPES = [(7, 40), (3, 5), (16, 16), (1, 9)]


def drawn(whole: bool, scale: float = 1.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    if whole:
        return [torch.randint(-2, 3, shape, generator=g).float() for shape in SHAPES]
    return [scale * (i + 1) * torch.randn(shape, generator=g) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("whole", [True, False], ids=["many equal", "none equal"])
def test_what_stays_is_what_sorting_all_weights_keeps(share, whole, monkeypatch):
    """The last matrix is the smallest in number and the largest in weight."""
    monkeypatch.setattr(threshold, "PART", 13)
    matrices = drawn(whole)
    together = torch.cat([W.flatten() for W in matrices])
    expected = highest_slow(together.abs()[None], Pattern(share))[0].split([W.numel() for W in matrices])
    edge = edge_of(lambda: iter(matrices), round(share * len(together)))
    for i, (W, mask) in enumerate(zip(matrices, expected, strict=True)):
        assert torch.equal(edge.mask(W, i), mask.view(W.shape))


def test_sizes_of_any_order_of_magnitude():
    for scale in (1e-40, 1e-20, 1e30):
        matrices = drawn(False, scale)
        edge = edge_of(lambda matrices=matrices: matrices, 200)
        assert sum(int((~edge.mask(W, i)).sum()) for i, W in enumerate(matrices)) == 200


def test_zeros_that_are_there_are_the_first_to_go():
    matrices = [W * (W.abs() > 0.5) for W in drawn(False)]
    there = sum(int(W.count_nonzero()) for W in matrices)
    total = sum(W.numel() for W in matrices)
    edge = edge_of(lambda: matrices, total - there + 10)
    assert sum(int((W * edge.mask(W, i)).count_nonzero()) for i, W in enumerate(matrices)) == there - 10
