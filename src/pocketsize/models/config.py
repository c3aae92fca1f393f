"""The config of a model folder, checked before any loader sees it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from pocketsize.errors import DataError, RefusedError, UnsupportedError
from pocketsize.io.checkpoint import INDEX, SINGLE, nothing_to_open
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.arch import arch_of
from pocketsize.models.packing import KEYS, recognise
from pocketsize.models.quiet import quiet
from pocketsize.models.sparsity import check_said

NAME, GENERATION = "config.json", "generation_config.json"
_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL_COUNTS = ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that make a loader import code, from the folder or from elsewhere.
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm")


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a folder whose family is known and which asks for no code of its own.

    It describes the matrices: that they may be packed is not in it.
    """
    path = folder / NAME
    if not any(os.path.lexists(folder / name) for name in (NAME, SINGLE, INDEX)):
        raise nothing_to_open(folder)
    raw = read_json_object(path)
    refuse_code(raw, path)
    recognise(raw, path)
    check_said(raw, path)
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise DataError(f"{path}: model_type is {family!r}; it must name the model's family")
    try:
        arch_of(family)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    _check_numbers(raw, path)
    _check_heads(raw, path)
    _check_generation(folder / GENERATION, int(str(raw["vocab_size"])))
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loader's own classes are many, and all mean: not a config
        raise DataError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    for key in KEYS:
        if hasattr(config, key):
            delattr(config, key)
    return config


def refuse_code(raw: Mapping[str, object], path: Path) -> None:
    """Refuses keys, at any depth, by which a file would have a loader run code."""
    for key, value in _items(raw):
        if key in _CODE_KEYS and value:
            raise RefusedError(f"{path}: {key} asks to run code of the model's own; that is never done")
        if key.endswith(("attn_implementation", "experts_implementation", "_kernels", "kernel_config")):
            named = value.values() if isinstance(value, dict) else (value,)
            if any(word is not None and word not in _IMPLEMENTATIONS for word in named):
                raise RefusedError(f"{path}: {key} {value!r} names code from elsewhere; remove the key")


def _items(value: object) -> Iterator[tuple[str, object]]:
    """All keys with their values, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner
            yield from _items(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner)


def _check_numbers(raw: Mapping[str, object], path: Path) -> None:
    for word in (*_COUNTS, *_OPTIONAL_COUNTS):
        key = _key(raw, word)
        value = raw.get(key)
        if value is None and word not in _COUNTS:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise DataError(f"{path}: {key} is {value!r}; a whole number above 0 is needed")
    for key, value in _items(raw):
        if key not in _POSITIVE or value is None:
            continue
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not 0 < number < math.inf:
            raise DataError(f"{path}: {key} is {value!r}; a number above 0 is needed")
    _check_tokens(raw, path, int(str(raw["vocab_size"])))


def _check_tokens(raw: Mapping[str, object], path: Path, vocabulary: int) -> None:
    for key in _TOKENS:
        ids = raw.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            # -1 is how early Llama configs say that there is no such token.
            if token is not None and token not in range(-1, vocabulary):
                raise DataError(f"{path}: {key} is {token!r}, outside the vocabulary of {vocabulary}")


def _check_generation(path: Path, vocabulary: int) -> None:
    """The settings of generation go into the output as they are, so they must fit the model."""
    if path.exists():
        raw = read_json_object(path)
        refuse_code(raw, path)
        _check_tokens(raw, path, vocabulary)


def _key(raw: Mapping[str, object], word: str) -> str:
    """What this family's config calls a number: GPT-2 says n_embd for hidden_size."""
    return CONFIG_MAPPING[str(raw["model_type"])].attribute_map.get(word, word)


def _check_heads(raw: Mapping[str, object], path: Path) -> None:
    """Heads must divide the width, unless their own width is stated, and groups of them the heads."""
    heads, hidden = (int(str(raw[_key(raw, word)])) for word in ("num_attention_heads", "hidden_size"))
    shared = int(str(raw.get("num_key_value_heads") or heads))
    if raw.get("head_dim") is None and hidden % heads:
        words = _key(raw, "num_attention_heads"), _key(raw, "hidden_size")
        raise DataError(f"{path}: {words[0]} {heads} does not divide {words[1]} {hidden}")
    if heads % shared:
        raise DataError(f"{path}: num_key_value_heads {shared} does not divide num_attention_heads {heads}")
