"""Folders with 8-bit codes and rounded inputs, as stock transformers loads and runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from exporting.rounded import quantized
from pocketsize.errors import DataError, IntegrityError, UnsupportedError
from pocketsize.exporting import reload
from pocketsize.exporting.compressed_tensors import predict_bytes, predict_others, stored_value, write
from pocketsize.exporting.manifest import write_manifest
from pocketsize.exporting.read_back import read_folder
from pocketsize.exporting.reload import reload_check
from pocketsize.exporting.table import EXPORTERS, behaviours
from pocketsize.exporting.verify import verify_folder
from pocketsize.models.load import load
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme
from pocketsize.recipes.quantize import Gptq, Rtn
from tiny import write_tiny

WORDS = pytest.mark.parametrize("word", ["W8A8", "FP8"])


@WORDS
@pytest.mark.parametrize("family", ["llama", "mpnet"])
def test_stock_transformers_rounds_weights_and_inputs_as_we_do(
    tmp_path: Path, word: str, family: str
) -> None:
    original = load(write_tiny(tmp_path / "in", family))
    model = quantized(original, NAMED[word])
    (tmp_path / "out").mkdir()
    artifact = write(model, tmp_path / "out")
    assert artifact.bytes == predict_bytes(original, model.schemes.get)
    others = predict_others(original, model.schemes.get)
    assert others["config.json"] == (tmp_path / "out" / "config.json").stat().st_size
    (said,) = reload_check(model, tmp_path / "out")
    assert "within 0 of their range" in said
    again = read_folder(tmp_path / "out")
    assert again.schemes == model.schemes and again.rounds == model.rounds
    assert all(
        torch.equal(again.weight(name), stored_value(model, name)) for name in model.checkpoint.entries
    )


def test_a_forward_that_rounds_no_inputs_is_told_apart(tmp_path, tiny_llama, monkeypatch) -> None:
    model = quantized(tiny_llama(True), NAMED["W8A8"])
    write(model, tmp_path)
    monkeypatch.setattr(reload, "round_inputs", lambda module, rounds: None)
    with pytest.raises(IntegrityError, match="are off by"):
        reload_check(model, tmp_path)


@WORDS
def test_weights_equal_the_format_librarys(tmp_path, tiny_llama, word: str) -> None:
    model = quantized(tiny_llama(True), NAMED[word])
    write(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group, stored = config["config_groups"]["group_0"], load_file(tmp_path / "model.safetensors")
    form = "float-quantized" if word == "FP8" else "int-quantized"
    assert config["format"] == group["format"] == form and "dequantize" not in config
    library, scheme = BaseCompressor.get_value_from_registry(form), QuantizationScheme.model_validate(group)
    for name in model.linears:
        parts = {"weight": stored[name], "weight_scale": stored[f"{name}_scale"].float()}
        assert torch.equal(library.decompress(parts, scheme)["weight"], model.weight(name)), name
        packed = library.compress(parts | {"weight": model.weight(name)}, scheme)["weight"]
        assert torch.equal(packed.view(torch.uint8), stored[name].view(torch.uint8)), name


def test_some_linears_round_their_inputs_and_others_do_not(tmp_path, tiny_llama) -> None:
    original, mixed = tiny_llama(True), dict[str, Scheme]()
    for i, name in enumerate(original.linears):
        mixed[name] = (Scheme(4, 32, symmetric=True), NAMED["W8A8"], NAMED["FP8"])[i % 3]
    del mixed[original.linears[-1]]
    model = original.with_quantized({n: rtn(original.matrix(n), s) for n, s in mixed.items()})
    artifact = EXPORTERS["folder"].write(model, tmp_path)
    assert "within 0 of their range" in artifact.checks[0]
    assert artifact.bytes == predict_bytes(original, mixed.get)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert read_folder(tmp_path).schemes == mixed


def test_verify_compares_codes_and_scales(tmp_path, tiny_llama) -> None:
    model = quantized(tiny_llama(True), NAMED["W8A8"])
    artifact = write(model, tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({"behaviour": behaviours(model, [artifact])}))
    write_manifest(tmp_path)
    assert all(check.ok for check in verify_folder(tmp_path))
    held = load_file(tmp_path / "model.safetensors")
    name = model.linears[3]
    held[name][0, 0] ^= 1
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wrong = [check for check in verify_folder(tmp_path) if not check.ok]
    assert any(f"tensor {name}: its values have changed" in check.detail for check in wrong)


def test_codes_of_another_type_are_refused_by_name(tmp_path, tiny_llama) -> None:
    model = quantized(tiny_llama(True), NAMED["FP8"])
    write(model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held[model.linears[0]] = held[model.linears[0]].view(torch.int8)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"q_proj\.weight is stored as I8"):
        read_folder(tmp_path).weight(model.linears[0])


@pytest.mark.parametrize(
    ("family", "said"),
    [("gpt2", "would round no inputs"), ("qwen3_moe", "would round no inputs"), ("opt", "joins texts")],
)
def test_families_whose_loader_does_not_round_token_by_token_are_refused(tmp_path, family, said) -> None:
    model = load(write_tiny(tmp_path, family))
    with pytest.raises(UnsupportedError, match=said):
        Rtn("W8A8").resolve(model, ("folder",))


def test_gguf_has_no_rounded_inputs(tiny_llama) -> None:
    with pytest.raises(UnsupportedError, match=r"gguf cannot store rounded inputs \(FP8\)"):
        Gptq("FP8").resolve(tiny_llama(True), ("gguf",))
    alone = Scheme(8, 32, symmetric=True, floats=True)
    assert EXPORTERS["folder"].lacks(alone) == "float8 weights whose inputs are not rounded"


def test_a_model_with_rounded_inputs_keeps_its_dtype(tmp_path, tiny_llama) -> None:
    model = replace(quantized(tiny_llama(True), NAMED["FP8"]), dtype=torch.float16)
    write(model, tmp_path)
    kinds = {str(T.dtype) for T in load_file(tmp_path / "model.safetensors").values()}
    assert kinds == {"torch.float8_e4m3fn", "torch.bfloat16", "torch.float16"}
