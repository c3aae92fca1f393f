"""Gemma 3, text alone: norms around both halves of a block, sliding and full attention in turn."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="generate",
    blocks="model.layers",
    groups=(
        Linears(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attends=True),
        Linears(("self_attn.o_proj",), fed_by="self_attn.v_proj"),
        Linears(("mlp.gate_proj", "mlp.up_proj")),
        Linears(("mlp.down_proj",), fed_by="mlp.up_proj"),
    ),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    cuts=Cuts(
        heads=("self_attn.q_proj:out", "self_attn.o_proj:in"),
        keys=("self_attn.k_proj:out", "self_attn.v_proj:out"),
        ffn=("mlp.gate_proj:out", "mlp.up_proj:out", "mlp.down_proj:in"),
        fixed=("self_attn.q_norm:out", "self_attn.k_norm:out"),
        adds=False,
    ),
)
