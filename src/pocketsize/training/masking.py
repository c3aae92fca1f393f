"""Texts of which some tokens are hidden, others at each reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pocketsize.training.examples import Batch


@dataclass(frozen=True, slots=True)
class Masking:
    """Hides each token of a batch with the chance `share`, drawn by `seed` and the number of the batch.

    `token` stands in for what is hidden; the tokens `kept`, which frame a text, never are. A teacher who
    knows its texts by heart says nothing new of them; of their masked readings it does (Tang et al.,
    arXiv:1903.12136, section 3.3).
    """

    share: float
    token: int
    kept: tuple[int, ...]
    seed: int

    def over(self, read: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """The batches, by the same numbers, with tokens hidden."""

        def batch(number: int) -> Batch:
            found = read(number)
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            hidden = torch.rand(found.ids.shape, generator=draw) < self.share
            hidden &= found.mask & ~torch.isin(found.ids, torch.tensor(self.kept))
            return replace(found, ids=found.ids.masked_fill(hidden, self.token))

        return batch
