"""Phi-3 and Phi-3.5 mini, Phi-4: queries, keys and values are one matrix, gate and up another."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="generate",
    blocks="model.layers",
    groups=(
        Linears(("self_attn.qkv_proj",), attends=True, fed_by="input_layernorm"),
        Linears(("self_attn.o_proj",)),
        Linears(("mlp.gate_up_proj",), fed_by="post_attention_layernorm"),
        Linears(("mlp.down_proj",)),
    ),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    cuts=Cuts(
        heads=("self_attn.qkv_proj:out", "self_attn.o_proj:in"),
        keys=("self_attn.qkv_proj:out", "self_attn.qkv_proj:out"),
        ffn=("mlp.gate_up_proj:out", "mlp.gate_up_proj:out", "mlp.down_proj:in"),
    ),
)
