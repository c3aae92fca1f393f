"""MPNet encoders."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="embed",
    blocks="encoder.layer",
    groups=(
        Linears(("attention.attn.q", "attention.attn.k", "attention.attn.v"), attends=True),
        Linears(("attention.attn.o",), fed_by="attention.attn.v"),
        Linears(("intermediate.dense",)),
        Linears(("output.dense",)),
    ),
    embedding="embeddings.word_embeddings.weight",
    optional=("embeddings.position_ids", "pooler.", "lm_head."),
    prefix="mpnet",
    offset=2,
    cuts=Cuts(
        heads=(
            "attention.attn.q:out",
            "attention.attn.k:out",
            "attention.attn.v:out",
            "attention.attn.o:in",
        ),
        ffn=("intermediate.dense:out", "output.dense:in"),
        around=("pooler.dense",),
        per_head=("encoder.relative_attention_bias",),
        square=True,
    ),
)
