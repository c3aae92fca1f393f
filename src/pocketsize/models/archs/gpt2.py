"""GPT-2 blocks: matrices are stored inputs first, the head is the embedding."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="generate",
    blocks="transformer.h",
    groups=(
        Linears(("attn.c_attn",), attends=True, fed_by="ln_1"),
        Linears(("attn.c_proj",)),
        Linears(("mlp.c_fc",), fed_by="ln_2"),
        Linears(("mlp.c_proj",)),
    ),
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    optional=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
    renames=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
    transposed=True,
    cuts=Cuts(
        heads=("attn.c_attn:out", "attn.c_attn:out", "attn.c_attn:out", "attn.c_proj:in"),
        ffn=("mlp.c_fc:out", "mlp.c_proj:in"),
        square=True,
        inner="n_inner",
    ),
)
