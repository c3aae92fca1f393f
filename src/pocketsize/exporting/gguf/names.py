"""What GGUF calls each tensor, and the order its rows have there."""

from __future__ import annotations

from functools import cache

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from jaxtyping import Int64
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.models.model import Model

ROPE_FACTORS = "rope_freqs.weight"


def gguf_name(model: Model, name: str) -> str:
    """The GGUF name of a parameter: `model.layers.0.mlp.up_proj.weight` is `blk.0.ffn_up.weight`."""
    found = _name_map(str(model.arch.gguf), model.config.num_hidden_layers).get_name(
        name, (".weight", ".bias")
    )
    if found is None:
        raise UnsupportedError(
            f"{name}: llama.cpp's {model.arch.gguf} model has no such tensor; export folder"
        )
    return found


def row_order(model: Model, name: str) -> Int64[Tensor, "out"] | None:
    """The rows of a parameter in the order GGUF wants them; None where the order is the same.

    Transformers rotates entry i of a head together with entry i + d/2, llama.cpp's llama model
    entry 2i with 2i + 1, so the rows of queries and keys are interleaved, head by head.
    """
    heads = _rotated_heads(model, name)
    if heads is None:
        return None
    rows = model.checkpoint.entries[name].shape[0]
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def _rotated_heads(model: Model, name: str) -> int | None:
    owner = name.rsplit(".", 2)[-2]
    if owner == "q_proj":
        return model.config.num_attention_heads
    return model.config.num_key_value_heads if owner == "k_proj" else None


@cache
def _name_map(arch: str, blocks: int):
    word = next(a for a, n in MODEL_ARCH_NAMES.items() if n == arch)
    return get_tensor_name_map(MODEL_ARCH(word), blocks)
