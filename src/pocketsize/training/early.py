"""Blocks behind which a model is to know its next token before the last has spoken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from pocketsize.models.taps import tapped
from pocketsize.training.examples import Batch
from pocketsize.training.head import Head, Score, mean_over_vocabulary


@dataclass(frozen=True)
class Early:
    """The paths of blocks, the norm in front of the head that all of them share, and what their loss counts.

    A batch teaches one block, in turns: over many batches that is the mean over all of them at the price of
    one (LayerSkip, arXiv:2404.16710, section 4.1.2, takes turns too).
    """

    paths: tuple[str, ...]
    norm: nn.Module
    weight: float

    def path(self, batch: Batch) -> str:
        """The block that a batch teaches."""
        return self.paths[batch.turn % len(self.paths)]


# The loss behind the block that a batch teaches, once the forward pass has run.
Behind = Callable[[Bool[Tensor, "n s"], Head, Score], Float[Tensor, ""] | float]


@contextmanager
def heard_early(early: Early | None, student: nn.Module, batch: Batch) -> Iterator[Behind]:
    """What the forward pass inside the block gives behind an earlier block, judged as its end is."""
    if early is None:
        yield lambda kept, head, score: 0.0
        return
    path = early.path(batch)
    with tapped(student, [path]) as seen:

        def behind(kept: Bool[Tensor, "n s"], head: Head, score: Score) -> Float[Tensor, ""]:
            states = early.norm(seen[path].float())[kept]
            return early.weight * mean_over_vocabulary(states, head, score)

        yield behind
