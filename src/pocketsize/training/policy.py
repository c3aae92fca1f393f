"""Batches whose text the student writes itself, as it goes on where training text left off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from pocketsize.data.written import continued
from pocketsize.training.examples import Batch, Order

# So many written batches are kept for being read again.
KEPT = 32


@dataclass
class Policy:
    """Batches of an order; the share `written` of them is continued by the student from `prompt` of its text.

    GKD (arXiv:2306.13649): a student meets its own mistakes, and its teacher says of each token what it
    would have written there; no gradient passes through the writing. Of written batches the share `replay`
    is one that the student wrote earlier (DistiLLM, arXiv:2402.03898, section 3.2): writing takes longer than
    learning. Everything follows from `seed`, the number of a batch, the student's weights then, and what is
    remembered of earlier ones, which a checkpoint holds.
    """

    order: Order
    student: nn.Module
    written: float
    replay: float = 0.0
    prompt: float = 0.5
    seed: int = 0
    count: int = 0
    buffer: dict[int, Tensor] = field(default_factory=dict)

    def batch(self, number: int) -> Batch:
        """The batch with this number."""
        draw = np.random.default_rng((self.seed, number, len("policy")))
        own, again, place, chance = draw.random(), draw.random(), draw.random(), draw.integers(2**62)
        text = self.order.batch(number)
        if own >= self.written:
            return text
        if self.buffer and again < self.replay:
            ids = self.buffer[int(place * len(self.buffer))].long()
        else:
            ids = self._continued(text, torch.Generator().manual_seed(int(chance)))
            self.buffer[self.count % KEPT] = ids.to(torch.int32)
            self.count += 1
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), (), written=True)

    def _continued(self, text: Batch, generator: torch.Generator) -> Tensor:
        """The texts of a batch, cut off and continued, all to the length of the longest."""
        kept = max(1, round(self.prompt * int(text.mask.sum(1).min())))
        learning = self.student.training
        self.student.eval()
        try:
            return continued(self.student, text.ids[:, :kept], text.ids.shape[1], generator)
        finally:
            self.student.train(learning)

    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds of it."""
        if not self.replay:
            return {}
        return {"count": torch.tensor([self.count]), **{f"{i}": ids for i, ids in self.buffer.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.buffer = {int(name): ids.clone() for name, ids in tensors.items() if name != "count"}
        self.count = int(tensors["count"]) if "count" in tensors else 0
