"""What the mask of a pruned matrix must look like."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pocketsize.errors import UsageError

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True, slots=True)
class Pattern:
    """How many weights of a matrix are zero, and where they may lie.

    `sparsity` is the share that is zero. In an n:m pattern `kept` of every `of` neighbours along a row are
    left, 2:4 being what graphics processors multiply; `of` 0 means that zeros may lie anywhere. A model in
    which some matrices have fewer zeros than others, or none, is `uneven`.
    """

    sparsity: float
    kept: int = 0
    of: int = 0
    uneven: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UsageError(
                "sparsity is the share of weights that become zero, above 0 and below 1; "
                f"got {self.sparsity:g}"
            )

    @property
    def name(self) -> str:
        """`2:4`, or `unstructured`."""
        return f"{self.kept}:{self.of}" if self.of else UNSTRUCTURED


def said_of(pattern: Pattern) -> dict[str, object]:
    """A pattern as configs hold it."""
    said: dict[str, object] = {"structure": pattern.name, "share": pattern.sparsity}
    return said | ({"uneven": True} if pattern.uneven else {})


def pattern_of(name: str, sparsity: float) -> Pattern:
    """The pattern with this name; that of an n:m pattern says how many weights are zero by itself."""
    if name == UNSTRUCTURED:
        return Pattern(sparsity)
    if (found := re.fullmatch(r"(\d+):(\d+)", name)) is None:
        raise UsageError(f"pattern is {UNSTRUCTURED} or kept:of, such as 2:4 or 4:8; got {name!r}")
    kept, of = int(found[1]), int(found[2])
    if not 0 < kept < of:
        most = f"1 to {of - 1}" if of > 2 else "1"
        raise UsageError(f"pattern {name}: it is kept:of, such as 2:4; of {of} weights {most} can be kept")
    return Pattern(1 - kept / of, kept, of)
