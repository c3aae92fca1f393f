from __future__ import annotations

import pytest
import torch

from oracles import distillation as oracle
from pocketsize.distillation.feature import (
    as_heads,
    cosine_distance,
    even_blocks,
    hidden_distance,
    layer_map,
    pair_distance,
    relation_distance,
)

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


def states(seed: int, width: int = 8) -> torch.Tensor:
    return torch.randn(2, 4, width, generator=torch.Generator().manual_seed(seed))


def test_relations_equal_the_plain_loop() -> None:
    """Students may be narrower than their teachers: only heads have to agree."""
    a, b, c, d = (as_heads(states(i, width), 2) for i, width in enumerate((8, 8, 12, 12)))
    found = relation_distance((a, b), (c, d), MASK)
    assert torch.allclose(found.double(), oracle.relation(a, b, c, d, MASK), atol=1e-6)


@pytest.mark.parametrize("distance", [hidden_distance, cosine_distance])
def test_padding_does_not_count_and_equals_are_at_no_distance(distance) -> None:  # type: ignore[no-untyped-def]
    x, y = states(0), states(1)
    assert float(distance(x, x, MASK)) == pytest.approx(0, abs=1e-6)
    other = x.clone()
    other[0, 3] = 100.0
    assert torch.equal(distance(x, y, MASK), distance(other, y, MASK))
    assert float(distance(x, y, MASK)) > 0


def test_relations_of_padding_do_not_count_either() -> None:
    q, k = (as_heads(states(i), 2) for i in range(2))
    other = states(0)
    other[0, 3] = 9.0
    teacher = tuple(as_heads(states(i), 2) for i in (2, 3))
    same = relation_distance((q, k), teacher, MASK)  # type: ignore[arg-type]
    assert torch.allclose(same, relation_distance((as_heads(other, 2), k), teacher, MASK), atol=1e-6)  # type: ignore[arg-type]
    assert float(relation_distance((q, k), (q, k), MASK)) == pytest.approx(0, abs=1e-6)


def test_pairs_are_compared_whatever_the_widths_and_rotations() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert float(pair_distance(x, 3 * x @ turn)) == pytest.approx(0, abs=1e-6)
    y = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    cosines = [torch.nn.functional.normalize(z, dim=-1) for z in (x, y)]
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    wanted = sum(
        float((cosines[0][i] @ cosines[0][j] - cosines[1][i] @ cosines[1][j]) ** 2) for i, j in pairs
    ) / len(pairs)
    assert float(pair_distance(x, y)) == pytest.approx(wanted, rel=1e-5)
    assert float(pair_distance(x[:1], y[:1])) == 0


def test_blocks_are_spread_evenly() -> None:
    assert (
        even_blocks(6, 12) == (0, 2, 4, 7, 9, 11)
        and even_blocks(20, 30)[-1] == 29
        and even_blocks(1, 5) == (0,)
    )
    assert layer_map(6, 12) == (1, 3, 5, 7, 9, 11) and layer_map(3, 3) == (0, 1, 2)
    for kept in range(1, 31):
        assert len({*even_blocks(kept, 30)}) == kept == len({*layer_map(kept, 30)})
    with pytest.raises(ValueError, match="cannot be kept"):
        even_blocks(4, 3)
    with pytest.raises(ValueError, match="cannot follow"):
        layer_map(4, 3)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        as_heads(states(0), 3)
    two, four = as_heads(states(0), 2), as_heads(states(0), 4)
    with pytest.raises(ValueError, match="2 heads cannot follow relations of 4"):
        relation_distance((two, two), (four, four), MASK)
