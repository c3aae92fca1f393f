"""DistilBERT encoders: half of BERT's blocks, no token types, no pooler."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="embed",
    blocks="transformer.layer",
    groups=(
        Linears(("attention.q_lin", "attention.k_lin", "attention.v_lin"), attends=True),
        Linears(("attention.out_lin",), fed_by="attention.v_lin"),
        Linears(("ffn.lin1",)),
        Linears(("ffn.lin2",)),
    ),
    embedding="embeddings.word_embeddings.weight",
    optional=(
        "embeddings.position_ids",
        "vocab_transform.",
        "vocab_layer_norm.",
        "vocab_projector.",
        "pre_classifier.",
        "classifier.",
        "qa_outputs.",
    ),
    cuts=Cuts(
        heads=(
            "attention.q_lin:out",
            "attention.k_lin:out",
            "attention.v_lin:out",
            "attention.out_lin:in",
        ),
        ffn=("ffn.lin1:out", "ffn.lin2:in"),
        inner="hidden_dim",
        square=True,
    ),
    prefix="distilbert",
)
