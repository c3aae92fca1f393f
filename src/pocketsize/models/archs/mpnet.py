"""MPNet encoders."""

from pocketsize.models.arch import Arch, Linears

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
    renames=((r"^mpnet\.", ""),),
    offset=2,
)
