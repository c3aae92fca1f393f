"""The table that a student begins as, against its oracle."""

from __future__ import annotations

import numpy as np
import pytest

from oracles.tokens import principal_slow
from pocketsize.distillation.tokens import principal


def drawn() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 6)) * [5, 1, 3, 0.5, 2, 0.1] + rng.normal(size=6)


@pytest.mark.parametrize("width", [1, 3, 6])
def test_coordinates_are_those_of_one_direction_after_the_other(width: int) -> None:
    (found, directions), wanted = principal(drawn(), width), principal_slow(drawn(), width)
    signs = np.sign((found * wanted).sum(0))
    np.testing.assert_allclose(found * signs, wanted, atol=1e-6)
    assert (found**2).mean() == pytest.approx(1)
    np.testing.assert_allclose(directions.T @ directions, np.eye(width), atol=1e-12)
    along = (drawn() - drawn().mean(0)) @ directions
    np.testing.assert_allclose(found, along / np.sqrt((along**2).mean()), atol=1e-12)


def test_all_directions_keep_every_distance() -> None:
    vectors = drawn()
    table, _ = principal(vectors, 6)
    apart, wanted = (np.linalg.norm(x[:, None] - x[None], axis=2) for x in (table, vectors))
    np.testing.assert_allclose(apart, wanted * apart[0, 1] / wanted[0, 1], rtol=1e-6, atol=1e-9)


def test_there_are_no_more_coordinates_than_directions() -> None:
    flat = drawn()[:, :1] * np.ones(6)
    assert principal(flat, 4)[0].shape == (40, 1) and principal(drawn(), 9)[0].shape == (40, 6)
    with pytest.raises(ValueError, match="the same"):
        principal(np.ones((4, 3)), 2)
