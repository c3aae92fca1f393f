"""The config of a tiny model of each family: two layers, 64 wide, with whatever makes the family special."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from transformers import (
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MobileBertConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SqueezeBertConfig,
)

HIDDEN, FFN, LAYERS, VOCAB, POSITIONS = 64, 128, 2, 320, 256
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
# Keys and values for two heads of the four, and heads of a width of their own.
_GROUPED: dict[str, Any] = _SHAPE | {"num_key_value_heads": 2}
_WIDE: dict[str, Any] = _GROUPED | {"head_dim": 32}
# The first block sees eight tokens back, the second everything.
_SLIDING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_BPE: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_MPNET: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
# GPT-2, OPT and DistilBERT have words of their own; OPT's embedding is narrower than its blocks.
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "ffn_dim": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": 32,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_inner": FFN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": POSITIONS,
}
_MOBILEBERT: dict[str, Any] = {"embedding_size": 32, "intra_bottleneck_size": 32}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": HIDDEN,
    "hidden_dim": FFN,
    "n_layers": LAYERS,
    "n_heads": 4,
    "max_position_embeddings": POSITIONS,
}

Make = Callable[[dict[str, Any]], PretrainedConfig]

GENERATORS: Mapping[str, Make] = MappingProxyType(
    {
        "llama": lambda tie: LlamaConfig(**_GROUPED, **_BPE, **tie),
        "mistral": lambda tie: MistralConfig(sliding_window=None, **_WIDE, **_BPE, **tie),
        "qwen2": lambda tie: Qwen2Config(use_sliding_window=True, **_SLIDING, **_GROUPED, **_BPE, **tie),
        "qwen3": lambda tie: Qwen3Config(**_WIDE, **_BPE, **tie),
        "gemma3_text": lambda tie: Gemma3TextConfig(**_SLIDING, **_WIDE, **_BPE, **tie),
        "gemma2": lambda tie: Gemma2Config(**_SLIDING, **_WIDE, **_BPE, **tie),
        "phi3": lambda tie: Phi3Config(**_GROUPED, **_BPE, **tie),
        "qwen3_moe": lambda tie: Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **_WIDE, **_BPE, **tie
        ),
        "mixtral": lambda tie: MixtralConfig(
            num_local_experts=4, num_experts_per_tok=2, **_GROUPED, **_BPE, **tie
        ),
        "gpt2": lambda tie: GPT2Config(**_GPT2, **_BPE, **tie),
        "opt": lambda tie: OPTConfig(**_OPT, **_BPE, **tie),
        "gpt_neox": lambda tie: GPTNeoXConfig(**_SHAPE, **_BPE, **tie),
    }
)
ENCODERS: Mapping[str, Make] = MappingProxyType(
    {
        "bert": lambda _: BertConfig(pad_token_id=0, **_SHAPE),
        "roberta": lambda _: RobertaConfig(**_SHAPE, **_MPNET),
        "distilbert": lambda _: DistilBertConfig(**_DISTILBERT),
        "electra": lambda _: ElectraConfig(embedding_size=32, **_SHAPE),
        "mobilebert": lambda _: MobileBertConfig(**_MOBILEBERT, **_SHAPE),
        "mpnet": lambda _: MPNetConfig(relative_attention_num_buckets=32, **_SHAPE, **_MPNET),
    }
)
FAMILIES = (*GENERATORS, *ENCODERS)
# Known, but nothing in them can be compressed.
REFUSED: Mapping[str, Make] = MappingProxyType(
    {"squeezebert": lambda _: SqueezeBertConfig(embedding_size=HIDDEN, **_SHAPE)}
)


def tiny_config(family: str, *, tied: bool) -> PretrainedConfig:
    """The config; `tied` is heeded by generators."""
    return (GENERATORS | ENCODERS | REFUSED)[family]({"tie_word_embeddings": tied})
