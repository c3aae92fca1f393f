"""GGUF files, read by the `gguf` package and run in llama.cpp."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporting.rounded import SCHEMES, quantized
from pocketsize.errors import IntegrityError, NumericalError, UnsupportedError
from pocketsize.exporting.gguf.names import gguf_name, row_order
from pocketsize.exporting.gguf.writer import (
    metadata,
    predict_bytes,
    refuses,
    require_range,
    rope_factors,
    stored_value,
    write,
)
from pocketsize.exporting.read_back import read_gguf
from pocketsize.exporting.verify import verify_gguf
from pocketsize.models.load import load
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from tiny import write_tiny

pytest.importorskip("xllamacpp", reason="runs files in llama.cpp")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", list(SCHEMES))
def test_every_tensor_is_ours_and_llamacpp_agrees(tmp_path, tiny_llama, kind, tied):
    original = tiny_llama(tied)
    model = quantized(original, SCHEMES[kind], SCHEMES["Q8_0"])
    path = tmp_path / "model.gguf"
    artifact = write(model, path)
    scheme_of = {name: weight.scheme for name, weight in model.quantized.items()}.get
    assert artifact.bytes == path.stat().st_size == predict_bytes(original, scheme_of)
    checks = verify_gguf(model, path)
    assert checks[0].startswith("all ") and "llama.cpp picks" in checks[-1]
    file = read_gguf(path)
    assert file.kinds["blk.0.attn_q.weight"] == kind and file.kinds["token_embd.weight"] == "Q8_0"
    assert ("output.weight" in file.kinds) != tied
    for name in original.checkpoint.entries:
        assert torch.equal(file.tensor(model, name), model.weight(name)), name


def test_mistral_is_llama_to_llamacpp(tmp_path):
    model = quantized(load(write_tiny(tmp_path / "in", "mistral")), SCHEMES["Q4_0"], SCHEMES["Q8_0"])
    write(model, tmp_path / "m.gguf")
    assert "llama.cpp picks" in verify_gguf(model, tmp_path / "m.gguf")[-1]
    assert read_gguf(tmp_path / "m.gguf").fields["llama.attention.key_length"] == 32


def test_a_sliding_window_bounds_the_context(tmp_path):
    source = write_tiny(tmp_path / "in", "mistral")
    long = with_config(tmp_path / "long", source, sliding_window=1024, max_position_embeddings=4096)
    assert metadata(long, "F32")["llama.context_length"] == 1024
    short = refuses(with_config(tmp_path / "short", source, sliding_window=128))
    assert short is not None and "sliding_window 128" in short


@pytest.mark.parametrize(
    ("dtype", "floats"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "F16")]
)
def test_float_files(tmp_path, tiny_llama, dtype, floats):
    model, path = replace(tiny_llama(False), dtype=dtype), tmp_path / "model.gguf"
    write(model, path)
    sentence = verify_gguf(model, path)[-1]
    assert "100.0% where the margin" in sentence
    assert path.stat().st_size == predict_bytes(model, lambda _: None)
    file = read_gguf(path)
    assert file.kinds["output_norm.weight"] == "F32" and file.kinds["output.weight"] == floats
    assert torch.equal(file.tensor(model, "lm_head.weight"), stored_value(model, "lm_head.weight"))


def test_two_writings_give_the_same_bytes(tmp_path, tiny_llama):
    model = quantized(tiny_llama(True), SCHEMES["Q5_1"])
    a, b = write(model, tmp_path / "a.gguf"), write(model, tmp_path / "b.gguf")
    assert a.files["a.gguf"] == b.files["b.gguf"]


def test_larger_groups_repeat_their_scale(tmp_path, tiny_llama):
    model = quantized(tiny_llama(True), Scheme(4, 64, symmetric=True))
    write(model, tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    assert all(torch.equal(file.tensor(model, n), model.weight(n)) for n in model.linears)


def test_metadata_is_complete(tmp_path, tiny_llama):
    model = tiny_llama(True)
    write(model, tmp_path / "m.gguf")
    fields = read_gguf(tmp_path / "m.gguf").fields
    expected = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: fields.get(key) for key in expected} == expected
    assert "<|im_start|>" in str(fields["tokenizer.chat_template"])
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_rows_of_queries_and_keys_are_interleaved(tiny_llama):
    model = tiny_llama(True)
    order = row_order(model, "model.layers.0.self_attn.k_proj.weight")
    assert order is not None and order[:4].tolist() == [0, 8, 1, 9] and order[16:18].tolist() == [16, 24]
    assert row_order(model, "model.layers.0.self_attn.v_proj.weight") is None
    assert gguf_name(model, "model.layers.1.mlp.down_proj.weight") == "blk.1.ffn_down.weight"


def with_config(folder, source, **changes):
    """A copy of a tiny model with other values in its config."""
    shutil.copytree(source, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return load(folder)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}])
def test_scaled_rotary_embeddings_run_the_same_in_llamacpp(tmp_path, tiny_llama, rope):
    model = with_config(tmp_path / "in", tiny_llama(True).folder, rope_parameters=rope)
    write(model, tmp_path / "m.gguf")
    assert "100.0% where the margin" in verify_gguf(model, tmp_path / "m.gguf")[-1]


def test_llama3_factors_are_those_of_transformers(tmp_path, tiny_llama):
    model = with_config(tmp_path / "in", tiny_llama(True).folder, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 16, 2).float() / 16)
    factors = rope_factors(model)
    assert factors is not None and torch.allclose(plain / factors, scaled, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary embedding"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_llamacpp_would_compute_otherwise_is_refused(tmp_path, tiny_llama, changes, match):
    reason = refuses(with_config(tmp_path / "in", tiny_llama(True).folder, **changes))
    assert reason is not None and match in reason


def test_other_families_are_refused(tmp_path):
    reason = refuses(load(write_tiny(tmp_path / "bert", "bert")))
    assert reason is not None and "bert" in reason


def test_values_that_float16_cannot_hold(tmp_path, tiny_llama):
    model = tiny_llama(True)
    large = rtn(model.original(model.linears[0]), Scheme(4, 32, symmetric=True))
    shutil.copytree(model.folder, tmp_path / "in")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors[model.linears[0]][0, 0] = 1e5
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    changed = load(tmp_path / "in")
    said = f"{model.linears[0]}: 1 of its .* values are beyond F16, such as 1e\\+05; use dtype fp32"
    with pytest.raises(NumericalError, match=said):
        write(changed, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    write(replace(changed, dtype=torch.float32), tmp_path / "m.gguf")
    tensors["model.embed_tokens.weight"][3, 0] = -7e4
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match=r"embed_tokens\.weight: 1 of its .* beyond F16, such as -7e"):
        require_range(load(tmp_path / "in"), model.ends)
    require_range(replace(load(tmp_path / "in"), dtype=torch.float32), model.ends)
    require_range(load(tmp_path / "in"), ())
    odd = model.with_quantized({model.linears[0]: large})
    assert predict_bytes(odd, lambda _: None) == predict_bytes(model, lambda _: None)


def test_three_bits_are_refused_by_name(tmp_path, tiny_llama):
    model = quantized(tiny_llama(True), Scheme(3, 32, symmetric=True))
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight: GGUF has no block for 3-bit"):
        write(model, tmp_path / "m.gguf")


def test_verify_gguf_sees_swapped_tensors(tmp_path, tiny_llama):
    model, path = quantized(tiny_llama(True), SCHEMES["Q4_0"]), tmp_path / "m.gguf"
    write(model, path)
    tensors = {t.name: t for t in GGUFReader(path, "r+").tensors}
    a, b = tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_gate.weight"].data
    kept = np.array(a)
    a[:], b[:] = b, kept
    a.flush() if hasattr(a, "flush") else None
    with pytest.raises(IntegrityError, match=r"blk\.0\.ffn_(up|gate)\.weight does not hold"):
        verify_gguf(model, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_is_never_written(tmp_path, tiny_llama, dtype):
    model = replace(tiny_llama(True), dtype=dtype)
    nothing = torch.full((64,), float("nan"))
    with pytest.raises(NumericalError, match=r"model\.norm\.weight: 64 of its 64 values"):
        write(model.with_quantized({}, {"model.norm.weight": nothing}), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
