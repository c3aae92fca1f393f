"""Folders in compressed-tensors form, loaded by stock transformers."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from exporting.rounded import quantized
from pocketsize.errors import IntegrityError, NumericalError, RefusedError, UnsupportedError
from pocketsize.exporting import plain
from pocketsize.exporting.behaviour import loaded
from pocketsize.exporting.companions import copy_companions
from pocketsize.exporting.compressed_tensors import (
    pack_rows,
    predict_bytes,
    stored_value,
    write,
)
from pocketsize.exporting.plain import require_storable
from pocketsize.exporting.read_back import read_folder
from pocketsize.exporting.reload import reload_check
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.load import load
from pocketsize.models.products import quick_products
from pocketsize.models.quiet import quiet
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from pocketsize.quantization.unpack import unpack_rows
from tiny import write_tiny

IDS = torch.arange(5, 25)[None]


def scheme_of(bits: int, group: int | None, symmetric: bool) -> Scheme:
    return Scheme(bits, group, symmetric, scale_digits=8 if symmetric else max(4, min(8, 11 - bits)))


def stock(folder: Path, task: str) -> torch.nn.Module:
    """The model as transformers loads it, without anything of ours."""
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    auto = AutoModelForCausalLM if task == "generate" else AutoModel
    with quiet():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("columns", [1, 7, 32, 96, 100])
def test_packing_equals_the_format_library(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    before = codes.clone()
    packed = pack_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(unpack_rows(packed, bits, columns), codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (5, 32), (4, 32), (3, 32), (2, 32), (4, 64), (3, None)])
def test_stock_transformers_computes_what_we_do(tmp_path, tiny_llama, bits, symmetric, group):
    original = tiny_llama(group != 64)
    scheme = scheme_of(bits, group, symmetric)
    model = quantized(original, scheme)
    artifact = write(model, tmp_path)
    assert artifact.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert artifact.bytes == predict_bytes(original, lambda n: scheme if n in model.quantized else None)
    module = stock(tmp_path, "generate")
    with torch.no_grad():
        theirs = module(IDS)[0]  # symmetric weights are unpacked at the first forward
        ours = loaded(model, lambda name: stored_value(model, name))(IDS)[0]
    for name in model.linears:
        assert torch.equal(module.get_parameter(name), model.weight(name)), name
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_stays_is_stored_in_the_dtype_asked_for(tmp_path, tiny_llama, dtype, symmetric):
    original = replace(tiny_llama(False), dtype=dtype)
    scheme = scheme_of(4, 32, symmetric)
    model = quantized(original, scheme)
    artifact = write(model, tmp_path)
    assert artifact.bytes == predict_bytes(original, lambda n: scheme if n in model.quantized else None)
    stored = open_checkpoint(tmp_path)
    kept = [n for n in original.checkpoint.entries if n not in model.quantized]
    assert len(kept) == 7 and "lm_head.weight" in kept
    for name in kept:
        assert stored.read(name).dtype == dtype
        assert torch.equal(stored.read(name), original.original(name).to(dtype)), name
        assert torch.equal(stored_value(model, name), stored.read(name).float())
    with quiet():
        module = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert module.get_input_embeddings().weight.dtype == module.dtype == dtype
    with torch.no_grad():
        theirs = stock(tmp_path, "generate")(IDS)[0]
        ours = loaded(model, lambda name: stored_value(model, name))(IDS)[0]
        assert torch.equal(theirs, ours) and bool(module(IDS)[0].isfinite().all())
    for name in model.linears:  # in its own dtype too: 8 digits times a code of 4 bits fit into 11
        if dtype != torch.bfloat16:
            assert torch.equal(module.get_parameter(name).float(), model.weight(name)), name


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_originals_of_any_dtype_become_the_one_asked_for(tmp_path, stored):
    model = load(write_tiny(tmp_path / "in", "bert", dtype=stored))
    (tmp_path / "out").mkdir()
    write(model, tmp_path / "out")
    kinds = {entry.dtype for entry in open_checkpoint(tmp_path / "out").entries.values()}
    assert kinds == {"BF16"}


def test_values_beyond_float16_are_refused_by_name(tmp_path):
    folder = write_tiny(tmp_path / "in", "llama")
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"][3:5] = 1e5
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5  # quantized: its scale is stored, not its value
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    require_storable(model)
    halves = replace(model, dtype=torch.float16)
    with pytest.raises(NumericalError) as caught:
        require_storable(halves)
    assert str(folder / "model.safetensors") in str(caught.value)
    assert (
        "model.norm.weight: 2 of its 64 values are beyond float16, such as 1e+05; use dtype bf16 or"
        in str(caught.value)
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(NumericalError, match=r"model\.norm\.weight"):
        write(quantized(halves, scheme_of(4, 32, False)), tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_encoders_load_too(tmp_path, family):
    model = quantized(load(write_tiny(tmp_path / "in", family)), scheme_of(4, 32, False))
    (tmp_path / "out").mkdir()
    write(model, tmp_path / "out")
    module = stock(tmp_path / "out", "embed")
    with torch.no_grad():
        theirs = module(IDS)[0]
        ours = loaded(model, lambda name: stored_value(model, name))(IDS)[0]
    assert torch.equal(theirs, ours)


def test_our_own_reader_gives_the_same_weights(tmp_path, tiny_llama):
    model = quantized(tiny_llama(False), scheme_of(3, 32, False))
    write(model, tmp_path)
    back = read_folder(tmp_path)
    assert set(back.checkpoint.entries) == set(model.checkpoint.entries)
    for name in model.checkpoint.entries:
        assert torch.equal(back.weight(name), stored_value(model, name)), name
    weight, again = model.quantized[model.linears[0]], back.quantized[model.linears[0]]
    assert torch.equal(weight.codes, again.codes) and torch.equal(weight.zero, again.zero)


def test_shards_hold_the_same_tensors(tmp_path, tiny_llama, monkeypatch):
    model = quantized(tiny_llama(True), scheme_of(4, 32, True))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    write(model, whole)
    monkeypatch.setattr(plain, "SHARD_BYTES", 30_000)
    artifact = write(model, parts)
    shards = sorted(parts.glob("*.safetensors"))
    assert len(shards) > 2 and artifact.bytes == sum(s.stat().st_size for s in shards)
    a, b = read_folder(whole), read_folder(parts)
    assert all(torch.equal(a.weight(n), b.weight(n)) for n in a.checkpoint.entries)
    with torch.no_grad():
        assert torch.equal(stock(whole, "generate")(IDS)[0], stock(parts, "generate")(IDS)[0])


def test_two_writings_give_the_same_bytes(tmp_path, tiny_llama):
    model = quantized(tiny_llama(True), scheme_of(5, 32, False))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert write(model, tmp_path / "a").files == write(model, tmp_path / "b").files


def test_tied_head_is_not_stored_and_embeddings_of_another_width_stay_16_bit(tmp_path, tiny_llama):
    model = tiny_llama(True)
    write(quantized(model, Scheme(4, 32, True), Scheme(8, 32, True)), tmp_path)
    back = read_folder(tmp_path)
    assert back.tied and model.arch.embedding not in back.quantized
    assert back.checkpoint.entries[model.arch.embedding].dtype == "BF16"


def test_companions_are_copied_byte_for_byte(tmp_path, tiny_llama):
    model = tiny_llama(True)
    write(model, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (model.folder / name).read_bytes()


def test_module_folders_of_sentence_encoders(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "1_Pooling").mkdir(parents=True), out.mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    assert set(copy_companions(source, out)) == {"modules.json", "1_Pooling/config.json"}
    (source / "modules.json").write_text(json.dumps([{"path": "../elsewhere"}]))
    with pytest.raises(RefusedError, match="leaves the folder"):
        copy_companions(source, out)


def test_mixed_schemes_name_their_layers(tmp_path, tiny_llama):
    model = tiny_llama(True)
    schemes = [Scheme(8, 32, True), Scheme(4, 64, True)]
    weights = {n: rtn(model.original(n), schemes["mlp" in n]) for n in model.linears[:-1]}
    model = model.with_quantized(weights)
    write(model, tmp_path)
    module = stock(tmp_path, "generate")
    with torch.no_grad():
        theirs, ours = module(IDS)[0], loaded(model, lambda name: stored_value(model, name))(IDS)[0]
    assert torch.equal(theirs, ours)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert model.linears[-1].removesuffix(".weight") in config["ignore"]
    back = read_folder(tmp_path)
    assert all(torch.equal(back.weight(n), model.weight(n)) for n in model.linears[:-1])


def test_what_transformers_cannot_load_is_refused(tmp_path, tiny_llama):
    model = tiny_llama(True)
    schemes = [scheme_of(4, 32, False), scheme_of(3, 32, False)]
    mixed = model.with_quantized({n: rtn(model.original(n), schemes["mlp" in n]) for n in model.linears})
    with pytest.raises(UnsupportedError, match="one scheme alone"):
        write(mixed, tmp_path)
    name = model.linears[0]
    weight = rtn(model.original(name), Scheme(4, 32, True))
    odd = QWeight(weight.codes, weight.scale * 1.0001, weight.zero, weight.scheme)
    with pytest.raises(UnsupportedError, match=f"{name}: a scale is not exact"):
        write(model.with_quantized({name: odd}), tmp_path)


def test_a_fresh_process_agrees_and_a_changed_folder_is_told_apart(tmp_path, tiny_llama):
    model = quantized(tiny_llama(True), scheme_of(4, 32, True))
    write(model, tmp_path)
    assert "same logits" in reload_check(model, tmp_path)[0]
    other = quantized(tiny_llama(True), scheme_of(2, 32, True))
    with pytest.raises(IntegrityError, match="off by"):
        reload_check(other, tmp_path)


def test_the_comparison_multiplies_as_the_fresh_process_does(tmp_path, tiny_llama, monkeypatch):
    """Where inputs are rounded, the last digit of another library is another whole step."""
    monkeypatch.setattr("pocketsize.models.products.is_quicker", lambda: True)
    seen: list[str] = []

    def watched(module, rounds):
        module.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mkldnn.matmul.fp32_precision))

    monkeypatch.setattr("pocketsize.exporting.reload.round_inputs", watched)
    model = quantized(tiny_llama(True), scheme_of(4, 32, True))
    write(model, tmp_path)
    with quick_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        reload_check(model, tmp_path)
    assert set(seen) == {"none"}
