"""Codebooks in every format that has them, read by programs we did not write."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporting.rounded import quantized
from oracles.codebook import trits_of
from pocketsize.errors import DataError, IntegrityError, UnsupportedError
from pocketsize.exporting import bitsandbytes, compressed_tensors, packed
from pocketsize.exporting.behaviour import loaded
from pocketsize.exporting.gguf import codebooks, writer
from pocketsize.exporting.gguf.blocks import block_type, lacks, pack
from pocketsize.exporting.read_back import read_folder, read_gguf
from pocketsize.exporting.reload import reload_check
from pocketsize.exporting.table import EXPORTERS
from pocketsize.exporting.verify import verify_gguf
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.quiet import quiet
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme
from tiny import write_tiny

Llama = Callable[[bool], Model]
BLOCKS = ("IQ4_NL", "MXFP4", "TERNARY", "TQ2_0", "TQ1_0")
FP4 = ("NVFP4", "MXFP4")
IDS = torch.arange(5, 25)[None]


def stock(folder: Path) -> torch.nn.Module:
    """The model as transformers loads it, without anything of ours."""
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def every_code(scheme: Scheme, rows: int = 6, columns: int = 512) -> QWeight:
    """A matrix in which every code occurs, under scales from tiny to large."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, scheme.top + 1, (rows, columns), generator=g).to(torch.uint8)
    power = torch.randint(-14, 3, (rows, columns // scheme.width(columns)), generator=g)
    return QWeight(codes, 2.0**power, torch.zeros(power.shape), scheme)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("source", ["every_code", "rtn"])
def test_a_reader_we_did_not_write_gives_the_same_numbers(name: str, source: str) -> None:
    W = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    weight = rtn(W, NAMED[name]) if source == "rtn" else every_code(NAMED[name])
    kind = block_type(weight.scheme, 512, "w")
    data = pack(weight, "w")
    assert data.dtype == np.uint8 and data.shape == (len(weight.codes), kind.row_bytes(512))
    assert np.array_equal(dequantize(data, GGMLQuantizationType[kind.name]), weight.dequantize().numpy())
    assert 8 * kind.row_bytes(512) / 512 == pytest.approx(weight.scheme.bits_per_weight(512), abs=0.04)


@pytest.mark.parametrize("kind", codebooks.TYPES.values(), ids=lambda t: t.name)
def test_sizes_are_those_of_the_format(kind: codebooks.TableType) -> None:
    assert GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]] == (kind.block, kind.block_bytes)


def test_trits_are_the_digits_a_reader_takes() -> None:
    weight = every_code(NAMED["TQ1_0"], rows=1, columns=256)
    data, codes = pack(weight, "w")[0], weight.codes[0].tolist()
    for m in range(32):
        assert trits_of(int(data[m])) == [codes[m + 32 * n] for n in range(5)]
    for m in range(16):
        assert trits_of(int(data[32 + m])) == [codes[160 + m + 16 * n] for n in range(5)]
    for m in range(4):
        assert trits_of(int(data[48 + m]))[:4] == [codes[240 + m + 4 * n] for n in range(4)]


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4", "TERNARY", "TQ2_0", "TQ1_0"])
def test_llamacpp_runs_what_we_write(name: str, tmp_path: Path, tiny_llama: Llama) -> None:
    pytest.importorskip("xllamacpp", reason="runs files in llama.cpp")
    wide = name not in ("IQ4_NL", "MXFP4")
    original = load(write_tiny(tmp_path / "wide", "mistral", wide=True)) if wide else tiny_llama(False)
    model = quantized(original, NAMED[name], NAMED["Q8_0"])
    path = tmp_path / "model.gguf"
    artifact = writer.write(model, path)
    assert artifact.bytes == writer.predict_bytes(original, lambda n: _scheme(model, n))
    assert "llama.cpp picks" in verify_gguf(model, path)[-1]
    file = read_gguf(path)
    assert file.kinds["blk.0.attn_q.weight"] == codebooks.TYPES[str(NAMED[name].codebook)].name
    for parameter in original.checkpoint.entries:
        assert torch.equal(file.tensor(model, parameter), model.weight(parameter)), parameter


def test_embedding_and_head_may_be_blocks_of_a_codebook(tmp_path: Path, tiny_llama: Llama) -> None:
    pytest.importorskip("xllamacpp", reason="runs files in llama.cpp")
    model = quantized(tiny_llama(True), NAMED["IQ4_NL"], NAMED["IQ4_NL"])
    writer.write(model, tmp_path / "m.gguf")
    assert "llama.cpp picks" in verify_gguf(model, tmp_path / "m.gguf")[-1]


