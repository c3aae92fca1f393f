"""Folders that come quantized: read as the matrices they stand for, or refused by the name of their kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from oracles import packed as oracle
from pocketsize.cli.main import main
from pocketsize.exporting.compressed_tensors import write
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme
from tiny import TEXT, write_tiny

GROUP = 32
Meant = dict[str, torch.Tensor]


def _config(folder: Path, said: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))


def _pack(folder: Path, pack: Callable[[torch.Tensor], tuple[Meant, torch.Tensor]]) -> Meant:
    """Replace each matrix of the blocks; gives what each of them means now."""
    meant, held = {}, load_file(folder / "model.safetensors")
    model = load(folder)
    for name in model.linears:
        parts, W = pack(model.matrix(name))
        del held[name]
        held |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        meant[name] = model.as_stored(name, W.float())
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def gptq(folder: Path, *, order: bool = False, version: str = "gptq", bits: int = 4) -> Meant:
    """The folder with its matrices as GPTQ packs them."""

    def pack(W: torch.Tensor) -> tuple[Meant, torch.Tensor]:
        group_of = torch.arange(W.shape[1]) // GROUP
        if order:
            group_of = group_of[torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(1))]
        codes, zeros, scales = _rounded(W, group_of, bits)
        qweight, qzeros = oracle.gptq_pack(codes, zeros, bits, shifted=version == "gptq")
        parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        parts |= {"g_idx": group_of.int()} if order else {}
        return parts, oracle.matrix(codes, zeros, scales, group_of)

    meant = _pack(folder, pack)
    said = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": order}
    _config(folder, said | {"checkpoint_format": version})
    return meant


def awq(folder: Path) -> Meant:
    """The folder with its matrices as AutoAWQ packs them."""

    def pack(W: torch.Tensor) -> tuple[Meant, torch.Tensor]:
        group_of = torch.arange(W.shape[1]) // GROUP
        codes, zeros, scales = _rounded(W, group_of, 4)
        parts = {"qweight": oracle.awq_pack(codes), "qzeros": oracle.awq_pack(zeros), "scales": scales}
        return parts, oracle.matrix(codes, zeros, scales, group_of)

    meant = _pack(folder, pack)
    said = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    _config(folder, said)
    return meant


def compressed(folder: Path, *, symmetric: bool = True, bits: int = 4, group: int | None = GROUP) -> Meant:
    """The folder with its matrices as the compressed-tensors package packs them, and as it unpacks them."""
    along = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **along}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})

    def pack(W: torch.Tensor) -> tuple[Meant, torch.Tensor]:
        group_of = torch.arange(W.shape[1]) // (group or W.shape[1])
        _, zeros, scales = _rounded(W, group_of, bits)
        middle = 1 << (bits - 1)
        state: Meant = {"weight": W, "weight_scale": scales.T.float().contiguous()}
        if not symmetric:
            state["weight_zero_point"] = (zeros.T - middle).to(torch.int8).contiguous()
        packed = PackedQuantizationCompressor.compress(state, scheme)
        assert ("weight_zero_point" in packed) is not symmetric
        return packed, PackedQuantizationCompressor.decompress(packed, scheme)["weight"]

    meant = _pack(folder, pack)
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    _config(folder, said | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    return meant


def plain_codes(folder: Path) -> Meant:
    """Codes of 8 bits as they are: int8 under the weight's own name, a scale for each row."""
    meant: Meant = {}
    held = load_file(folder / "model.safetensors")
    for name in [name for name in held if name.endswith("_proj.weight")]:
        scale = held[name].abs().amax(1, keepdim=True) / 127
        held[name] = (held[name] / scale).round().to(torch.int8)
        held[f"{name}_scale"] = scale
        meant[name] = held[name].float() * scale
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    said = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    _config(folder, said | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    return meant


def _rounded(W: torch.Tensor, group_of: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Codes [in, out], zeros and scales [groups, out] of a matrix, rounded to nearest."""
    top, groups = (1 << bits) - 1, int(group_of.max()) + 1
    low = torch.stack([W[:, group_of == g].amin(1) for g in range(groups)])
    high = torch.stack([W[:, group_of == g].amax(1) for g in range(groups)])
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(0, top).long()
    codes = (W.T / scales.float()[group_of] + zeros[group_of]).round().clamp(0, top).long()
    return codes, zeros, scales


KINDS: dict[str, tuple[Callable[[Path], Meant], str]] = {
    "gptq": (gptq, "gptq 4 bits group 32"),
    "gptq, 3 bits": (lambda f: gptq(f, bits=3), "gptq 3 bits group 32"),
    "gptq, inputs out of order": (lambda f: gptq(f, order=True), "gptq 4 bits group 32"),
    "gptq v2": (lambda f: gptq(f, version="gptq_v2"), "gptq 4 bits group 32"),
    "awq": (awq, "awq 4 bits group 32"),
    "compressed-tensors": (compressed, "compressed-tensors 4 bits group 32"),
    "compressed-tensors with zeros": (
        lambda f: compressed(f, symmetric=False, bits=3),
        "compressed-tensors 3 bits group 32",
    ),
    "compressed-tensors as they are": (plain_codes, "compressed-tensors 8 bits one scale a row"),
    "compressed-tensors by rows": (
        lambda f: compressed(f, bits=8, group=None),
        "compressed-tensors 8 bits one scale a row",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_what_they_stand_for(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = KINDS[kind]
    folder = write_tiny(tmp_path / "model", "llama")
    plain = load(folder)
    before = {name: plain.original(name) for name in plain.checkpoint.entries}
    meant = make(folder)
    model = load(folder)
    assert set(meant) == set(model.linears)
    assert all(torch.equal(model.original(name), W) for name, W in meant.items())
    other = [name for name in before if name not in meant]
    assert other and all(torch.equal(model.original(name), before[name]) for name in other)
    assert model.origin.dequantized_from == said and model.origin.parameters == plain.origin.parameters
    assert model.origin.source_bytes == (folder / "model.safetensors").stat().st_size
    assert not hasattr(model.config, "quantization_config")
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"already quantized: {said}; figures are relative to its dequantized weights" in out


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_transposed_matrices_and_experts(family: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", family)
    meant = gptq(folder, order=True)
    model = load(folder)
    assert all(torch.equal(model.original(name), W) for name, W in meant.items())


def own(model: Model, out: Path, scheme: Scheme) -> Model:
    """The model as a folder that we write."""
    weights = {n: rtn(model.matrix(n), scheme) for n in model.linears}
    small = model.with_quantized(weights)
    out.mkdir()
    write(small, out)
    return small


@pytest.mark.parametrize("word", ["W8A8", "FP8"])
def test_our_own_codes_of_eight_bits_are_read_and_their_inputs_are_not_rounded(
    word: str, tmp_path: Path
) -> None:
    small = own(load(write_tiny(tmp_path / "model", "llama")), tmp_path / "small", NAMED[word])
    back = load(tmp_path / "small")
    assert all(torch.equal(back.original(name), small.weight(name)) for name in small.linears)
    said = "compressed-tensors 8 bits one scale a row, its inputs not rounded here"
    assert back.origin.dequantized_from == said and not back.rounds
    assert back.origin.parameters == small.origin.parameters


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_our_own_folders_are_read(family: str, symmetric: bool, tmp_path: Path) -> None:
    scheme = Scheme(4, 32, symmetric, scale_digits=8 if symmetric else 7)
    small = own(load(write_tiny(tmp_path / "model", family)), tmp_path / "small", scheme)
    back = load(tmp_path / "small")
    assert all(torch.equal(back.original(name), small.weight(name)) for name in small.linears)
    assert back.origin.dequantized_from == "compressed-tensors 4 bits group 32"


def test_parts_in_two_files_count_as_both(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    meant = gptq(folder)
    held = load_file(folder / "model.safetensors")
    where = {name: f"{'b' if name.endswith('scales') else 'a'}.safetensors" for name in held}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({n: t for n, t in held.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    model = load(folder)
    assert model.checkpoint.files == ["a.safetensors", "b.safetensors"]
    assert all(torch.equal(model.original(name), W) for name, W in meant.items())
    changed = load_file(folder / "b.safetensors")
    changed[next(iter(changed))][0, 0] *= 2
    save_file(changed, folder / "b.safetensors")
    assert load(folder).origin.sha256 != model.origin.sha256


def test_it_is_quantized_again_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(TEXT) * 60)
    write_tiny(tmp_path / "plain", "llama")
    gptq(write_tiny(tmp_path / "model", "llama"))
    words = ["--data", "text.txt", "--tokens", "512", "--json"]
    assert main(["measure", "model", "--against", "plain", *words]) == 0
    rows = {(r["name"], r["subject"]): r for r in json.loads(capsys.readouterr().out)["measurements"]}
    assert 0 < rows["kl_mean", "compressed"]["value"] < 1 and rows["bytes", "."]["value"] > 0
    texts = ["--calibrate", "text.txt", "--evaluate", "text.txt", "--sequences", "2", "--length", "32"]
    scheme = ["--method", "rtn", "--scheme", "W8A16", "--target", "folder", "--tokens", "256"]
    assert main(["quantize", "model", *scheme, *texts, "-o", "small"]) == 0
    record = json.loads((tmp_path / "small" / "record.json").read_text())
    findings = {finding["code"]: finding["message"] for finding in record["findings"]}
    assert "already quantized (gptq 4 bits group 32)" in findings["already-quantized"]
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "relative to the dequantized release" in (tmp_path / "small" / "report.html").read_text()


def change(key: str, value: object) -> Callable[[Path], None]:
    """Packs as GPTQ, then sets one key of the quantization config (None: takes it out)."""

    def spoil(folder: Path) -> None:
        gptq(folder)
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        raw["quantization_config"][key] = value
        path.write_text(json.dumps(raw))

    return spoil


def part(end: str, make: Callable[[torch.Tensor], torch.Tensor | None], pack: Callable[[Path], Meant] = gptq):
    """Packs, then changes one tensor of one layer."""

    def spoil(folder: Path) -> None:
        pack(folder)
        held = load_file(folder / "model.safetensors")
        name = f"model.layers.1.mlp.up_proj.{end}"
        new = make(held.pop(name))
        held |= {} if new is None else {name: new.contiguous()}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def said(**keys: object) -> Callable[[Path], None]:
    return lambda folder: _config(folder, dict(keys))


LAYER = "tensor model.layers.1.mlp.up_proj."
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
WEIGHTS = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True}
FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "bitsandbytes": (
        said(quant_method="bitsandbytes"),
        4,
        "already quantized (bitsandbytes, 8 bits), which is",
    ),
    "fp8": (
        said(quant_method="fp8"),
        4,
        "(fp8), and only gptq, awq, compressed-tensors, bitsandbytes, sparse-bitmask are read; give the",
    ),
    "no method": (said(bits=4), 4, "already quantized (unnamed)"),
    "a text": (lambda f: _config(f, "awq"), 4, "already quantized (awq)"),  # type: ignore[arg-type]
    "marlin": (change("checkpoint_format", "marlin"), 4, "(gptq, marlin), which is not read"),
    "layers of their own": (change("dynamic", {"+:x": {"bits": 8}}), 4, "(gptq, dynamic), which is not read"),
    "5 bits": (change("bits", 5), 4, "5 bits; known here: 2, 3, 4, 8"),
    "group 0": (change("group_size", 0), 3, "group_size is 0"),
    "gemv": (said(quant_method="awq", bits=4, group_size=32, version="gemv"), 4, "(awq, gemv)"),
    "other format": (
        said(**PACKED | {"format": "mixed-precision"}, config_groups={"g": {"weights": WEIGHTS}}),
        4,
        "(compressed-tensors, mixed-precision)",
    ),
    "float8 with fewer bits": (
        said(**PACKED | {"format": "float-quantized"}, config_groups={"g": {"weights": WEIGHTS}}),
        4,
        "4 bits; known here: 8",
    ),
    "float8 in blocks": (
        said(
            **PACKED | {"format": "float-quantized"},
            config_groups={"g": {"weights": {"num_bits": 8, "strategy": "block", "symmetric": True}}},
        ),
        4,
        "(compressed-tensors, float-quantized by block)",
    ),
    "int8 with zeros": (
        said(
            **PACKED | {"format": "int-quantized"},
            config_groups={"g": {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": False}}},
        ),
        4,
        "(compressed-tensors, with zeros)",
    ),
    "int8 that is float32": (
        part("weight", lambda t: t.float(), plain_codes),
        3,
        f"{LAYER}weight is stored as F32; needed: I8, F8_E4M3",
    ),
    "too few scales": (
        part("weight_scale", lambda t: t[:5], plain_codes),
        3,
        f"{LAYER}weight_scale has shape [5, 1]; one for each row is needed",
    ),
    "activations": (
        said(**PACKED, config_groups={"g": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}),
        4,
        "(compressed-tensors, with activations)",
    ),
    "cache": (
        said(**PACKED, config_groups={"g": {"weights": WEIGHTS}}, kv_cache_scheme={"num_bits": 8}),
        4,
        "(compressed-tensors, with its cache)",
    ),
    "sparse": (
        said(**PACKED, config_groups={"g": {"weights": WEIGHTS}}, sparsity_config={"format": "sparse-24"}),
        4,
        "(compressed-tensors, sparse)",
    ),
    "nothing packed": (
        said(quant_method="gptq", bits=4, group_size=32),
        3,
        "said to be gptq 4 bits group 32, yet no tensor ends in qweight",
    ),
    "scales missing": (part("scales", lambda _: None), 3, f"{LAYER}scales is missing"),
    "zeros missing": (part("qzeros", lambda _: None), 3, f"{LAYER}qzeros is missing"),
    "scales of another shape": (part("scales", lambda t: t[:, :8]), 3, f"{LAYER}scales has shape [2, 8]"),
    "scales as numbers": (part("scales", lambda t: t.int()), 3, f"{LAYER}scales is stored as I32"),
    "codes as floats": (part("qweight", lambda t: t.float()), 3, f"{LAYER}qweight is stored as F32"),
    "codes cut": (part("qweight", lambda t: t[:4]), 3, "up_proj.weight has shape [128, 32]"),
    "codes in a row": (
        part("qweight", lambda t: t.flatten()),
        3,
        f"{LAYER}qweight has shape [1024]; rows and columns are needed",
    ),
    "a group outside": (
        part("g_idx", lambda t: t + 1, lambda f: gptq(f, order=True)),
        3,
        f"{LAYER}g_idx names a group outside the 2 that there are",
    ),
    "three groups for 64 inputs": (
        lambda f: (
            part("scales", lambda t: torch.cat([t, t[:1]]))(f),
            _again(f, "qzeros", lambda t: torch.cat([t, t[:1]])),
        ),
        3,
        "up_proj.weight: 3 groups for 64 inputs, which is not gptq 4 bits group 32",
    ),
    "words of a packed row": (
        part("weight_packed", lambda t: t[:, :5], compressed),
        3,
        f"{LAYER}weight_packed has 5 words a row",
    ),
    "shape of a packed matrix": (
        part("weight_shape", lambda t: -t, compressed),
        3,
        f"{LAYER}weight_shape is [-128, -64]",
    ),
    "one scale for all": (
        part("weight_scale", lambda t: t[:1, 0], compressed),
        3,
        f"{LAYER}weight_scale has shape [1]; rows and columns are needed",
    ),
    "no schemes": (said(**PACKED), 3, "quantization_config has no config_groups that say how weights are"),
    "another group than is said": (change("group_size", 16), 3, "inputs, which is not gptq 4 bits group 16"),
    "a scale that is not a number": (
        part("scales", lambda t: t * float("nan")),
        6,
        f"{LAYER}weight: 8192 of 8192 numbers are NaN",
    ),
}


def _again(folder: Path, end: str, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    held = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{end}"
    held[name] = make(held[name]).contiguous()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_said(fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, code, words = FAULTS[fault]
    folder = write_tiny(tmp_path / "model", "llama")
    spoil(folder)
    capfd.readouterr()
    assert main(["inspect", str(folder)]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and str(folder) in err and words in err, err
