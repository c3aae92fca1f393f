"""Embeddings of sentences by stock transformers, the same for every encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from pocketsize.measurement.embedding import mean_pool

BATCH = 32


def embed(
    model: nn.Module, tokenizer: object, texts: Sequence[str], *, length: int | None = None
) -> np.ndarray:
    """Unit embeddings, one row per sentence; of at most `length` tokens each, None for all."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    rows: list[np.ndarray] = [np.empty(0)] * len(texts)
    cut = {} if length is None else {"truncation": True, "max_length": length}
    for a in range(0, len(order), BATCH):
        index = order[a : a + BATCH]
        batch = tokenizer([texts[i] for i in index], padding=True, return_tensors="pt", **cut)
        mask = batch["attention_mask"]
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        for i, row in zip(index, mean_pool(hidden, mask.bool()).numpy(), strict=True):
            rows[i] = row
    return np.stack(rows)
