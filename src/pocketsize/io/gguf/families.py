"""What llama.cpp calls the parts of each family whose files can be read, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pocketsize.errors import UnsupportedError, did_you_mean

_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_Q_K_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_COUNTS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
}
_GATED = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "use_cache": True}


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of llama.cpp's, and the model of Hugging Face's that it is.

    `inner` and `outer` map names of modules, in a block and outside, to those of checkpoints; `*`
    stands for the number of an expert, of which the file has one stack. `counts` are the keys of the
    config that hold whole numbers and where the file says them; `fixed` are those that it does not.
    `rotated` modules have rotary pairs as neighbours there, `transposed` ones are stored the other way
    round here. `norm_offset` is what was added to the weights of norms.
    """

    name: str
    model_type: str
    class_name: str
    inner: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(_ENDS))
    blocks: str = "model.layers"
    counts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(_COUNTS))
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    fixed: Mapping[str, object] = field(default_factory=lambda: MappingProxyType(_GATED))
    rotated: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0


_GEMMA_FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_cache": True,
}
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                "llama",
                "llama",
                "LlamaForCausalLM",
                _LLAMA,
                fixed=_GATED | {"mlp_bias": False},
                rotated=("attn_q", "attn_k"),
            ),
            Family(
                "qwen2",
                "qwen2",
                "Qwen2ForCausalLM",
                _LLAMA,
                fixed={"hidden_act": "silu", "use_cache": True, "use_sliding_window": False},
            ),
            Family(
                "qwen3",
                "qwen3",
                "Qwen3ForCausalLM",
                _LLAMA | _Q_K_NORMS,
                fixed=_GATED | {"use_sliding_window": False},
            ),
            Family(
                "qwen3moe",
                "qwen3_moe",
                "Qwen3MoeForCausalLM",
                {
                    name: path
                    for name, path in _LLAMA.items()
                    if name not in ("ffn_gate", "ffn_up", "ffn_down")
                }
                | _Q_K_NORMS
                | {
                    "ffn_gate_inp": "mlp.gate",
                    "ffn_gate_exps": "mlp.experts.*.gate_proj",
                    "ffn_up_exps": "mlp.experts.*.up_proj",
                    "ffn_down_exps": "mlp.experts.*.down_proj",
                },
                counts=_COUNTS
                | {
                    "num_experts": "expert_count",
                    "num_experts_per_tok": "expert_used_count",
                    "moe_intermediate_size": "expert_feed_forward_length",
                },
                # llama.cpp always lets the weights of the experts that are used sum to 1.
                fixed=_GATED | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
            ),
            Family("gemma2", "gemma2", "Gemma2ForCausalLM", _GEMMA, fixed=_GEMMA_FIXED, norm_offset=1.0),
            Family(
                "gemma3",
                "gemma3_text",
                "Gemma3ForCausalLM",
                _GEMMA | _Q_K_NORMS,
                fixed=_GEMMA_FIXED,
                norm_offset=1.0,
            ),
            Family(
                "phi3",
                "phi3",
                "Phi3ForCausalLM",
                {
                    "attn_norm": "input_layernorm",
                    "attn_qkv": "self_attn.qkv_proj",
                    "attn_output": "self_attn.o_proj",
                    "ffn_norm": "post_attention_layernorm",
                    "ffn_up": "mlp.gate_up_proj",
                    "ffn_down": "mlp.down_proj",
                },
                fixed=_GATED | {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
            ),
            Family(
                "gpt2",
                "gpt2",
                "GPT2LMHeadModel",
                {
                    "attn_norm": "ln_1",
                    "attn_qkv": "attn.c_attn",
                    "attn_output": "attn.c_proj",
                    "ffn_norm": "ln_2",
                    "ffn_up": "mlp.c_fc",
                    "ffn_down": "mlp.c_proj",
                },
                outer={
                    "token_embd": "transformer.wte",
                    "position_embd": "transformer.wpe",
                    "output_norm": "transformer.ln_f",
                    "output": "lm_head",
                },
                blocks="transformer.h",
                counts={
                    "n_embd": "embedding_length",
                    "n_head": "attention.head_count",
                    "n_inner": "feed_forward_length",
                    "n_layer": "block_count",
                    "n_positions": "context_length",
                },
                epsilon=("layer_norm_epsilon", "attention.layer_norm_epsilon"),
                fixed={"activation_function": "gelu_new", "use_cache": True},
                transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            ),
        )
    }
)


def family_of(architecture: str, path: object) -> Family:
    """The family that a file's `general.architecture` names; `path` is for the error."""
    if architecture not in FAMILIES:
        known = did_you_mean(architecture, FAMILIES)
        raise UnsupportedError(f"{path}: architecture {architecture[:80]!a} is not read{known}")
    return FAMILIES[architecture]
