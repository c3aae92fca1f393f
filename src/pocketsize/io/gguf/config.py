"""The config.json of a model in a GGUF file, from what the file says of itself.

Nothing is guessed: a number that the file does not hold, or a kind of scaling that cannot be told
from it, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pocketsize.errors import DataError, UnsupportedError
from pocketsize.io.gguf.families import Family
from pocketsize.io.gguf.header import GgufFile
from pocketsize.io.gguf.rope import llama3_divisors
from pocketsize.io.gguf.values import read_values

EMBEDDING, HEAD, DIVISORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}
# Rope factors by which Phi 3 reads beyond its first window.
_LONG = "rope_factors_long.weight"
_HUGE = 1 << 31
# What `rope_freqs.weight` was made of in every Llama 3.x: low and high frequency factor, old length.
_LLAMA3 = (1.0, 4.0, 8192)
# Numbers that change what a model computes, and that no family read here has.
_FOREIGN = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "embedding_scale",
    "expert_shared_count",
    "expert_weights_scale",
    "logit_scale",
    "residual_scale",
)
# Blocks of Gemma 2 and 3 27B, whose queries alone are scaled by hidden size over heads.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}


def config_of(file: GgufFile, family: Family, *, tied: bool) -> dict[str, Any]:
    """The config as its family's users write it, in float32."""
    _refuse_foreign(file, family)
    config: dict[str, Any] = dict(family.fixed)
    config |= {key: _count(file, family, word) for key, word in family.counts.items()}
    config[family.epsilon[0]] = _decimal(file, f"{family.name}.{family.epsilon[1]}")
    config |= {"dtype": "float32", "tie_word_embeddings": tied, "vocab_size": _rows(file)}
    config |= special_ids(file, config["vocab_size"])
    if family.name != "gpt2":
        config |= _rotary(file, family, config)
    config |= _own(file, family, config)
    start = {"architectures": [family.class_name], "model_type": family.model_type}
    return start | dict(sorted(config.items()))


def _refuse_foreign(file: GgufFile, family: Family) -> None:
    """Refuses a file that says of itself what its family lacks: without it, another model is computed."""
    for word in _FOREIGN:
        key = f"{family.name}.{word}"
        if file.fields.get(key) not in (None, 0, 0.0, 1.0):
            raise UnsupportedError(
                f"{file.path}: {key} is {str(file.fields[key])[:80]}; such models are not read"
            )
    key = f"{family.name}.attention.sliding_window"
    window = file.get(key, int) if family.name not in ("phi3", *_GEMMA_27B) else None
    if window and window < file.of(f"{family.name}.context_length", int):
        raise UnsupportedError(
            f"{file.path}: {key} is {window}; a {family.model_type} is read without windows"
        )


def special_ids(file: GgufFile, rows: int) -> dict[str, int]:
    """The ids of the first, last and padding token that the file names."""
    found: dict[str, int] = {}
    for word, theirs in SPECIAL.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        if (value := file.get(key, int)) is None:
            continue
        if not 0 <= value < rows:
            raise DataError(f"{file.path}: {key} is {value}, the embedding has {rows} rows")
        found[f"{word}_token_id"] = value
    return found


def _rows(file: GgufFile) -> int:
    if EMBEDDING not in file.tensors:
        raise DataError(f"{file.path}: no tensor {EMBEDDING}, which every model has")
    return file.tensors[EMBEDDING].shape[0]


def _count(file: GgufFile, family: Family, word: str) -> int:
    """A whole number above 0; where there is one for each block, all must be alike."""
    key = f"{family.name}.{word}"
    if word == "attention.head_count_kv" and key not in file.fields:
        return _count(file, family, "attention.head_count")
    value = file.of(key, object)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UnsupportedError(
                f"{file.path}: {key} differs from block to block; such models are not read"
            )
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _HUGE:
        raise DataError(f"{file.path}: {key} is {str(value)[:80]}; a whole number above 0 is needed")
    return value


def _decimal(file: GgufFile, key: str, default: float | None = None) -> float:
    """A float32 value above 0 as the shortest decimal that means it."""
    if default is not None and key not in file.fields:
        return default
    value = file.of(key, float)
    if not 0 < value < math.inf:
        raise DataError(f"{file.path}: {key} is {value}; a number above 0 is needed")
    return float(str(np.float32(value)))


