"""BERT encoders: MiniLM and its relatives."""

from pocketsize.models.arch import Arch, Linears

ARCH = Arch(
    task="embed",
    blocks="encoder.layer",
    groups=(
        Linears(("attention.self.query", "attention.self.key", "attention.self.value"), attends=True),
        Linears(("attention.output.dense",)),
        Linears(("intermediate.dense",)),
        Linears(("output.dense",)),
    ),
    embedding="embeddings.word_embeddings.weight",
    optional=("embeddings.position_ids", "pooler."),
)
