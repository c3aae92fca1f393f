"""MobileBERT encoders: many small matrices, with bottlenecks before and after attention."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="embed",
    blocks="encoder.layer",
    groups=(
        Linears(
            ("bottleneck.input.dense", "bottleneck.attention.dense", "attention.self.value"), attends=True
        ),
        Linears(("attention.self.query", "attention.self.key")),
        Linears(("attention.output.dense",)),
        Linears(("ffn.0.intermediate.dense",)),
        Linears(("ffn.0.output.dense",)),
        Linears(("ffn.1.intermediate.dense",)),
        Linears(("ffn.1.output.dense",)),
        Linears(("ffn.2.intermediate.dense",)),
        Linears(("ffn.2.output.dense",)),
        Linears(("intermediate.dense",)),
        Linears(("output.dense",)),
        Linears(("output.bottleneck.dense",)),
    ),
    embedding="embeddings.word_embeddings.weight",
    optional=("embeddings.position_ids", "pooler.", "cls.", "classifier.", "qa_outputs."),
    prefix="mobilebert",
    cuts=Cuts(
        heads=(),
        ffn=(
            "ffn.*.intermediate.dense:out",
            "ffn.*.output.dense:in",
            "intermediate.dense:out",
            "output.dense:in",
        ),
        adds=False,
    ),
)
