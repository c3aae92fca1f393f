"""Sources: shares add up, and whole windows follow them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pocketsize.data.sources import Source, apportion, share_gap
from pocketsize.errors import UsageError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Source(()), "files: name files"),
        (lambda: Source(("a", "")), "files: name files"),
        (lambda: Source(("a",), share=0), "share must lie between 0 and 1, got 0"),
        (lambda: Source(("a",), share=1.5), "share must lie between 0 and 1"),
        (lambda: Source(("a",), share=float("nan")), "share must lie between 0 and 1"),
        (lambda: Source(("a",), share="0.3"), "share must lie between 0 and 1, got '0.3'"),  # type: ignore[arg-type]
        (lambda: Source(("a",), column=""), "column must be the name"),
        (lambda: Source(("a",), rows=0), "rows must be a positive number, got 0"),
        (lambda: Source(("a",), rows=True), "rows must be a positive number, got True"),
    ],
)
def test_a_source_checks_itself(make: Callable[[], Source], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_shares_add_up_to_one_within_a_millionth() -> None:
    def gap(*shares: float) -> str | None:
        return share_gap([Source(("a",), share) for share in shares])

    assert gap(1.0) is gap(0.3, 0.7) is gap(*[0.1] * 10) is gap(1 / 3, 1 / 3, 0.3333336) is None
    assert gap(0.3, 0.3) == "the shares add up to 0.6; they must add up to 1"
    assert gap(0.5, 0.500002) is not None and gap(1.0, 1.0) is not None


def test_apportioned_counts_add_up_and_are_within_one_of_exact() -> None:
    generator = random.Random(0)
    for _ in range(200):
        raw = [generator.random() for _ in range(generator.randint(1, 6))]
        shares = [x / sum(raw) for x in raw]
        count = generator.randint(1, 300)
        whole = apportion(count, shares)
        assert sum(whole) == count
        assert all(abs(n - count * share) < 1 for n, share in zip(whole, shares, strict=True))
    assert apportion(128, [0.3, 0.7]) == [38, 90]
    assert apportion(1, [0.5, 0.5]) == [1, 0]
