"""What a student's embeddings begin with: what the model that it stands for makes of each token alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pocketsize.data.calibration import frame_of
from pocketsize.distillation.tokens import principal
from pocketsize.errors import NumericalError
from pocketsize.measurement.embedding import embedded
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model

# Tokens whose hidden states wait together for the next block; in batches of so many.
PART, BATCH = 2**15, 256


def token_vectors(
    model: Model, tokens: Sequence[int], width: int
) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "wide width"]]:
    """What the model makes of a text of each of these tokens alone, in at most `width` numbers.

    They are coordinates along the directions of the model's channels that come second.
    Raises NumericalError where all of them come out the same.
    """
    before, after = frame_of(tokenizer_of(model))
    ids = torch.tensor([[*before, token, *after] for token in tokens])
    vectors = torch.cat([rows for part in ids.split(PART) for rows in embedded(model, _batches(part))])
    if not bool(vectors.isfinite().all()):
        raise NumericalError(f"student: start: {model.folder}: embeddings of single tokens are not finite")
    try:
        found, directions = principal(vectors.numpy(), width)
        return torch.from_numpy(found), torch.from_numpy(directions)
    except ValueError as error:
        raise NumericalError(f"student: start: tokens: {model.folder}: {error}") from error


def _batches(ids: Int64[Tensor, "n s"]) -> list[tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"]]]:
    return [(batch, torch.ones_like(batch, dtype=torch.bool)) for batch in ids.split(BATCH)]
