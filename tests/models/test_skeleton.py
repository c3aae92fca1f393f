"""Skeletons: every table as a stock load has it, every weight in its place, ties kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from pocketsize.errors import DataError
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.skeleton import fill, materialise, skeleton, stored
from tiny import FAMILIES, GENERATORS, TEXT, weights, write_tiny, write_weights


def _stock(folder: Path, family: str) -> torch.nn.Module:
    auto = AutoModelForCausalLM if family in GENERATORS else AutoModel
    return auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_holds_tables_and_no_weights(tmp_path: Path, family: str) -> None:
    module = skeleton(load(write_tiny(tmp_path, family)))
    assert not module.training
    assert all(p.is_meta and not p.requires_grad for p in module.parameters())
    stock = _buffers(_stock(tmp_path, family))
    ours = _buffers(module)
    assert ours.keys() == stock.keys()
    assert (len(ours) > 0) is (family not in ("opt", "gpt2"))
    for name, table in stock.items():
        assert ours[name].dtype == table.dtype and torch.equal(ours[name], table), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_materialised_model_answers_like_a_stock_load(tmp_path: Path, family: str) -> None:
    model = load(write_tiny(tmp_path, family, seed=3))
    ids = tokenizer_of(model)(TEXT[0], return_tensors="pt")
    ids = {key: ids[key] for key in ("input_ids", "attention_mask")}
    ours, stock = materialise(model), _stock(tmp_path, family)
    # A stock load fuses the experts, and then sums in an order that depends on the machine.
    close = 1e-5 if model.arch.experts else 0.0
    torch.testing.assert_close(ours(**ids)[0], stock(**ids)[0], rtol=close, atol=close)
    assert not any(p.requires_grad for p in ours.parameters())


def test_rotary_scaling_is_computed(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50000.0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, stock = _buffers(skeleton(load(tmp_path))), _buffers(_stock(tmp_path, "llama"))
    assert torch.equal(ours["model.rotary_emb.inv_freq"], stock["model.rotary_emb.inv_freq"])


def test_missing_pooler_is_taken_out(tmp_path: Path) -> None:
    write_tiny(tmp_path, "bert")
    tensors = weights(load(tmp_path).config, torch.float32, 0)
    write_weights(tmp_path, {name: t for name, t in tensors.items() if not name.startswith("pooler.")})
    module = materialise(load(tmp_path))
    assert module.pooler is None
    assert module(input_ids=torch.tensor([[2, 7, 3]]))[0].isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_fill_keeps_ties(tmp_path: Path, tied: bool) -> None:
    model = load(write_tiny(tmp_path, "llama", tied=tied))
    assert model.tied is tied
    module = skeleton(model)
    reads: list[str] = []

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return model.weight(name)

    fill(module, "model.embed_tokens.weight", read)
    assert reads == ["model.embed_tokens.weight"]
    embedding, head = (
        module.get_parameter("model.embed_tokens.weight"),
        module.get_parameter("lm_head.weight"),
    )
    assert (head is embedding) is tied and head.is_meta is not tied
    fill(module, "lm_head", read)
    assert len(reads) == 1 if tied else reads[1:] == ["lm_head.weight"]
    assert not module.get_parameter("lm_head.weight").is_meta


def test_fill_reaches_one_block_and_can_be_repeated(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "llama"))
    module = skeleton(model)
    fill(module, "model.layers.1", model.weight)
    assert {name for name, t in stored(module) if not t.is_meta} == {
        name for name, _ in stored(module) if name.startswith("model.layers.1.")
    }
    fill(module, "model.layers.1", lambda name: 2 * model.weight(name))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(module.get_parameter(name), 2 * model.weight(name))


def test_fill_checks_names_and_shapes(tmp_path: Path) -> None:
    module = skeleton(load(write_tiny(tmp_path, "llama")))
    with pytest.raises(ValueError, match=r"no tensor is named model\.layer,"):
        fill(module, "model.layer", lambda name: torch.zeros(1))
    with pytest.raises(DataError, match=r"model\.norm\.weight: shape \(1,\)"):
        fill(module, "model.norm", lambda name: torch.zeros(1))


def test_materialise_in_half_precision(tmp_path: Path) -> None:
    module = materialise(load(write_tiny(tmp_path, "llama", dtype=torch.bfloat16)), torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32
