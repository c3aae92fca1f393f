"""Loading: what comes in is what is on disk, and the ledger says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pocketsize.errors import DataError, UnsupportedError
from pocketsize.models.ledger import ledger
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.skeleton import skeleton
from tiny import ENCODERS, FAMILIES, GENERATORS, TEXT, weights, write_tiny, write_weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_and_dtype(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = load(write_tiny(tmp_path, family, dtype=dtype))
    truth = load_file(tmp_path / "model.safetensors")
    assert {entry.name for entry in model.checkpoint.entries.values()} == set(truth)
    for name, entry in model.checkpoint.entries.items():
        tensor = truth[entry.name]
        assert torch.equal(model.weight(name), tensor.float()) and model.weight(name).dtype == torch.float32
    assert len(model.linears) > 0 and set(model.linears) <= set(model.checkpoint.entries)
    assert model.origin.parameters == sum(t.numel() for t in truth.values())
    assert model.origin.bf16_bytes == 2 * model.origin.parameters
    assert model.origin.source_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert model.origin.name == tmp_path.name and model.origin.licence == "unknown"


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    one = load(write_tiny(tmp_path / "one", "llama"))
    four = load(write_tiny(tmp_path / "four", "llama", shards=4))
    assert len(four.checkpoint.files) == 4
    assert all(torch.equal(one.weight(name), four.weight(name)) for name in one.checkpoint.entries)


def test_stored_head_that_is_tied_counts_once(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", tied=True)
    tensors = weights(load(tmp_path).config, torch.float32, 0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_weights(tmp_path, tensors)
    model = load(tmp_path)
    assert model.tied and "lm_head.weight" not in model.checkpoint.entries


@pytest.mark.parametrize("family", FAMILIES)
def test_ledger(tmp_path: Path, family: str) -> None:
    model = load(write_tiny(tmp_path, family))
    found = ledger(model)
    assert [row.name for row in found.rows] == list(model.checkpoint.entries)
    assert {row.name for row in found.rows if row.role == "compressible"} == set(model.linears)
    assert sum(t.parameters for t in found.totals) == model.origin.parameters
    widths = {model.checkpoint.entries[name].shape[1] for name in model.linears}
    assert found.groups == tuple(g for g in (128, 96, 64, 32) if not any(w % g for w in widths))
    roles = {row.name: row.role for row in found.rows}
    assert roles[model.arch.embedding] == "embedding"
    assert roles.get(model.arch.head or "", "head") == "head"
    matrices = [row for row in found.rows if len(row.shape) > 1]
    assert {row.role for row in found.rows if row not in matrices} <= {"norm", "bias"}


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_saved_with_a_head(tmp_path: Path, family: str) -> None:
    plain = load(write_tiny(tmp_path / "plain", family))
    write_tiny(tmp_path / "prefixed", family)
    prefix = f"{skeleton(plain).base_model_prefix}."
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tables = {f"{prefix}embeddings.position_ids": torch.arange(256)[None]}
    write_weights(tmp_path / "prefixed", {prefix + name: t for name, t in tensors.items()} | tables)
    model = load(tmp_path / "prefixed")
    assert model.checkpoint.entries.keys() == plain.checkpoint.entries.keys()
    assert all(torch.equal(model.weight(name), plain.weight(name)) for name in plain.linears)


def test_two_names_for_one_tensor(tmp_path: Path) -> None:
    write_tiny(tmp_path, "bert")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    write_weights(tmp_path, tensors | {f"bert.{name}": tensors[name]})
    with pytest.raises(DataError, match=rf"bert\.{name} .*are both {name}"):
        load(tmp_path)


def test_origin_file_is_read(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    said = {"name": "N", "licence": "mit", "revision": "r1"}
    said |= {"source_bytes": 7, "dequantized_from": "GGUF Q4_1"}
    (tmp_path / "origin.json").write_text(json.dumps(said))
    origin = load(tmp_path).origin
    assert (origin.name, origin.licence, origin.revision) == ("N", "mit", "r1")
    assert (origin.source_bytes, origin.dequantized_from) == (7, "GGUF Q4_1")


def test_licence_from_the_card(tmp_path: Path) -> None:
    write_tiny(tmp_path, "bert")
    (tmp_path / "README.md").write_text(
        "---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\nlicense: no\n"
    )
    assert load(tmp_path).origin.licence == "apache-2.0"


def test_hub_cache_paths_name_the_model(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "models--org--name" / "snapshots" / "abc", "bert")
    origin = load(folder).origin
    assert (origin.name, origin.revision) == ("org/name", "abc")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_round_trip(tmp_path: Path, family: str) -> None:
    tokenizer = tokenizer_of(load(write_tiny(tmp_path, family)))
    ids = tokenizer(TEXT[0], verbose=True)["input_ids"]
    assert len(ids) > 5 and max(ids) < 320
    if family in GENERATORS:
        assert tokenizer.decode(ids) == TEXT[0]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    else:
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert len(tokenizer("word " * 400)["input_ids"]) > 256


def test_a_special_token_without_a_row_must_have_no_role(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "gemma3_text"))
    tokenizer = tokenizer_of(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(tmp_path)
    assert len(tokenizer_of(model)) == 321
    tokenizer.pad_token = "<image_soft_token>"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="token ids up to 320, the embedding has 320 rows"):
        tokenizer_of(model)


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(write_tiny(tmp_path, "llama"))
    tokenizer_of(model)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_tiny_models_differ_by_seed_alone(tmp_path: Path) -> None:
    a, b = (load(write_tiny(tmp_path / str(i), "llama", seed=0)) for i in range(2))
    c = load(write_tiny(tmp_path / "c", "llama", seed=1))
    assert a.origin.sha256 == b.origin.sha256 != c.origin.sha256


def test_gpt2_as_it_was_first_published(tmp_path: Path) -> None:
    plain = load(write_tiny(tmp_path / "plain", "gpt2"))
    write_tiny(tmp_path / "bare", "gpt2")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    write_weights(tmp_path / "bare", bare | masks)
    model = load(tmp_path / "bare")
    assert model.checkpoint.entries.keys() == plain.checkpoint.entries.keys()
    assert model.origin.parameters == plain.origin.parameters


def test_blocks_without_experts_are_no_published_layout(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", "qwen3_moe")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"mlp_only_layers": [0]}))
    with pytest.raises(UnsupportedError, match="describes a qwen3_moe with no model"):
        load(folder)
