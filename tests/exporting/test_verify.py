"""Damage of every kind is found, also when the manifest was made again after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

import pocketsize as ps
from pocketsize.errors import IntegrityError
from pocketsize.exporting import compressed_tensors, table
from pocketsize.exporting.behaviour import behaviour_of, differences, field_prints, tensor_print
from pocketsize.exporting.manifest import check_manifest, write_manifest
from pocketsize.exporting.read_back import read_folder
from pocketsize.exporting.table import EXPORTERS, behaviours
from pocketsize.exporting.verify import require_sound, verify_folder
from pocketsize.io.checkpoint import TensorSpec, open_file, write_safetensors
from pocketsize.models.load import load
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.quantize import Rtn
from pocketsize.recipes.recipe import Data
from tiny import FAMILIES, write_texts, write_tiny

GGUF = "tiny-Q4_1.gguf"
UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The safetensors file with other tensors, and the manifest made again."""
    path = folder / "model.safetensors"
    stored = open_file(path)
    tensors = {name: stored.read(name) for name in stored.entries}
    change(tensors)
    path.unlink()
    write_safetensors(
        path, [TensorSpec(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()], {}
    )
    write_manifest(folder)


def damage_gguf(folder: Path, change: Callable[[dict], None]) -> None:
    """The GGUF with changed tensor bytes, and the manifest made again."""
    tensors = {t.name: t.data for t in GGUFReader(folder / GGUF, "r+").tensors}
    change(tensors)
    for data in tensors.values():
        data.base.flush() if hasattr(data.base, "flush") else None
    write_manifest(folder)


def wrong(folder: Path) -> str:
    """What verify finds wrong; llama.cpp is left out, the reason must be found without it."""
    checks = verify_folder(folder, llamacpp=False)
    with pytest.raises(IntegrityError) as error:
        require_sound(checks)
    assert checks[0].ok, "the manifest was made again"
    return str(error.value)


def swap(tensors, a: str, b: str) -> None:
    kept = tensors[a].clone() if isinstance(tensors[a], torch.Tensor) else tensors[a].copy()
    tensors[a][:] = tensors[b]
    tensors[b][:] = kept


def test_an_undamaged_folder_is_sound(finished):
    checks = verify_folder(finished, llamacpp=False)
    assert [(check.name, check.ok) for check in checks] == [
        ("files", True),
        ("weights", True),
        ("gguf", True),
    ]
    require_sound(checks)


def test_llamacpp_runs_what_is_sound(finished):
    pytest.importorskip("xllamacpp")
    last = verify_folder(finished)[-1]
    assert last.name == "llama.cpp" and last.ok and "positions" in last.detail


def test_a_flipped_byte_is_found_by_hash(finished):
    for name in ("model.safetensors", GGUF, "tokenizer.json"):
        data = bytearray((finished / name).read_bytes())
        data[len(data) // 2] ^= 1
        (finished / name).write_bytes(data)
        assert f"{name}: its bytes are not those that were written" in check_manifest(finished)
        data[len(data) // 2] ^= 1
        (finished / name).write_bytes(data)
    assert check_manifest(finished) == []


def test_files_missing_and_added(finished):
    (finished / "tokenizer_config.json").unlink()
    (finished / "extra.txt").write_text("")
    assert check_manifest(finished) == ["tokenizer_config.json: missing", "extra.txt: not in MANIFEST.json"]
    (finished / "MANIFEST.json").unlink()
    assert "MANIFEST.json" in check_manifest(finished)[0]


def test_two_swapped_tensors_in_the_folder(finished):
    rewrite(
        finished,
        lambda tensors: [swap(tensors, UP + p, GATE + p) for p in ("_packed", "_scale", "_zero_point")],
    )
    message = wrong(finished)
    assert f"tensor {GATE}: holds {UP}" in message and str(finished) in message


def test_two_swapped_norms_in_the_folder(finished):
    names = [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]
    rewrite(finished, lambda tensors: swap(tensors, *names))
    assert f"tensor {names[0]}: holds {names[1]}" in wrong(finished)


def test_a_zeroed_layer_in_the_folder(finished):
    def zero(tensors):
        for name in tensors:
            if name.startswith("model.layers.1.") and name.endswith("_scale"):
                tensors[name].zero_()

    rewrite(finished, zero)
    message = wrong(finished)
    assert "tensor model.layers.1.mlp.down_proj.weight: its values have changed" in message
    assert "answer to text 1: a value moved" in message


def test_two_swapped_tensors_in_the_gguf(finished):
    damage_gguf(finished, lambda tensors: swap(tensors, "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"))
    message = wrong(finished)
    assert GGUF in message and f"tensor {GATE}: holds {UP}" in message


def test_a_zeroed_layer_in_the_gguf(finished):
    def zero(tensors):
        for name, data in tensors.items():
            if name.startswith("blk.1."):
                data[:] = 0

    damage_gguf(finished, zero)
    assert "tensor model.layers.1.input_layernorm.weight: its values have changed" in wrong(finished)


def test_a_wrong_tokenizer_in_the_folder(finished):
    path = finished / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(raw))
    write_manifest(finished)
    assert "the tokenizer gives other ids" in wrong(finished)


def test_two_swapped_tokens_that_no_probe_holds(finished):
    path = finished / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"] |= {"Ħ": raw["model"]["vocab"]["ħ"], "ħ": raw["model"]["vocab"]["Ħ"]}
    path.write_text(json.dumps(raw))
    write_manifest(finished)
    assert f"{path}: not what was copied" in wrong(finished)


def test_a_wrong_tokenizer_in_the_gguf(finished):
    path = finished / GGUF
    data = path.read_bytes()
    a, e = ((1).to_bytes(8, "little") + letter for letter in (b"a", b"e"))
    assert data.count(a) and data.count(e)
    path.write_bytes(data.replace(a, b"\0TMP" + a[4:], 1).replace(e, a, 1).replace(b"\0TMP" + a[4:], e, 1))
    write_manifest(finished)
    assert "metadata tokenizer.ggml.tokens is not what was written" in wrong(finished)


def test_changed_settings(finished):
    path = finished / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 500.0'))
    write_manifest(finished)
    assert "answer to text" in wrong(finished)


def test_settings_that_no_answer_depends_on(finished):
    path = finished / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": 7}))
    write_manifest(finished)
    message = wrong(finished)
    assert f"{path}: eos_token_id is 7, recorded was {config['eos_token_id']}" in message


def test_not_a_number_in_a_scale(finished):
    rewrite(finished, lambda tensors: tensors[UP + "_scale"].fill_(float("nan")))
    assert f"tensor {UP}" in wrong(finished)


def test_a_tensor_left_out(finished):
    rewrite(finished, lambda tensors: [tensors.pop("model.norm.weight")])
    assert "model.norm.weight" in wrong(finished)


def test_no_record_and_no_folder(finished, tmp_path):
    (finished / "record.json").unlink()
    write_manifest(finished)
    assert "record.json" in wrong(finished)
    assert not verify_folder(tmp_path / "nowhere")[0].ok


def test_a_record_that_lacks_a_part(finished):
    record = json.loads((finished / "record.json").read_text())
    del record["behaviour"]["."]["answers"]
    (finished / "record.json").write_text(json.dumps(record))
    write_manifest(finished)
    assert "record.json: the behaviour of . is not readable" in wrong(finished)


def test_a_gguf_that_the_record_does_not_know(finished):
    (finished / "other.gguf").write_bytes((finished / GGUF).read_bytes())
    write_manifest(finished)
    assert "other.gguf: record.json does not know it" in wrong(finished)


def test_a_gguf_alone_needs_no_folder(finished):
    record = json.loads((finished / "record.json").read_text())
    del record["behaviour"]["."]
    (finished / "record.json").write_text(json.dumps(record))
    for path in finished.iterdir():
        if path.name not in (GGUF, "record.json"):
            path.unlink()
    write_manifest(finished)
    require_sound(verify_folder(finished, llamacpp=False))


def test_encoders_are_recognised_by_what_they_embed(tmp_path):
    model = load(write_tiny(tmp_path / "in", "mpnet"))
    model = model.with_quantized({n: rtn(model.original(n), Scheme(8, 32, True)) for n in model.linears})
    out = tmp_path / "out"
    out.mkdir()
    artifacts = [compressed_tensors.write(model, out)]
    (out / "record.json").write_text(json.dumps({"behaviour": behaviours(model, artifacts)}))
    write_manifest(out)
    require_sound(verify_folder(out))
    rewrite(out, lambda tensors: [tensors["encoder.layer.1.output.dense.bias"].add_(0.5)])
    assert "encoder.layer.1.output.dense.bias" in wrong(out)


def test_the_forward_pass_is_an_independent_witness(finished):
    record = json.loads((finished / "record.json").read_text())["behaviour"]["."]
    model = read_folder(finished)
    assert differences(record, model, model.weight) == []
    shifted = {n: w.clone() for n in model.checkpoint.entries for w in [model.weight(n)]}
    shifted["model.norm.weight"] *= 1.01
    record["tensors"] = {n: tensor_print(w) for n, w in shifted.items()}
    found = differences(record, model, shifted.__getitem__)
    assert found and all(problem.startswith("answer to text") for problem in found)


def test_fingerprints_ignore_the_sign_of_zero_only():
    assert tensor_print(torch.tensor([0.0, 1.0])) == tensor_print(torch.tensor([-0.0, 1.0]))
    assert tensor_print(torch.tensor([0.0, 1.0])) != tensor_print(torch.tensor([1.0, 0.0]))
    assert tensor_print(torch.zeros(2, 3)) != tensor_print(torch.zeros(3, 2))
    assert field_prints({"a": 0.1}) == field_prints({"a": 0.10000000149011612}) != field_prints({"a": 0.2})


def test_behaviour_is_the_same_twice(tiny_llama):
    assert behaviour_of(tiny_llama(True)) == behaviour_of(tiny_llama(True))


@pytest.mark.parametrize("cut", [3, 20, 30, 400, 20_000])
def test_truncated_headers_are_errors_not_hangs(finished, cut):
    data = (finished / GGUF).read_bytes()
    (finished / GGUF).write_bytes(data[:cut])
    write_manifest(finished)
    assert GGUF in wrong(finished)


def test_the_table_says_what_each_format_holds(tiny_llama):
    folder, gguf = EXPORTERS["folder"], EXPORTERS["gguf"]
    model = tiny_llama(True)
    assert gguf.groups == (32,) and gguf.bits == (8, 5, 4)
    assert gguf.takes_group(64) and gguf.takes_group(None) and not gguf.takes_group(48)
    assert folder.takes_group(48) and folder.refuses(model) is None is gguf.refuses(model)
    assert sum(folder.parts(model).values()) < folder.predict_bytes(model, lambda _: None)
    assert gguf.parts(model)["embeddings"] == 320 * 64 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_just_written_is_sound_and_can_be_replaced(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configs of some families have names with an underscore, which are transformers' own."""
    monkeypatch.setattr(table, "reload_check", lambda *_: ())
    source, (calibrate, evaluate) = write_tiny(tmp_path / "m", family), write_texts(tmp_path)
    data = Data((calibrate,), (evaluate,), sequences=4, length=32, tokens=64, written=0.0)
    options = {"out": tmp_path / "o", "export": ["folder"], "data": data, "console": Silent()}
    for scheme in ("W8A16", "W4A16"):
        step = Rtn(scheme=scheme, group=None, symmetric=True)
        done = ps.run(source, [step], overwrite=scheme == "W4A16", **options)
        assert all(check.ok for check in ps.verify(done.folder))


class Silent:
    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...
