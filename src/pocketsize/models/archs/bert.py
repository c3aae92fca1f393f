"""BERT encoders: MiniLM and its relatives."""

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
    optional=("embeddings.position_ids", "pooler.", "cls.", "classifier.", "qa_outputs."),
    prefix="bert",
    renames=(
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
    cuts=Cuts(
        heads=(
            "attention.self.query:out",
            "attention.self.key:out",
            "attention.self.value:out",
            "attention.output.dense:in",
        ),
        ffn=("intermediate.dense:out", "output.dense:in"),
        around=("pooler.dense",),
        square=True,
    ),
)
