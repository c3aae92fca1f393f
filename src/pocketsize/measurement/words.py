"""Two models of which one has a part of the other's tokens, read by both."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from pocketsize.data.calibration import Windows
from pocketsize.distillation.vocabulary import aligned
from pocketsize.errors import UnsupportedError
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.vocabulary import Speller, read_vocabulary

TOKENIZER = "tokenizer.json"


def shared_tokens(original: Model, compressed: Model) -> Int64[Tensor, "tokens"] | None:
    """The original's number of each token of a model that has fewer; None where both count alike."""
    rows = [int(model.config.vocab_size) for model in (original, compressed)]
    if rows[0] == rows[1] or original.folder == compressed.folder:
        return None
    own = [dict(tokenizer_of(model).get_vocab()) for model in (original, compressed)]
    try:
        found = aligned(own[1], own[0], rows[1], rows[0])
    except ValueError as error:
        raise UnsupportedError(f"{compressed.folder}: cannot be compared token by token: {error}") from error
    return torch.arange(rows[1]) if found is None else torch.tensor(found)


def in_tokens_of(windows: Windows, original: Model, compressed: Model) -> Windows:
    """The windows in the tokens of the model that has fewer, each cut at its old length."""
    files = [(model.folder / TOKENIZER).read_bytes() for model in (original, compressed)]
    ids, mask = Speller(*map(read_vocabulary, files)).respelled(windows.input_ids, windows.mask)
    tokenizer, skip = tokenizer_of(compressed), max(1, windows.prefix)
    texts = [
        str(
            tokenizer.decode(
                row[real].tolist()[skip:], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        for row, real in zip(ids, mask, strict=True)
    ]
    sizes = [len(text.encode("utf-8", "replace")) for text in texts]
    return replace(windows, input_ids=ids, mask=mask, text_bytes=torch.tensor(sizes, dtype=torch.int64))


def fewer_said(tokens: Int64[Tensor, "tokens"] | None) -> tuple[str, ...]:
    """What the protocol says of models whose tokens are not the same."""
    if tokens is None:
        return ()
    return (
        f"Both models read the text in the {len(tokens)} tokens of the compressed one; the original's "
        "probabilities are those of these tokens alone, scaled to add up to 1.",
    )
