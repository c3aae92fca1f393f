"""What an embedder's student is told by its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pocketsize.distillation.bridge import bridge
from pocketsize.errors import NumericalError
from pocketsize.models.device import working_device
from pocketsize.recipes.signals import Room
from pocketsize.training.examples import Examples
from pocketsize.training.features import Features
from pocketsize.training.objective import Embedding, Losses, Teacher

# Texts for each dimension of the narrower model, from which a bridge is built; in batches of so many.
TEXTS, BATCH = 4, 32


def embedding(
    module: nn.Module, teachers: Sequence[Teacher], losses: Losses, room: Room, extra: Features | None
) -> Embedding:
    """The objective; where student and teacher have other widths, with a bridge from the one to the other."""
    found = Embedding(module, teachers[0], losses, extra=extra, dtype=room.dtype)
    widths = [int(model.config.hidden_size) for model in (room.student, room.teachers[0])]
    if widths[0] == widths[1] or not losses.soft:
        return found
    return replace(found, bridge=_bridge(found, room.whole, TEXTS * min(widths)))


@torch.no_grad()
def _bridge(found: Embedding, text: Examples, count: int) -> Float[Tensor, "b a"]:
    """From what both make of so many of the texts, evenly spaced; all of them if there are fewer."""
    rows = np.linspace(0, len(text) - 1, min(count, len(text))).astype(int)
    rows = rows[np.argsort(text.lengths[rows], kind="stable")]
    trained, parts = found.student.training, list[tuple[Tensor, Tensor]]()
    found.student.eval()
    for a in range(0, len(rows), BATCH):
        batch = text.batch(rows[a : a + BATCH].tolist()).to(working_device())
        parts.append(found.embeddings(batch))
    found.student.train(trained)
    both = [torch.cat(some).cpu() for some in zip(*parts, strict=True)]
    for some, who in zip(both, ("student", "teacher"), strict=True):
        if not bool(some.isfinite().all()):
            raise NumericalError(f"distill: embeddings of the {who} are not finite")
    return bridge(both[0], both[1]).to(working_device())