def test_gguf_says_what_it_lacks() -> None:
    assert lacks(NAMED["NF4"]) == "the codebook NF4" and lacks(NAMED["NVFP4"]) == "the codebook NVFP4"
    with pytest.raises(UnsupportedError, match="hold 256 weights; a group of 96"):
        block_type(NAMED["TERNARY"], 96, "w")


@pytest.mark.parametrize("name", FP4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stock_transformers_computes_what_we_do(
    name: str, dtype: torch.dtype, tmp_path: Path, tiny_llama: Llama
) -> None:
    original = replace(tiny_llama(True), dtype=dtype)
    model = quantized(original, NAMED[name])
    artifact = compressed_tensors.write(model, tmp_path)
    assert artifact.bytes == compressed_tensors.predict_bytes(original, lambda n: _scheme(model, n))
    module = stock(tmp_path)
    for parameter in model.linears:
        assert torch.equal(module.get_parameter(parameter), model.weight(parameter)), parameter
    with torch.no_grad():
        ours = loaded(model, lambda n: compressed_tensors.stored_value(model, n))(IDS)[0]
        assert torch.equal(module(IDS)[0], ours)
    back = read_folder(tmp_path)
    assert set(back.checkpoint.entries) == set(model.checkpoint.entries)
    for parameter in model.linears:
        assert torch.equal(back.weight(parameter), model.weight(parameter)), parameter


def test_a_fresh_process_loads_float4(tmp_path: Path, tiny_llama: Llama) -> None:
    model = quantized(tiny_llama(False), NAMED["NVFP4"])
    compressed_tensors.write(model, tmp_path)
    assert "same logits" in reload_check(model, tmp_path)[0]


@pytest.mark.parametrize("name", FP4)
def test_float4_is_packed_as_the_format_library_packs_it(
    name: str, tmp_path: Path, tiny_llama: Llama
) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    model = quantized(tiny_llama(True), NAMED[name])
    compressed_tensors.write(model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for parameter in model.linears:
        weight = model.quantized[parameter]
        table = weight.scheme.table
        assert table is not None
        values = torch.tensor(table.values)[weight.codes.int()]
        assert torch.equal(held[f"{parameter}_packed"], pack_fp4_to_uint8(values))
        if name == "MXFP4":
            assert torch.equal(torch.exp2(held[f"{parameter}_scale"].float() - 127), weight.scale)
        else:
            scale = held[f"{parameter}_scale"].float() / held[f"{parameter}_global_scale"]
            assert torch.equal(scale, weight.scale)


def test_linears_that_read_the_same_tensor_share_their_matrix_scale(
    tmp_path: Path, tiny_llama: Llama
) -> None:
    model = quantized(tiny_llama(True), NAMED["NVFP4"])
    weights = dict(model.quantized)
    grown = "model.layers.0.self_attn.k_proj.weight"
    weights[grown] = replace(weights[grown], scale=weights[grown].scale * 4)
    compressed_tensors.write(model.with_quantized(weights), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    scales = [float(held[f"model.layers.0.self_attn.{n}_proj.weight_global_scale"]) for n in "qkvo"]
    assert scales[0] == scales[1] == scales[2] != scales[3]


def test_folders_say_what_they_lack(tiny_llama: Llama) -> None:
    arch = tiny_llama(True).arch
    for name in ("IQ4_NL", "TERNARY", "NF4"):
        assert EXPORTERS["folder"].lacks(NAMED[name]) == f"the codebook {name}"
        assert EXPORTERS["gptq"].lacks(NAMED[name]) == f"the codebook {name}"
        assert EXPORTERS["awq"].lacks(NAMED[name]) == f"the codebook {name}"
    assert EXPORTERS["bitsandbytes"].lacks(NAMED["NF4"]) is None
    assert EXPORTERS["bitsandbytes"].lacks(NAMED["MXFP4"]) == "codes of MXFP4, only NF4"
    two = [NAMED["NVFP4"], Scheme(8, None, symmetric=True)]
    assert compressed_tensors.mixes(two, arch) == "NVFP4 stands alone in a folder; use one scheme"
    assert compressed_tensors.mixes([NAMED["NVFP4"], None], arch) is None
    why = compressed_tensors.mixes([NAMED["MXFP4"]], replace(arch, transposed=True))
    assert why is not None and "unpacks linears of this family" in why


def test_bitsandbytes_tensors_are_those_of_the_format(tmp_path: Path, tiny_llama: Llama) -> None:
    original = tiny_llama(False)
    model = quantized(original, NAMED["NF4"])
    artifact = EXPORTERS["bitsandbytes"].write(model, tmp_path)
    assert "unpacked by our reader" in artifact.checks[0]
    assert artifact.bytes == EXPORTERS["bitsandbytes"].predict_bytes(original, lambda n: _scheme(model, n))
    held = load_file(tmp_path / "model.safetensors")
    name = model.linears[0]
    weight, (rows, columns) = model.quantized[name], model.matrix_shape(name)
    flat = weight.codes.flatten().tolist()
    assert held[name].shape == (rows * columns // 2, 1)
    assert held[name].flatten().tolist() == [a * 16 + b for a, b in zip(flat[::2], flat[1::2], strict=True)]
    assert torch.equal(held[f"{name}.absmax"], weight.scale.flatten())
    said = json.loads(bytes(held[f"{name}.{bitsandbytes.STATE}"].tolist()))
    assert said == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    back = load(tmp_path)
    assert all(torch.equal(back.original(n), model.weight(n)) for n in model.linears)


def test_stock_transformers_with_bitsandbytes_has_our_weights(tmp_path: Path, tiny_llama: Llama) -> None:
    library = pytest.importorskip("bitsandbytes", reason="loads NF4 in bitsandbytes")
    pytest.importorskip("accelerate")
    model = quantized(tiny_llama(False), NAMED["NF4"])
    packed.write(bitsandbytes.NF4, model, tmp_path)
    module = stock(tmp_path)
    for name in model.linears:
        stored = module.get_parameter(name)
        assert stored.quant_state is not None
        W = library.functional.dequantize_4bit(stored.data, stored.quant_state).float()
        expected = model.weight(name)
        assert torch.equal(W, expected.to(stored.quant_state.dtype).float()), name
    with torch.no_grad():
        ours = loaded(model, lambda n: packed.stored_value(model, n))(IDS)[0]
        theirs = module(IDS)[0]
    assert float((theirs - ours).abs().max() / (ours.max() - ours.min())) < 0.02


def test_bitsandbytes_libraries_pack_as_we_do() -> None:
    library = pytest.importorskip("bitsandbytes", reason="packs NF4 in bitsandbytes")
    W = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    stored, state = library.functional.quantize_4bit(
        W, blocksize=64, quant_type="nf4", compress_statistics=False
    )
    codes = torch.stack((stored.flatten() >> 4, stored.flatten() & 15), dim=-1).view(16, 128)
    scale = state.absmax.view(16, 2)
    q = QWeight(codes, scale, torch.zeros_like(scale), NAMED["NF4"])
    assert torch.equal(q.dequantize(), library.functional.dequantize_4bit(stored, state))
    assert torch.equal(state.code, torch.tensor(NAMED["NF4"].table.values))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_type": "fp4"}, "plain nf4"),
        ({"blocksize": 128}, "plain nf4"),
        ({"nested_blocksize": 256}, "plain nf4"),
        ({"shape": [64, -1]}, "two sizes"),
        (None, "not readable"),
    ],
)
def test_odd_bitsandbytes_tensors_are_refused_by_name(
    change: dict[str, object] | None, said: str, tmp_path: Path, tiny_llama: Llama
) -> None:
    model = quantized(tiny_llama(False), NAMED["NF4"])
    packed.write(bitsandbytes.NF4, model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    key = f"{model.linears[0]}.{bitsandbytes.STATE}"
    state = json.dumps(json.loads(bytes(held[key].tolist())) | change) if change else "{"
    held[key] = torch.tensor(list(state.encode()), dtype=torch.uint8)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=said):
        load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"load_in_4bit": False}, {"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": True}]
)
def test_other_bitsandbytes_folders_are_refused(
    change: dict[str, object], tmp_path: Path, tiny_llama: Llama
) -> None:
    packed.write(bitsandbytes.NF4, quantized(tiny_llama(False), NAMED["NF4"]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="bitsandbytes"):
        load(tmp_path)


def test_scales_that_are_no_float8_are_refused(tmp_path: Path, tiny_llama: Llama) -> None:
    model = quantized(tiny_llama(True), NAMED["NVFP4"])
    name = model.linears[0]
    bent = replace(model.quantized[name], scale=model.quantized[name].scale * 1.01)
    with pytest.raises(UnsupportedError, match="no float8"):
        compressed_tensors.write(model.with_quantized({**model.quantized, name: bent}), tmp_path)


def test_damage_to_packed_float4_is_found(tmp_path: Path, tiny_llama: Llama) -> None:
    model = quantized(tiny_llama(True), NAMED["MXFP4"])
    compressed_tensors.write(model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held[f"{model.linears[0]}_packed"][0, 0] ^= 3
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="off by"):
        reload_check(model, tmp_path)


def _scheme(model: Model, name: str) -> Scheme | None:
    return model.quantized[name].scheme if name in model.quantized else None
