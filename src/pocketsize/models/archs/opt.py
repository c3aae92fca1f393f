"""OPT blocks; one size has a narrower embedding, with projections on both sides of the blocks."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="generate",
    blocks="model.decoder.layers",
    groups=(
        Linears(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attends=True),
        Linears(("self_attn.out_proj",), fed_by="self_attn.v_proj"),
        Linears(("fc1",)),
        Linears(("fc2",)),
    ),
    embedding="model.decoder.embed_tokens.weight",
    head="lm_head.weight",
    renames=((r"^decoder\.", "model.decoder."),),
    joins=True,
    cuts=Cuts(
        heads=(
            "self_attn.q_proj:out",
            "self_attn.k_proj:out",
            "self_attn.v_proj:out",
            "self_attn.out_proj:in",
        ),
        ffn=("fc1:out", "fc2:in"),
        embedding="word_embed_proj_dim",
        lifts=("model.decoder.project_in",),
        lowers=("model.decoder.project_out",),
        square=True,
        inner="ffn_dim",
        norm_first="do_layer_norm_before",
    ),
)
