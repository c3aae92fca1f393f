"""Qwen3, the mixtures of experts."""

from pocketsize.models.arch import Arch, Linears

ARCH = Arch(
    task="generate",
    blocks="model.layers",
    groups=(
        Linears(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attends=True,
            fed_by="input_layernorm",
        ),
        Linears(("self_attn.o_proj",), fed_by="self_attn.v_proj"),
        Linears(("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
        Linears(("mlp.experts.*.down_proj",), fed_by="mlp.experts.*.up_proj"),
    ),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    experts="mlp.experts",
)
