"""SqueezeBERT encoders: every matrix of a block is a grouped convolution of width 1."""

from pocketsize.models.arch import Arch

ARCH = Arch(
    task="embed",
    blocks="encoder.layers",
    groups=(),
    embedding="embeddings.word_embeddings.weight",
    optional=("embeddings.position_ids", "cls.", "classifier.", "qa_outputs."),
    prefix="transformer",
    refuses="its blocks are grouped convolutions, and no export format here stores those in fewer bits",
)