def _rotary(file: GgufFile, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Width of a head, base of the rotary embedding, and how it is stretched."""
    name, heads = family.name, config["num_attention_heads"]
    turned = file.get(f"{name}.rope.dimension_count", int)
    width = file.get(f"{name}.attention.key_length", int) or (turned if family.rotated else None)
    width = width or config["hidden_size"] // heads
    if not 0 < width < _HUGE or file.get(f"{name}.attention.value_length", int) not in (None, width):
        raise UnsupportedError(f"{file.path}: keys {width} wide and values of another width are not read")
    found: dict[str, Any] = {
        "head_dim": width,
        "rope_theta": _decimal(file, f"{name}.rope.freq_base", 10000.0),
    }
    if turned is not None and turned != width:
        if name != "phi3" or not 0 < turned < width:
            raise UnsupportedError(
                f"{file.path}: {name}.rope.dimension_count {turned} of {width} is not read"
            )
        found["partial_rotary_factor"] = turned / width
    if (scaling := _scaling(file, family, found)) is not None:
        found["rope_scaling"] = scaling
    return found


def _scaling(file: GgufFile, family: Family, rotary: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the rotary embedding is stretched; None where it is not."""
    key = f"{family.name}.rope.scaling"
    kind = file.get(f"{key}.type", str) or "none"
    if _LONG in file.tensors or kind not in ("none", "linear"):
        word = "longrope" if _LONG in file.tensors else ascii(kind[:80])
        raise UnsupportedError(
            f"{file.path}: rotary embedding stretched by {word}; none, linear and llama3 are read"
        )
    if DIVISORS in file.tensors:
        return _llama3(file, rotary)
    if kind == "none":
        return None
    return {"rope_type": "linear", "factor": _decimal(file, f"{key}.factor")}


def _llama3(file: GgufFile, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling that gives the file's table of divisors."""
    table = read_values(file.tensors[DIVISORS]).flatten().to(torch.float32)
    low, high, old = _LLAMA3
    factor = float(table.max())
    width, theta = rotary["head_dim"], rotary["rope_theta"]
    if factor > 1 and len(table) == width // 2:
        ours = llama3_divisors(theta, width, factor=factor, low=low, high=high, old=old)
        if torch.allclose(ours, table, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": old,
            }
    raise UnsupportedError(f"{file.path}: {DIVISORS} is not the table of a Llama 3; such scaling is not read")


def _own(file: GgufFile, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a family alone has."""
    name = family.name
    if name == "llama" and (experts := file.get("llama.expert_count", int)):
        raise UnsupportedError(f"{file.path}: a Mixtral of {experts} experts; give its safetensors folder")
    if name == "phi3":
        window = file.get("phi3.attention.sliding_window", int) or None
        old = file.get("phi3.rope.scaling.original_context_length", int)
        return {
            "sliding_window": window,
            "original_max_position_embeddings": old or config["max_position_embeddings"],
        }
    return _gemma(file, family, config) if name in _GEMMA_27B else {}


def _gemma(file: GgufFile, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, the scale of queries, and caps of Gemma 2 and 3, which llama.cpp knows by the size."""
    name, blocks = family.name, config["num_hidden_layers"]
    width = config["head_dim"]
    if blocks == _GEMMA_27B[name]:
        width = config["hidden_size"] // config["num_attention_heads"]
    found: dict[str, Any] = {
        "layer_types": [
            "sliding_attention" if near else "full_attention" for near in _near(file, name, blocks)
        ],
        "query_pre_attn_scalar": width,
        "sliding_window": _count(file, family, "attention.sliding_window"),
    }
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        key = f"{name}.{cap}"
        found[cap] = _decimal(file, key) if key in file.fields or name == "gemma2" else None
    if name == "gemma3":
        found["rope_local_base_freq"] = _decimal(file, "gemma3.rope.freq_base_swa", 10000.0)
    return found


def _near(file: GgufFile, name: str, blocks: int) -> list[bool]:
    """Whether each block sees a window alone: all but every second of Gemma 2 and every sixth of Gemma 3."""
    key = f"{name}.attention.sliding_window_pattern"
    said = file.fields.get(key, 2 if name == "gemma2" else 6)
    if isinstance(said, list) and len(said) == blocks and all(isinstance(near, bool) for near in said):
        return said
    if not isinstance(said, int) or isinstance(said, bool) or said < 1:
        raise DataError(
            f"{file.path}: {key} is {str(said)[:80]}; a number, or one truth value a block, is needed"
        )
    return [(i + 1) % said != 0 for i in range(blocks)]
