"""ELECTRA discriminators: BERT blocks; the embedding may be narrower, a projection widens it."""

from pocketsize.models.arch import Arch, Linears

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
)
