from __future__ import annotations

from pocketsize.exporting.agreement import Agreement


def test_of_many_disagreements_the_worst_are_told() -> None:
    many = tuple(float(i) for i in range(1024, 0, -1))
    said = Agreement(2048, 2048, many, None).sentence
    assert said.endswith(
        "; margins of the 1024 others, the largest 8: " + ", ".join(f"{m:.2f}" for m in many[:8])
    )
    few = Agreement(2048, 2048, many[-2:], None).sentence
    assert few.endswith("; margins of the 2 others: 2.00, 1.00")
