"""Which windows of tokens run together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

BATCH_TOKENS = 2048
# One window, or one batch, in so many judges what the others suggest.
HELD_OUT = 4


def windows_per_batch(length: int) -> int:
    """How many windows of this many tokens run together."""
    return max(1, BATCH_TOKENS // length)


def batches_of(mask: Bool[Tensor, "n length"], tokens: int | None = None) -> list[tuple[slice, int]]:
    """The batches of padded windows, in their order: which windows each has, and how wide it is.

    Neighbours of about one width run together, one at least, at most so many tokens with their padding
    (`BATCH_TOKENS`); none is wider than the widest of its windows, nor twice as wide as the narrowest.
    """
    most = BATCH_TOKENS if tokens is None else tokens
    found, start, low, high = list[tuple[slice, int]](), 0, 0, 0
    for i, width in enumerate(_widths(mask)):
        narrow, wide = (min(low, width), max(high, width)) if i > start else (width, width)
        if i > start and ((i - start + 1) * wide > most or 2 * narrow <= wide):
            found.append((slice(start, i), high))
            start, narrow, wide = i, width, width
        low, high = narrow, wide
    return [*found, (slice(start, len(mask)), high)] if len(mask) else found


def in_batches(
    ids: Int64[Tensor, "n length"], mask: Bool[Tensor, "n length"], tokens: int | None = None
) -> Iterator[tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"]]]:
    """The windows batch by batch, with no more padding than each batch needs."""
    for rows, width in batches_of(mask, tokens):
        yield ids[rows, :width], mask[rows, :width]


def worth(mask: Bool[Tensor, "n length"], windows: int) -> int:
    """How many of the first windows hold as many tokens as so many full ones; at most all of them."""
    counted = mask.sum(1).cumsum(0)
    return min(len(mask), int((counted < windows * mask.shape[1]).sum()) + 1)


def full_windows(mask: Bool[Tensor, "n length"]) -> int:
    """How many full windows hold as many tokens as these."""
    return -(-int(mask.sum()) // mask.shape[1])


def mean_width(mask: Bool[Tensor, "n length"]) -> int:
    """How many tokens the window of a token has, in the mean over tokens."""
    counts = mask.sum(1)
    return max(1, int((counts * counts).sum()) // max(1, int(counts.sum())))


def _widths(mask: Bool[Tensor, "n length"]) -> list[int]:
    """Where the last real token of each window ends; a window without one is one token wide."""
    ends = mask.cpu() * torch.arange(1, mask.shape[1] + 1)
    return ends.amax(1).clamp_min(1).tolist()
