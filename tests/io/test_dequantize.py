"""A GGUF becomes a plain folder: values, row order, config and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from pocketsize.io.dequantize import dequantize_folder
from tokenizers import Tokenizer

from pocketsize.errors import UnsupportedError
from pocketsize.models.load import load, tokenizer_of
from tiny import CHAT_TEMPLATE, HIDDEN, TEXT, weights, write_tiny

NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "q_proj.weight": "attn_q.weight",
    "k_proj.weight": "attn_k.weight",
    "v_proj.weight": "attn_v.weight",
    "o_proj.weight": "attn_output.weight",
    "gate_proj.weight": "ffn_gate.weight",
    "up_proj.weight": "ffn_up.weight",
    "down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def _neighbours(W: np.ndarray, heads: int) -> np.ndarray:
    """Row order of GGUF, spelled out: row 2i is row i of the head's first half, 2i + 1 of its second."""
    rows = W.shape[0] // heads
    order = [
        h * rows + half * rows // 2 + i for h in range(heads) for i in range(rows // 2) for half in (0, 1)
    ]
    return W[order]


def _write_gguf(
    folder: Path, tiny: Path, *, pre: str = "smollm", arch: str = "llama"
) -> dict[str, torch.Tensor]:
    """A GGUF of the tiny model at folder/tiny.gguf; gives the values that it means."""
    vocabulary = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    raw = json.loads(vocabulary.to_str())["model"]
    tokens = [token for token, _ in sorted(vocabulary.get_vocab().items(), key=lambda item: item[1])]
    writer = gguf.GGUFWriter(folder / "tiny.gguf", arch)
    for add, value in {
        writer.add_context_length: 256,
        writer.add_embedding_length: HIDDEN,
        writer.add_block_count: 2,
        writer.add_feed_forward_length: 128,
        writer.add_head_count: 4,
        writer.add_head_count_kv: 2,
        writer.add_rope_freq_base: 50000.0,
        writer.add_layer_norm_rms_eps: 1e-5,
        writer.add_vocab_size: len(tokens),
        writer.add_rope_dimension_count: HIDDEN // 4,
        writer.add_file_type: gguf.LlamaFileType.MOSTLY_Q4_1,
        writer.add_tokenizer_model: "gpt2",
        writer.add_tokenizer_pre: pre,
        writer.add_token_list: tokens,
        writer.add_token_types: [3 if i < 3 else 1 for i in range(len(tokens))],
        writer.add_token_merges: [" ".join(pair) for pair in raw["merges"]],
        writer.add_bos_token_id: 1,
        writer.add_eos_token_id: 2,
        writer.add_pad_token_id: 2,
        writer.add_unk_token_id: 0,
        writer.add_chat_template: CHAT_TEMPLATE,
    }.items():
        add(value)
    meant = {}
    tensors = weights(load(tiny).config, torch.float32, 5)
    del tensors["lm_head.weight"]
    for name, tensor in tensors.items():
        inner = next(theirs for ours, theirs in NAMES.items() if name.endswith(ours))
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        kind = Kind.F32 if tensor.ndim == 1 else Kind.Q8_0 if "embed" in name else Kind.Q4_1
        values = tensor.numpy()
        heads = {"attn_q.weight": 4, "attn_k.weight": 2}.get(inner)
        stored = gguf.quantize(values if heads is None else _neighbours(values, heads), kind)
        writer.add_tensor(block + inner, stored, raw_dtype=kind)
        back = gguf.dequantize(gguf.quantize(values, kind), kind)
        meant[name] = torch.from_numpy(np.array(back, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def test_every_value_is_what_the_file_means(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny", "llama")
    meant = _write_gguf(tmp_path, tiny)
    out = tmp_path / "out"
    out.mkdir()
    assert dequantize_folder(tmp_path / "tiny.gguf", out) == "GGUF Q4_1"
    model = load(out)
    assert set(model.checkpoint.entries) == set(meant)
    assert all(torch.equal(model.weight(name), tensor) for name, tensor in meant.items())
    assert model.tied
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 50000.0
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_is_the_same(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny", "llama")
    _write_gguf(tmp_path, tiny)
    (tmp_path / "out").mkdir()
    dequantize_folder(tmp_path / "tiny.gguf", tmp_path / "out")
    ours, theirs = tokenizer_of(load(tmp_path / "out")), tokenizer_of(load(tiny))
    for text in [*TEXT, "  5", "In  2024   12 x", "<|im_start|>user\nHi<|im_end|>", "a  b \n\n 3", ""]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "12 3"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours.eos_token == "<|im_end|>" and ours.pad_token_id == 2 and ours.unk_token_id == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"pre": "qwen2"}, "tokenizer gpt2/qwen2"), ({"arch": "gemma3"}, "architecture 'gemma3'")],
)
def test_other_kinds_are_refused(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    _write_gguf(tmp_path, write_tiny(tmp_path / "tiny", "llama"), **settings)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedError, match=words):
        dequantize_folder(tmp_path / "tiny.gguf", tmp_path / "out")
