"""ELECTRA discriminators: BERT blocks; the embedding may be narrower, a projection widens it."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="embed",
    blocks="encoder.layer",
    groups=(
        Linears(("attention.self.query", "attention.self.key", "attention.self.value"), attends=True),
        Linears(("attention.output.dense",), fed_by="attention.self.value"),
        Linears(("intermediate.dense",)),
        Linears(("output.dense",)),
    ),
    embedding="embeddings.word_embeddings.weight",
    optional=("embeddings.position_ids", "discriminator_predictions.", "classifier.", "qa_outputs."),
    prefix="electra",
    cuts=Cuts(
        heads=(
            "attention.self.query:out",
            "attention.self.key:out",
            "attention.self.value:out",
            "attention.output.dense:in",
        ),
        ffn=("intermediate.dense:out", "output.dense:in"),
        embedding="embedding_size",
        narrow=(
            "embeddings.position_embeddings",
            "embeddings.token_type_embeddings",
            "embeddings.LayerNorm",
        ),
        lifts=("embeddings_project",),
        square=True,
    ),
)
