"""A plain float32 folder from a Llama in a GGUF file, for samples that come as one.

Nothing is guessed: a value that the file does not hold, or a tokenizer of another kind than the one
written here, is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.io.checkpoint import SINGLE, TensorSpec, write_safetensors
from pocketsize.io.publish import publish_bytes

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_T = TypeVar("_T")
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL = 3  # token type of special tokens in GGUF


def dequantize_folder(source: Path, out: Path) -> str:
    """Fill the folder `out` from a GGUF file; gives the name of the format that was dequantized."""
    from gguf import GGUFReader, LlamaFileType

    reader = GGUFReader(source)
    fields = _Fields(source, reader)
    if (family := fields.of("general.architecture", str)) != "llama":
        raise UnsupportedError(f"{source}: architecture {family!r}; only 'llama' is dequantized")
    config = _config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    _publish_json(out / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _publish_json(out / "generation_config.json", {"_from_model_config": True} | special)
    _write_tokenizer(fields, config, out)
    specs = sorted((_spec(source, tensor, heads) for tensor in reader.tensors), key=_running_order)
    write_safetensors(out / SINGLE, specs, {"format": "pt"})
    kind = LlamaFileType(fields.of("general.file_type", int)).name
    return f"GGUF {kind.removeprefix('MOSTLY_')}"


class _Fields:
    """The metadata of a GGUF file, by key and expected type."""

    def __init__(self, source: Path, reader: GGUFReader) -> None:
        self._source = source
        self._reader = reader

    def of(self, key: str, kind: type[_T]) -> _T:
        """The value of a key that must be there."""
        field = self._reader.get_field(key)
        value = None if field is None else field.contents()
        if not isinstance(value, kind):
            raise UnsupportedError(f"{self._source}: {key} is {value!r}; needed: {kind.__name__}")
        return value

    def decimal(self, key: str) -> float:
        """A float32 value as the shortest decimal that means it."""
        return float(str(np.float32(self.of(key, float))))


def _config(fields: _Fields, *, tied: bool) -> dict[str, object]:
    """The config as its family's users write it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields.of("tokenizer.ggml.bos_token_id", int),
        "dtype": "float32",
        "eos_token_id": fields.of("tokenizer.ggml.eos_token_id", int),
        "head_dim": fields.of("llama.rope.dimension_count", int),
        "hidden_act": "silu",
        "hidden_size": fields.of("llama.embedding_length", int),
        "intermediate_size": fields.of("llama.feed_forward_length", int),
        "max_position_embeddings": fields.of("llama.context_length", int),
        "mlp_bias": False,
        "num_attention_heads": fields.of("llama.attention.head_count", int),
        "num_hidden_layers": fields.of("llama.block_count", int),
        "num_key_value_heads": fields.of("llama.attention.head_count_kv", int),
        "pad_token_id": fields.of("tokenizer.ggml.padding_token_id", int),
        "rms_norm_eps": fields.decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.decimal("llama.rope.freq_base"),
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": fields.of("llama.vocab_size", int),
    }


def _spec(source: Path, tensor: ReaderTensor, heads: dict[str, object]) -> TensorSpec:
    """A tensor of the file under its Hugging Face name, dequantized when it is written."""
    inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
    name = _OUTER.get(tensor.name)
    if inner and inner[2] in _NAMES:
        name = f"model.layers.{inner[1]}.{_NAMES[inner[2]]}.weight"
    if name is None:
        raise UnsupportedError(f"{source}: tensor {tensor.name} has no place in a Llama")
    rows = heads.get(inner[2]) if inner else None
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return TensorSpec(name, torch.float32, shape, _maker(tensor, rows if isinstance(rows, int) else None))


def _maker(tensor: ReaderTensor, heads: int | None) -> Callable[[], Tensor]:
    def make() -> Tensor:
        from gguf import dequantize

        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        return values if heads is None else _halves_apart(values, heads)

    return make


def _halves_apart(W: Tensor, heads: int) -> Tensor:
    """Rows of each head from GGUF's order, where rotary pairs are neighbours, to halves apart."""
    rows, columns = W.shape
    return W.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _running_order(spec: TensorSpec) -> tuple[int, int, str]:
    """Embedding, blocks by number, then what follows them."""
    block = re.search(r"\.layers\.(\d+)\.", spec.name)
    place = 1 if block else (0 if "embed" in spec.name else 2)
    return place, int(block[1]) if block else 0, spec.name


def _write_tokenizer(fields: _Fields, config: dict[str, object], out: Path) -> None:
    """The byte-level BPE tokenizer: digits one by one, then GPT-2's split into words.

    That is what llama.cpp calls `smollm`; its ids are compared with llama.cpp's in the tests.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    found = fields.of("tokenizer.ggml.model", str), fields.of("tokenizer.ggml.pre", str)
    if found != ("gpt2", "smollm"):
        raise UnsupportedError(f"tokenizer {'/'.join(found)}; only gpt2/smollm is written")
    tokens = [str(token) for token in fields.of("tokenizer.ggml.tokens", list)]
    kinds = fields.of("tokenizer.ggml.token_type", list)
    merges = [tuple(str(merge).split(" ")) for merge in fields.of("tokenizer.ggml.merges", list)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(a, b) for a, b in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    publish_bytes(out / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())

    def word(key: str) -> str:
        return tokens[fields.of(f"tokenizer.ggml.{key}_token_id", int)]

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": word("bos"),
        "eos_token": word("eos"),
        "pad_token": word("padding"),
        "unk_token": word("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": fields.of("tokenizer.chat_template", str),
    }
    _publish_json(out / "tokenizer_config.json", settings)


def _publish_json(path: Path, value: dict[str, object]) -> None:
    publish_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
