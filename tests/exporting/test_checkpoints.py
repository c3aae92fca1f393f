"""Checkpoints of GPTQ and AWQ: tensors equal to an oracle's, read back, and what has no place there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporting.rounded import quantized
from oracles import packed as oracle
from pocketsize.errors import IntegrityError, UnsupportedError, UsageError
from pocketsize.exporting import plain
from pocketsize.exporting.manifest import write_manifest
from pocketsize.exporting.packed import stored_value
from pocketsize.exporting.table import EXPORTERS, behaviours, place, write_all
from pocketsize.exporting.verify import require_sound, verify_folder, verify_packed
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.quantize import Gptq, Hqq
from pocketsize.search.goal import mixes
from pocketsize.search.ladder import ladder
from tiny import write_tiny

Llama = Callable[[bool], Model]


def scheme_of(bits: int, group: int | None, symmetric: bool) -> Scheme:
    return Scheme(bits, group, symmetric, scale_digits=8 if symmetric or bits > 5 else 7)


CASES = [
    *(("gptq", scheme_of(bits, 32, True)) for bits in (2, 3, 4, 8)),
    *(("gptq_v2", scheme_of(bits, 32, False)) for bits in (2, 3, 4, 8)),
    ("gptq", scheme_of(4, None, True)),
    ("gptq_v2", scheme_of(3, 64, False)),
    ("gptq_v2", scheme_of(4, 32, True)),
    ("awq", scheme_of(4, 32, False)),
    ("awq", scheme_of(4, 64, False)),
    ("awq", scheme_of(4, None, True)),
]


def written_out(form: str, weight: QWeight) -> dict[str, torch.Tensor]:
    """The tensors of a linear, by the oracle."""
    codes, zeros = weight.codes.T.long(), weight.zero.T.long()
    scales = weight.scale.T.half()
    if form == "awq":
        return {"qweight": oracle.awq_pack(codes), "qzeros": oracle.awq_pack(zeros), "scales": scales}
    bits = weight.scheme.bits
    qweight, qzeros = oracle.gptq_pack(codes, zeros, bits, shifted=form == "gptq")
    group_of = torch.arange(len(codes)) // weight.scheme.width(len(codes))
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": group_of.int()}


@pytest.mark.parametrize(("form", "scheme"), CASES, ids=str)
def test_tensors_are_those_of_the_oracle_and_the_sizes_as_predicted(
    form: str, scheme: Scheme, tmp_path: Path, tiny_llama: Llama
) -> None:
    original = tiny_llama(scheme.group == 32)
    model, export = quantized(original, scheme), EXPORTERS[form]
    artifact = export.write(model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for name in model.linears:
        for part, expected in written_out(form, model.quantized[name]).items():
            found = held.pop(name.removesuffix("weight") + part)
            assert found.dtype == expected.dtype and torch.equal(found, expected), (name, part)
    assert set(held) == set(model.checkpoint.entries) - set(model.linears)
    assert all(torch.equal(held[n], original.original(n).bfloat16()) for n in held)

    def of(name: str) -> Scheme | None:
        return scheme if name in model.quantized else None

    assert artifact.path == "." and artifact.format == form
    assert artifact.bytes == export.predict_bytes(original, of)
    others = {p.name: p.stat().st_size for p in tmp_path.iterdir() if p.suffix != ".safetensors"}
    assert export.predict_others(original, of) == others and set(artifact.files) - others.keys() == {
        "model.safetensors"
    }
    sizes = export.tensor_bytes(original, of)
    assert sum(sizes.values()) == sum(export.parts(model).values()) < artifact.bytes
    back = load(tmp_path)
    assert all(torch.equal(back.original(n), stored_value(model, n)) for n in model.checkpoint.entries)
    assert all(torch.equal(back.original(n), model.weight(n)) for n in model.linears)
    assert artifact.checks == (
        f"all {len(model.checkpoint.entries)} tensors, unpacked by our reader of such checkpoints, are ours",
    )


def test_what_a_config_says(tmp_path: Path, tiny_llama: Llama) -> None:
    found = {}
    for form, scheme in (("gptq", scheme_of(8, None, True)), ("gptq_v2", scheme_of(3, 32, False))):
        out = tmp_path / form
        out.mkdir()
        EXPORTERS[form].write(quantized(tiny_llama(False), scheme), out)
        found[form] = json.loads((out / "config.json").read_text())["quantization_config"]
        assert json.loads((out / "quantize_config.json").read_text()) == found[form]
        assert found[form].pop("meta")["quantizer"][0].startswith("pocketsize:")
    same = {"quant_method": "gptq", "desc_act": False, "lm_head": False, "pack_dtype": "int32"}
    first = {"bits": 8, "group_size": -1, "sym": True, "checkpoint_format": "gptq"}
    second = {"bits": 3, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}
    assert found == {"gptq": same | first, "gptq_v2": same | second}


def test_awq_names_what_it_leaves(tmp_path: Path, tiny_llama: Llama) -> None:
    model = tiny_llama(False)
    left = model.linears[3]
    weights = {n: rtn(model.matrix(n), scheme_of(4, 32, False)) for n in model.linears if n != left}
    EXPORTERS["awq"].write(model.with_quantized(weights), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [left.removesuffix(".weight"), "lm_head"],
    }
    assert said["dtype"] == "bfloat16" and not (tmp_path / "quantize_config.json").exists()
    assert torch.equal(load(tmp_path).original(left), model.original(left).bfloat16().float())


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_other_families_keep_their_biases_and_take_the_names_of_the_module(
    family: str, tmp_path: Path
) -> None:
    model = quantized(load(write_tiny(tmp_path / "in", family)), scheme_of(4, 32, True))
    out = tmp_path / "out"
    out.mkdir()
    EXPORTERS["gptq"].write(model, out)
    back = load(out)
    assert all(entry.name == name for name, entry in open_checkpoint(out).entries.items())
    assert set(back.checkpoint.entries) == set(model.checkpoint.entries)
    assert any(name.endswith("bias") for name in back.checkpoint.entries)
    assert all(torch.equal(back.original(n), stored_value(model, n)) for n in model.checkpoint.entries)


@pytest.mark.parametrize("family", ["bert", "mobilebert", "mpnet"])
def test_awq_leaves_the_poolers_of_encoders(family: str, tmp_path: Path) -> None:
    model = quantized(load(write_tiny(tmp_path / "in", family)), scheme_of(4, 32, False))
    out = tmp_path / "out"
    out.mkdir()
    EXPORTERS["awq"].write(model, out)
    said = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "pooler.dense" in said and not {f"{name}.weight" for name in said} & set(model.linears)
    back = load(out)
    assert all(torch.equal(back.original(n), stored_value(model, n)) for n in model.checkpoint.entries)


def test_shards_and_a_second_writing(tmp_path: Path, tiny_llama: Llama, monkeypatch) -> None:
    model = quantized(tiny_llama(True), scheme_of(4, 32, True))
    for name in ("a", "b", "parts"):
        (tmp_path / name).mkdir()
    export = EXPORTERS["gptq"]
    assert export.write(model, tmp_path / "a").files == export.write(model, tmp_path / "b").files
    monkeypatch.setattr(plain, "SHARD_BYTES", 30_000)
    assert len(list(tmp_path.glob("parts/*.safetensors"))) == 0
    artifact = export.write(model, tmp_path / "parts")
    assert len(list(tmp_path.glob("parts/*.safetensors"))) > 2
    assert artifact.bytes == export.predict_bytes(
        model, lambda n: dict(model.quantized).get(n) and CASES[2][1]
    )
    back = load(tmp_path / "parts")
    assert all(torch.equal(back.original(n), model.weight(n)) for n in model.linears)


@pytest.mark.parametrize(
    ("form", "family", "reason"),
    [
        ("gptq", "mpnet", "its readers know no encoders such as mpnet"),
        ("gptq_v2", "bert", "its readers know no encoders such as bert"),
        ("gptq_v2", "mixtral", "no packed form for the experts of mixtral"),
        ("awq", "qwen3_moe", "no packed form for the experts of qwen3_moe"),
        ("awq", "gpt2", "pack nn.Linear alone, and gpt2 has Conv1D"),
        ("awq", "gpt_neox", "transformers looks for scales of the activations of gpt_neox"),
        ("awq", "phi3", "GPTQModel splits gate_up_proj of phi3"),
        ("gptq", "phi3", "GPTQModel splits gate_up_proj of phi3"),
    ],
)
def test_families_without_a_reader_are_refused(form: str, family: str, reason: str, tmp_path: Path) -> None:
    assert reason in str(EXPORTERS[form].refuses(load(write_tiny(tmp_path / "m", family))))


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq"])
def test_matrices_that_fill_no_whole_words_are_refused(form: str, tiny_llama: Llama) -> None:
    model = tiny_llama(True)
    odd = model.linears[4]
    entries = dict(model.checkpoint.entries)
    entries[odd] = replace(entries[odd], shape=(100, 64))
    other = replace(model, checkpoint=replace(model.checkpoint, entries=MappingProxyType(entries)))
    reason = str(EXPORTERS[form].refuses(other))
    assert "it packs multiples of" in reason and f"{odd} has 100 outputs, 64 inputs" in reason


@pytest.mark.parametrize(
    ("step", "exports", "reason"),
    [
        (Gptq(symmetric=False), ("gptq",), "gptq has no 4-bit type with zeros.* or export gptq_v2"),
        (Gptq("W5A16"), ("gptq_v2",), "gptq_v2 cannot store 5-bit weights; it has 8, 4, 3, 2 bits"),
        (Gptq("W3A16", group=32), ("gguf",), "gguf cannot store 3-bit .* has 8, 5, 4 bits, and scheme Q3_K"),
        (Gptq("W8A16"), ("awq",), "awq cannot store 8-bit weights; it has 4 bits"),
        (Gptq("Q4_1"), ("awq",), "awq cannot store"),
        (Gptq(float_zeros=True, symmetric=False), ("awq",), "cannot store float zeros"),
        (Gptq(group=16), ("gptq",), "gptq cannot store group 16"),
        (Gptq(embeddings="same"), ("gptq",), "gptq has embedding and head unquantized"),
        (Gptq(embeddings="same"), ("folder", "awq"), "awq has embedding and head unquantized"),
        (Hqq(), ("gptq",), "no 4-bit type with zeros"),
        (Gptq(overrides={"*.down_proj": {"scheme": "W8A16"}}), ("gptq",), "gptq: its config has one scheme"),
        (
            Gptq(overrides={"*.down_proj": {"group": 32}, "*.0.mlp.up_proj": None}),
            ("awq",),
            "awq: its config has one scheme",
        ),
        (Gptq(overrides={"*.down_proj": None}), ("gptq_v2",), "gptq_v2: its readers take every linear"),
    ],
    ids=str,
)
def test_what_a_format_cannot_hold_is_refused_before_any_work(
    step: Gptq | Hqq, exports: tuple[str, ...], reason: str, tiny_llama: Llama
) -> None:
    with pytest.raises((UnsupportedError, UsageError), match=reason):
        step.resolve(tiny_llama(True), exports)


def test_choices_that_exports_make_together(tiny_llama: Llama) -> None:
    model = tiny_llama(True)

    def symmetric(*exports: str) -> bool:
        step = Gptq().resolve(model, exports)
        assert step.group in (32, 64) and not step.float_zeros
        return bool(step.symmetric)

    assert symmetric("gptq") and symmetric("gptq", "awq") and symmetric("folder", "gptq")
    assert not symmetric("gptq_v2") and not symmetric("awq") and not symmetric("gptq_v2", "folder", "awq")
    left = Gptq(overrides={"*.down_proj": None}).resolve(model, ("awq",))
    assert left.overrides == {"*.down_proj": None}
    assert Gptq().resolve(model, ("gguf", "gptq")).embeddings == 8
    assert not mixes(model, ("gptq",)) and not mixes(model, ("gguf", "awq")) and mixes(model, ("folder",))
    assert {(rung.bits, rung.symmetric) for rung in ladder(model, ("awq",))} == {(4, True), (4, False)}
    assert {rung.bits for rung in ladder(model, ("gptq",))} == {8, 4}
    assert {rung.bits for rung in ladder(model, ("gptq_v2",))} == {8, 4, 3, 2}
    assert {rung.embeddings for rung in ladder(model, ("gptq_v2",))} == {None}


def test_the_first_folder_is_the_output_and_others_lie_in_it() -> None:
    def places(*exports: str) -> list[str]:
        return [place(name, exports) for name in exports]

    assert places("gguf", "folder") == [".", "."] and places("gptq") == ["."]
    assert places("gguf", "gptq", "folder", "awq") == [".", "gptq", ".", "awq"]
    assert places("awq", "gguf", "gptq_v2") == [".", ".", "gptq_v2"]


def test_an_output_of_several_is_verified_part_by_part(tmp_path: Path, tiny_llama: Llama) -> None:
    model = quantized(tiny_llama(True), scheme_of(4, 32, True))
    artifacts = write_all(model, ("gptq", "awq", "gguf"), tmp_path)
    assert [a.path for a in artifacts][:2] == [".", "awq"] and artifacts[2].path.endswith(".gguf")
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        file for artifact in artifacts for file in artifact.files
    }
    assert set(artifacts[1].files) == {f"awq/{p.name}" for p in (tmp_path / "awq").iterdir()}
    (tmp_path / "record.json").write_text(json.dumps({"behaviour": behaviours(model, artifacts)}))
    write_manifest(tmp_path)
    checks = verify_folder(tmp_path, llamacpp=False)
    assert [check.name for check in checks] == ["files", "weights", "weights", "gguf"]
    require_sound(checks)
    assert "tensor model.layers.1.mlp.up_proj.weight: its values have changed" in _damaged(tmp_path)
    (tmp_path / "awq" / "tokenizer.json").write_text("{}")
    write_manifest(tmp_path)
    assert [check.ok for check in verify_folder(tmp_path, llamacpp=False)] == [True, True, False, True]


def _damaged(folder: Path) -> str:
    """What verify says when one bit of one code has changed."""
    path = folder / "awq" / "model.safetensors"
    held = load_file(path)
    held["model.layers.1.mlp.up_proj.qweight"][3, 1] ^= 1
    save_file(held, path, metadata={"format": "pt"})
    write_manifest(folder)
    wrong = [check for check in verify_folder(folder, llamacpp=False) if not check.ok]
    assert len(wrong) == 1 and str(folder / "awq") in wrong[0].detail
    return wrong[0].detail


def test_a_checkpoint_of_another_model_is_told_apart(tmp_path: Path, tiny_llama: Llama) -> None:
    model = quantized(tiny_llama(True), scheme_of(4, 32, True))
    EXPORTERS["gptq"].write(model, tmp_path)
    other = quantized(tiny_llama(True), scheme_of(2, 32, True))
    with pytest.raises(IntegrityError, match="does not hold what was written"):
        verify_packed(other, tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    held["model.extra.weight"] = torch.zeros(2)
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"tensor model.extra.weight is missing, or is not one"):
        verify_packed(model, tmp_path)


def test_a_scale_that_float16_would_change_is_refused(tmp_path: Path, tiny_llama: Llama) -> None:
    model = tiny_llama(True)
    name = model.linears[0]
    weight = rtn(model.original(name), Scheme(4, 32, True))
    odd = QWeight(weight.codes, weight.scale * 1.0001, weight.zero, weight.scheme)
    with pytest.raises(UnsupportedError, match=f"{name}: a scale is not exact in torch.float16"):
        EXPORTERS["awq"].write(model.with_quantized({name: odd}), tmp_path)
