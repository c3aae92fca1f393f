"""Every combination of choices, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from pocketsize.quantization.allocate import Choice


def least_loss(matrices: Sequence[Sequence[Choice]], budget_bytes: int) -> float:
    """The least loss of all combinations within the budget."""
    fitting = (
        sum(choice.loss for choice in picked)
        for picked in product(*matrices)
        if sum(choice.bytes for choice in picked) <= budget_bytes
    )
    return min(fitting)
