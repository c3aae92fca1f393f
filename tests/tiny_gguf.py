"""GGUF files of tiny models, as llama.cpp's converter writes them; names by the gguf package's own table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, TokenType
from tokenizers import Tokenizer
from transformers import AutoConfig

from pocketsize.io.checkpoint import open_checkpoint
from tiny import CHAT_TEMPLATE, write_tiny

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
# What a GGUF cannot say, as llama.cpp takes it to be.
_SAID_NOWHERE: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    "qwen3_moe": {"norm_topk_prob": True},
    "gemma2": {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 2},
    "phi3": {"original_max_position_embeddings": 256, "sliding_window": None},
}


def write_source(folder: Path, family: str, *, tied: bool = True) -> Path:
    """A tiny model whose config a GGUF file can say in full."""
    write_tiny(folder, family, tied=tied)
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | _SAID_NOWHERE.get(family, {})
    path.write_text(json.dumps(raw))
    return folder


def write_gguf(
    path: Path,
    source: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    changed: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    pre: str = "smollm",
    more: Mapping[str, np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """Write the model in a folder; matrices have the type `kind`. Gives what each tensor of the folder means.

    `changed` are metadata fields set to other values, `without` fields and tensors left out,
    and `more` tensors that the folder does not have.
    """
    config = AutoConfig.from_pretrained(source)
    name = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, name)
    _add_fields(writer, config, name)
    _add_tokens(writer, source, pre)
    for key, value in (changed or {}).items():
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.get_type(value))
    for key in without:
        writer.kv_data[0].pop(key, None)
    meant: dict[str, torch.Tensor] = {}
    stored: dict[str, np.ndarray] = {}
    words = next(a for a, n in MODEL_ARCH_NAMES.items() if n == name)
    table = gguf.get_tensor_name_map(MODEL_ARCH(words), config.num_hidden_layers)
    checkpoint = open_checkpoint(source)
    for parameter in checkpoint.entries:
        values = checkpoint.read(parameter).numpy()
        used = kind if values.ndim > 1 else GGMLQuantizationType.F32
        rounded = gguf.dequantize(gguf.quantize(values, used), used).astype(np.float32)
        theirs, turned = _as_gguf(table, parameter, rounded, config)
        stored[theirs] = turned
        meant[parameter] = torch.from_numpy(rounded)
    for theirs, values in (_stacked(stored) | dict(more or {})).items():
        used = kind if values.ndim > 1 else GGMLQuantizationType.F32
        if theirs not in without:
            writer.add_tensor(theirs, gguf.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _add_fields(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    heads = config.num_attention_heads
    writer.add_name("Tiny")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.n_inner if name == "gpt2" else config.intermediate_size)
    writer.add_head_count(heads)
    if name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
    if name != "llama":
        writer.add_key_length(width)
        writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    if name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_tokens(writer: gguf.GGUFWriter, source: Path, pre: str) -> None:
    """The byte-level tokenizer of a tiny model; ids beyond it are filled up."""
    rules = json.loads((source / "tokenizer.json").read_text())
    known = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    for token, i in known.items():
        tokens[i], kinds[i] = token, TokenType.CONTROL if i < 3 else TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in rules["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def _as_gguf(table: Any, parameter: str, values: np.ndarray, config: Any) -> tuple[str, np.ndarray]:
    """Name and values of a tensor as the file has them; an expert's name keeps its number in front."""
    expert = re.search(r"experts\.(\d+)\.", parameter)
    plain = parameter.replace(f"experts.{expert[1]}.", "experts.") if expert else parameter
    theirs = table.get_name(plain, (".weight", ".bias"))
    assert theirs is not None, parameter
    architecture = ARCHITECTURES[config.model_type]
    if architecture == "llama" and re.search(r"attn_[qk]\.weight", theirs):
        heads = config.num_attention_heads if "attn_q" in theirs else config.num_key_value_heads
        values = _neighbours(values, heads)
    if architecture.startswith("gemma") and theirs.endswith("norm.weight"):
        values = values + np.float32(1)
    if architecture == "gpt2" and values.ndim == 2 and ".h." in parameter:
        values = np.ascontiguousarray(values.T)
    return (f"{expert[1]}|{theirs}" if expert else theirs), values


def _neighbours(W: np.ndarray, heads: int) -> np.ndarray:
    """Row order of GGUF, spelled out: row 2i is row i of the head's first half, 2i + 1 of its second."""
    rows = W.shape[0] // heads
    order = [
        h * rows + half * rows // 2 + i for h in range(heads) for i in range(rows // 2) for half in (0, 1)
    ]
    return W[order]


def _stacked(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with those of experts in one stack."""
    out = {name: values for name, values in stored.items() if "|" not in name}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in stored.items():
        number, bar, plain = name.partition("|")
        if bar:
            parts.setdefault(plain, {})[int(number)] = values
    return out | {name: np.stack([of[i] for i in sorted(of)]) for name, of in parts.items()}
