"""A model whose attention reads a cache of keys and values in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pocketsize.errors import UnsupportedError
from pocketsize.models.model import Model
from pocketsize.quantization.kv import Blockwise, Cache, attend

# Families whose rotary pairs lie side by side in llama.cpp; the rows of their queries and keys are
# stored in that order there.
_NEIGHBOURS = ("llama", "mistral", "mixtral")


def cache_for(model: Model, cache: Cache) -> Cache:
    """The cache as the runtime has it for this model; refuses models and heads that it cannot hold."""
    if model.arch.task != "generate":
        raise UnsupportedError(
            f"{model.folder}: is no causal language model; it has no cache of keys and values"
        )
    cache.require(model.head_width)
    if isinstance(cache, Blockwise):
        return replace(cache, neighbours=model.config.model_type in _NEIGHBOURS)
    return cache


@contextmanager
def reading(module: nn.Module, cache: Cache) -> Iterator[None]:
    """While it is entered, attention reads keys and values from this cache, in all blocks.

    Families look their attention up by name in transformers' table; what stands there under the name that
    `module` uses is ours for so long. An attention that never came here is an error.
    """
    name, calls = str(module.config._attn_implementation), 0  # type: ignore[union-attr]
    before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)

    def attention(
        block: nn.Module, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        nonlocal calls
        calls += 1
        if options.get("position_bias") is not None or options.get("s_aux") is not None:
            raise UnsupportedError(f"{type(block).__name__}: its attention has more than queries and keys")
        scale = options.get("scaling")
        out = attend(
            cache,
            Q,
            K,
            V,
            scale=Q.shape[-1] ** -0.5 if scale is None else scale,
            mask=mask,
            cap=options.get("softcap"),
        )
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if before is not None:
            ALL_ATTENTION_FUNCTIONS[name] = before
    if not calls:
        raise UnsupportedError(f"{type(module).__name__}: its attention could not be given another cache")
