"""What a language model keeps when its keys and values are cached in fewer bits, and what that saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from pocketsize.data.calibration import Windows
from pocketsize.errors import UsageError
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.quality import Quality, measurements, protocol
from pocketsize.measurement.tokens import compare_caches
from pocketsize.models.model import Model
from pocketsize.quantization.kv import Blockwise, Cache, bits_per_token, parse_cache

FULL = Blockwise("f16", "f16")
# What is kept, with how it came about.
_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "kl_mean": "KL(own cache || this cache), mean over tokens",
        "kl_p99": "KL(own cache || this cache), 99th percentile over tokens",
        "top1": "tokens where both caches put the same token first",
        "perplexity_ratio": "perplexity with the model's own cache over that with this one",
    }
)


def parse_caches(text: str) -> list[Cache]:
    """The caches that a list names: `q8_0,q4_0,kivi-2`."""
    caches = [parse_cache(word.strip()) for word in text.split(",") if word.strip()]
    names = [cache.name for cache in caches]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--cache {text!r}: names of caches with commas between, each once")
    return caches


def cache_quality(
    model: Model, caches: Sequence[Cache], windows: Windows, *, seed: int, context: int | None = None
) -> Quality:
    """KL, top-1 agreement and perplexity of each cache against the model's own, and the bytes of both.

    Everything runs in float32: what an 8-bit cache changes is less than what bfloat16 does. Bytes are for
    `context` tokens, or for as many as the model reads.
    """
    if windows.generated:
        raise UsageError(f"{windows.name}: holds text that a model wrote; it may calibrate, never evaluate")
    context = context or model.positions
    rows: list[Measurement] = []
    for cache, scores in zip(caches, compare_caches(model, caches, windows, torch.float32), strict=True):
        rows += [
            replace(m, method=_METHODS[m.name], subject=f"cache {cache.name}")
            for m in measurements(scores, windows, seed)
            if m.name in _METHODS and m.subject == "compressed"
        ]
        rows += _sizes(model, cache, context)
    own = [
        said
        for said in protocol(windows, torch.float32, seed)
        if not said.startswith(("KL ", "Bits ", "Matri"))
    ]
    return Quality(tuple(rows), (*own, *_said(caches)))


def cache_bytes(model: Model, cache: Cache, context: int) -> float:
    """Bytes of the keys and values of so many tokens; blocks with a sliding window hold the window."""
    return sum(_heads(model) * cache.bits(held, model.head_width) / 8 for held in _held(model, context))


def _sizes(model: Model, cache: Cache, context: int) -> Iterator[Measurement]:
    """Exact arithmetic, marked as what was not measured is."""
    subject, heads, blocks = f"cache {cache.name}", _heads(model), len(model.blocks)
    each = blocks * heads * bits_per_token(cache, model.head_width) / 8
    how = f"{blocks} blocks x {heads} heads x {model.head_width} values, keys and values, scales among them"
    total, full = (cache_bytes(model, one, context) for one in (cache, FULL))
    saving = f"1 - bytes over those at 16 bits, {context} tokens"
    yield Measurement("cache_bytes_per_token", each, "bytes/token", "lower", how, subject, "estimated")
    yield Measurement(
        "cache_bytes", total, "bytes", "lower", f"keys and values of {context} tokens", subject, "estimated"
    )
    yield Measurement("cache_saving", 1 - total / full, "share", "higher", saving, subject, "estimated")


def _heads(model: Model) -> int:
    """How many heads keys and values have."""
    grouped = getattr(model.config, "num_key_value_heads", None)
    return int(grouped or model.config.num_attention_heads)


def _held(model: Model, context: int) -> list[int]:
    """How many tokens each block's cache holds."""
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None) or ["sliding" if window else "full"] * len(
        model.blocks
    )
    return [min(context, int(window)) if window and "full" not in kind else context for kind in kinds]


def _said(caches: Sequence[Cache]) -> Iterator[str]:
    yield (
        "Cache: every token is predicted as if it were decoded, from keys and values as the cache holds them "
        "then; the model's own cache is float32, everything runs in float32."
    )
    for cache in caches:
        if isinstance(cache, Blockwise):
            yield f"Cache {cache.name}: llama-server {cache.flags}, `pocketsize chat --cache {cache.name}`."
        else:
            yield (
                f"Cache {cache.name}: keys in {cache.key_bits} bits per channel, values in "
                f"{cache.value_bits} per token, groups of {cache.group}; the last {cache.residual} tokens "
                f"and the first {cache.sink} stay as they are. llama.cpp has no such cache."
            )
