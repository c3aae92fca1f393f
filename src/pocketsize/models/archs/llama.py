"""Llama blocks: SmolLM2, TinyLlama, Llama 2 and 3."""

from pocketsize.models.arch import Arch, Linears

ARCH = Arch(
    task="generate",
    blocks="model.layers",
    groups=(
        Linears(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attends=True),
        Linears(("self_attn.o_proj",)),
        Linears(("mlp.gate_proj", "mlp.up_proj")),
        Linears(("mlp.down_proj",)),
    ),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    gguf="llama",
)
