"""Qwen3, the mixtures of experts."""

from pocketsize.models.arch import Arch, Cuts, Linears

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
    cuts=Cuts(
        heads=("self_attn.q_proj:out", "self_attn.o_proj:in"),
        keys=("self_attn.k_proj:out", "self_attn.v_proj:out"),
        ffn=(
            "mlp.experts.*.gate_proj:out",
            "mlp.experts.*.up_proj:out",
            "mlp.experts.*.down_proj:in",
        ),
        fixed=("self_attn.q_norm:out", "self_attn.k_norm:out", "mlp.gate:out"),
        inner="moe_intermediate_size",
    ),
)
