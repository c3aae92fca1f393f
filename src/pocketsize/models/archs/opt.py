"""OPT blocks; one size has a narrower embedding, with projections on both sides of the blocks."""

from pocketsize.models.arch import Arch, Linears

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
)
