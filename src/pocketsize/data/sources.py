"""Where text comes from: files, and which share of the windows they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pocketsize.errors import UsageError

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Source:
    """Files that belong together, such as those of one language.

    `files` are paths or globs, `share` the part of all windows that comes from them. In files with
    rows (jsonl, csv, parquet, `datasets` folders), `column` holds the text or the messages (null for
    `text`, else `messages`), and at most the first `rows` rows of each file are read (null for all).
    For classifiers, `label` holds what a text is, and `pair` the second text of a pair (null for
    `label` and `pair`, where there are such columns); trainings of embedders read both texts, each by itself.
    """

    files: tuple[str, ...]
    share: float = 1.0
    column: str | None = None
    rows: int | None = None
    label: str | None = None
    pair: str | None = None

    def __post_init__(self) -> None:
        if not self.files or not all(isinstance(file, str) and file for file in self.files):
            raise UsageError(f"files: name files or globs, such as corpus/*.txt, got {list(self.files)!r}")
        share = self.share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise UsageError(f"share must lie between 0 and 1, got {share!r}")
        for key in ("column", "label", "pair"):
            name = getattr(self, key)
            if name is not None and (not isinstance(name, str) or not name):
                raise UsageError(f"{key} must be the name of a column, got {name!r}")
        rows = self.rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise UsageError(f"rows must be a positive number, got {rows!r}")

    @property
    def name(self) -> str:
        """The files, as they were named."""
        return ", ".join(self.files)


def share_gap(sources: Sequence[Source]) -> str | None:
    """What is wrong with shares that do not add up to 1; None where they do."""
    total = math.fsum(source.share for source in sources)
    return None if abs(total - 1) <= TOLERANCE else f"the shares add up to {total:.7g}; they must add up to 1"


def apportion(count: int, shares: Sequence[float]) -> list[int]:
    """`count` in whole numbers by shares: the largest remainders are rounded up, earlier ones first."""
    exact = [count * share for share in shares]
    whole = [math.floor(number) for number in exact]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: count - sum(whole)]:
        whole[i] += 1
    return whole
