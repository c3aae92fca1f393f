"""Which schemes have linears round what they read, and where that cannot be."""

from __future__ import annotations

from collections.abc import Iterable

from pocketsize.errors import UsageError
from pocketsize.quantization.scheme import named


def rounding_word(words: Iterable[str]) -> str | None:
    """The first of these schemes with which linears round what they read."""
    return next((word for word in words if (own := named(word)) is not None and own.activations), None)


def check_rounds(kind: str, words: Iterable[str], *, knows: bool, embeddings: object) -> None:
    """Refuse rounded inputs where a step, or what it leaves to embedding and head, cannot have them."""
    if (found := rounding_word(words)) is None:
        return
    if not knows:
        raise UsageError(f"{kind}: it does not know of rounded inputs ({found}); use smoothquant or gptq")
    if embeddings == "same":
        raise UsageError(f"{kind}: embeddings: same: no loader rounds the inputs of a head ({found})")
