"""Llama folders of random weights, larger than one would like to hold in memory twice."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketsize.io.checkpoint import TensorSpec, write_safetensors

VOCABULARY, HEAD = 49152, 64
SHARD = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a llama model; embedding and head are one matrix."""

    name: str
    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int

    @property
    def block_weights(self) -> int:
        """Weights of the matrices of a block."""
        attention = 2 * self.hidden * HEAD * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.inner

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = (2 * self.blocks + 1) * self.hidden
        return self.blocks * self.block_weights + VOCABULARY * self.hidden + norms

    @property
    def embedding_bytes(self) -> int:
        """The embedding in bfloat16."""
        return 2 * VOCABULARY * self.hidden

    @property
    def block_bytes(self) -> int:
        """A block in float32."""
        return 4 * self.block_weights

    @property
    def gram_bytes(self) -> int:
        """The largest Gram matrix, float32."""
        return 4 * self.inner**2


SIZES = (
    Size("135M", 576, 1536, 30, 9, 3),
    Size("500M", 1152, 3072, 30, 18, 6),
    Size("1.5B", 2048, 5632, 32, 32, 8),
)


def write_folder(folder: Path, size: Size, *, tokenizer: Path) -> None:
    """The folder, made unless its config is there: that is written last."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    shards, where = _shards(size), {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, {"format": "pt"})
        where |= {spec.name: file for spec in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = json.loads((tokenizer / "config.json").read_text()) | {
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _shards(size: Size) -> list[list[TensorSpec]]:
    """All tensors, in shards of about 1 GB."""
    shards: list[list[TensorSpec]] = [[]]
    room = SHARD
    for number, (name, shape) in enumerate(_shapes(size).items()):
        bytes_ = 2 * math.prod(shape)
        if bytes_ > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(TensorSpec(name, torch.bfloat16, shape, lambda s=shape, n=number: _random(s, n)))
        room -= bytes_
    return shards


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
    h, kv = size.hidden, size.kv_heads * HEAD
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, h)}
    for i in range(size.blocks):
        block = f"model.layers.{i}."
        shapes |= {
            f"{block}self_attn.{n}_proj.weight": (kv if n in "kv" else size.heads * HEAD, h) for n in "qkv"
        }
        shapes[f"{block}self_attn.o_proj.weight"] = (h, size.heads * HEAD)
        shapes |= {f"{block}mlp.{n}_proj.weight": (size.inner, h) for n in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (h, size.inner)
        shapes |= {f"{block}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (h,)}


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(torch.bfloat16)
