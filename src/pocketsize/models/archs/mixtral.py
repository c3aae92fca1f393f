"""Mixtral: Mistral blocks with a mixture of experts for the MLP."""

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
        Linears(("mlp.experts.*.w1", "mlp.experts.*.w3")),
        Linears(("mlp.experts.*.w2",), fed_by="mlp.experts.*.w3"),
    ),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    experts="mlp.experts",
    renames=((r"\.block_sparse_moe\.", ".mlp."),),
    cuts=Cuts(
        heads=("self_attn.q_proj:out", "self_attn.o_proj:in"),
        keys=("self_attn.k_proj:out", "self_attn.v_proj:out"),
        ffn=("mlp.experts.*.w1:out", "mlp.experts.*.w3:out", "mlp.experts.*.w2:in"),
        fixed=("mlp.gate:out",),
    ),
)
