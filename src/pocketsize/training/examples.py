"""What a training reads: packed windows for generators, texts of their own length for encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from pocketsize.errors import DataError, UsageError

# So many batches are filled from one drawn pool, sorted by length: padding falls, chance stays.
POOL = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Token sequences of one batch, padded at the end; `rows` are their numbers among all examples.

    `written`: the student wrote them itself, so their tokens are nobody's truth. `block` is the number of the
    one block that the batch teaches, where blocks are taught one after the other. `turn` is the batch's own
    number in the training.
    """

    ids: Int64[Tensor, "n s"]
    mask: Bool[Tensor, "n s"]
    rows: tuple[int, ...]
    labels: Int64[Tensor, "n"] | None = None
    written: bool = False
    block: int | None = None
    turn: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device), labels=labels)


@dataclass(frozen=True)
class Examples:
    """Token sequences one after the other: row i is `flat[starts[i] : starts[i + 1]]`.

    `labels` has one class for each row, if any has one, `UNKNOWN` where nobody told it. `sha256` pins them
    all. A `part` of others has the `numbers` that its rows have there.
    """

    flat: np.ndarray
    starts: np.ndarray
    pad: int
    name: str
    labels: np.ndarray | None = None
    numbers: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.starts) < 2:
            raise DataError(f"{self.name}: holds nothing to train on; give more text or a shorter length")

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.starts)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.flat)

    @cached_property
    def sha256(self) -> str:
        """Pins the tokens, where rows begin, and the labels."""
        digest = hashlib.sha256()
        for part in (self.flat, self.starts, self.labels):
            digest.update(b"" if part is None else np.ascontiguousarray(part, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows as one batch."""
        width = max(int(self.lengths[row]) for row in rows)
        ids = np.full((len(rows), width), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            part = self.flat[self.starts[row] : self.starts[row + 1]]
            ids[i, : len(part)], mask[i, : len(part)] = part, True
        labels = None if self.labels is None else torch.from_numpy(self.labels[list(rows)].astype(np.int64))
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), self.numbers_of(rows), labels)

    def numbers_of(self, rows: Sequence[int]) -> tuple[int, ...]:
        """What numbers these rows have among all examples."""
        return tuple(int(row if self.numbers is None else self.numbers[row]) for row in rows)

    def part(self, rows: Sequence[int]) -> Examples:
        """These rows as examples of their own."""
        pieces = [self.flat[self.starts[row] : self.starts[row + 1]] for row in rows]
        labels = None if self.labels is None else self.labels[list(rows)]
        found = of_rows(pieces, self.pad, self.name, labels)
        return replace(found, numbers=np.array(self.numbers_of(rows)))


def of_rows(pieces: Sequence[np.ndarray], pad: int, name: str, labels: np.ndarray | None = None) -> Examples:
    """Examples of token sequences."""
    starts = np.cumsum([0, *map(len, pieces)])
    flat = np.concatenate([np.empty(0, dtype=np.int32), *pieces]).astype(np.int32)
    return Examples(flat, starts, pad, name, labels)


def split(examples: Examples, judges: int, seed: int) -> tuple[Examples, Examples]:
    """What teaches and what judges: so many rows drawn by the seed, a fourth of all at most."""
    count = min(judges, len(examples) // 4)
    if not count:
        raise DataError(
            f"{examples.name}: {len(examples)} rows of text are too few to hold some out; give more text, or "
            "a shorter length"
        )
    rows = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return examples.part(sorted(rows[count:])), examples.part(sorted(rows[:count]))


def joined(text: Examples, own: Sequence[np.ndarray], rows: int, seed: int) -> Examples:
    """These rows of tokens, and so many of the text's, drawn by the seed: one at least, all at most."""
    count = max(1, min(rows, len(text)))
    drawn = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    of_text = [text.flat[text.starts[row] : text.starts[row + 1]] for row in sorted(drawn)]
    return of_rows([*of_text, *own], text.pad, f"{text.name} and what the model writes")


@dataclass(frozen=True)
class Order:
    """Which rows each batch has: every row once an epoch, in an order that `seed` and the epoch decide.

    Any batch can be asked for by its number, so a training that was cut off goes on in the middle of an
    epoch without repeating what led there. Rows of near lengths are put together (`POOL` batches' worth of
    drawn rows are sorted); the last batch of an epoch may be smaller.
    """

    examples: Examples
    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"batch must be at least 1, got {self.size}")

    @cached_property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.examples) // self.size)

    def batch(self, number: int) -> Batch:
        """The batch with this number, counted over all epochs."""
        return self.examples.batch(self.rows(number))

    def rows(self, number: int) -> list[int]:
        """The rows of the batch with this number."""
        epoch, at = divmod(number, self.per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = list(self._draw(epoch))
        return self._epochs[epoch][at]

    def read(self, batches: int | None) -> list[int]:
        """The rows that so many batches from the first read, all of them where it is None."""
        if batches is None or batches >= self.per_epoch:
            return list(range(len(self.examples)))
        return sorted({row for number in range(batches) for row in self.rows(number)})

    @cached_property
    def _epochs(self) -> dict[int, list[list[int]]]:
        return {}

    def _draw(self, epoch: int) -> Iterator[list[int]]:
        draw = np.random.default_rng((self.seed, epoch))
        rows, lengths = draw.permutation(len(self.examples)), self.examples.lengths
        found: list[list[int]] = []
        for a in range(0, len(rows), POOL * self.size):
            pool = rows[a : a + POOL * self.size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            found += [pool[b : b + self.size].tolist() for b in range(0, len(pool), self.size)]
        for i in draw.permutation(len(found)):
            yield found[i]
