"""GPT-NeoX blocks, Pythia's: attention and MLP side by side, both reading the block's input."""

from pocketsize.models.arch import Arch, Cuts, Linears

ARCH = Arch(
    task="generate",
    blocks="gpt_neox.layers",
    groups=(
        Linears(("attention.query_key_value",), attends=True, fed_by="input_layernorm"),
        Linears(("attention.dense",)),
        Linears(("mlp.dense_h_to_4h",), fed_by="post_attention_layernorm"),
        Linears(("mlp.dense_4h_to_h",)),
    ),
    embedding="gpt_neox.embed_in.weight",
    head="lm_head.weight",
    optional=(
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    ),
    renames=((r"^embed_out\.", "lm_head."),),
    cuts=Cuts(
        heads=("attention.dense:in",),
        bundles=("attention.query_key_value:out",),
        ffn=("mlp.dense_h_to_4h:out", "mlp.dense_4h_to_h:in"),
        square=True,
    ),
)
