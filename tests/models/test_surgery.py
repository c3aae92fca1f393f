"""Narrower models: equal to the slow way, and the same function where nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from oracles.slices import llama_cut_slow
from pocketsize.distillation.slices import Heads
from pocketsize.errors import UnsupportedError
from pocketsize.io.checkpoint import TensorSpec, write_safetensors
from pocketsize.models.importance import slice_importance
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.surgery import (
    Selection,
    Sizes,
    cut_config,
    cut_shape,
    cut_tensor,
    cuts_of,
    outlined,
    selection,
    sizes_of,
    watched,
)
from tiny import write_tiny

CUTTABLE = ("llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "mpnet", "distilbert")
SQUARE = ("bert", "roberta", "mpnet", "distilbert")


def tiny(tmp_path: Path, family: str) -> Model:
    return load(write_tiny(tmp_path / family, family))


def narrower(model: Model) -> Sizes:
    """Half the heads and inner channels, half the width."""
    own = sizes_of(model)
    keys = own.heads // 2 if model.arch.cuts and model.arch.cuts.square else own.kv_heads
    return Sizes(own.heads // 2, keys, own.ffn // 2, own.hidden // 2, own.vocabulary)


def chosen_for(model: Model, sizes: Sizes) -> Selection:
    ids = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return selection(model, sizes, slice_importance(model, ids, mask, watched(model, sizes)), None)


def written(model: Model, sizes: Sizes, chosen: Selection, folder: Path) -> Path:
    from pocketsize.exporting.plain import as_json

    folder.mkdir()
    shapes = outlined(model, sizes).checkpoint.entries
    specs = [
        TensorSpec(e.name, torch.float32, e.shape, lambda n=n: cut_tensor(model, n, chosen))
        for n, e in shapes.items()
    ]
    write_safetensors(folder / "model.safetensors", specs, {"format": "pt"})
    (folder / "config.json").write_bytes(as_json(cut_config(model, sizes, tied=False)))
    return folder


@pytest.mark.parametrize("family", CUTTABLE)
def test_stock_transformers_loads_what_was_cut(family: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, family)
    sizes = narrower(model)
    chosen = chosen_for(model, sizes)
    folder = written(model, sizes, chosen, tmp_path / "cut")
    auto = AutoModelForCausalLM if model.arch.task == "generate" else AutoModel
    stock, told = auto.from_pretrained(folder, output_loading_info=True)
    missing = {name for name in told["missing_keys"] if not name.startswith("pooler.")}
    assert not missing and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert stock(torch.arange(3, 20)[None])[0].isfinite().all()
    again = load(folder)
    assert {n: e.shape for n, e in again.checkpoint.entries.items()} == {
        n: cut_shape(model, n, sizes) for n in model.checkpoint.entries
    }
    assert sizes_of(again) == sizes


def test_llama_is_cut_as_the_slow_way_cuts_it(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    sizes = narrower(model)
    chosen = chosen_for(model, sizes)
    assert chosen.width is not None and chosen.ffn is not None and chosen.heads is not None
    weights = {n: model.weight(n) for n in model.checkpoint.entries if "embed" not in n}
    wanted = llama_cut_slow(
        weights,
        list(chosen.width),
        [list(h.queries) for h in chosen.heads],
        [list(f) for f in chosen.ffn],
        model.head_width,
    )
    for name, W in wanted.items():
        assert torch.equal(cut_tensor(model, name, chosen), W), name
    whole = model.weight(model.arch.embedding)
    assert torch.equal(cut_tensor(model, model.arch.embedding, chosen), whole[:, list(chosen.width)])


def test_channels_that_carry_nothing_are_what_goes(tmp_path: Path) -> None:
    """Where all but some inner channels are zero, cutting to those changes nothing."""
    folder = write_tiny(tmp_path / "m", "llama")
    model = load(folder)
    down = [f"{path}.mlp.up_proj.weight" for path in model.blocks]
    alive = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64]
    dead = torch.ones(128, dtype=torch.bool)
    dead[alive] = False
    changed = {name: model.weight(name).masked_fill(dead[:, None], 0.0) for name in down}
    model = replace(model, changed=changed)
    sizes = replace(sizes_of(model), ffn=64)
    chosen = chosen_for(model, sizes)
    assert chosen.ffn is not None
    assert all(list(kept) == sorted(alive.tolist()) for kept in chosen.ffn)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_pooled_keys_of_equal_heads_change_nothing(family: str, tmp_path: Path) -> None:
    """Grouped attention equals multi-head attention where a group has the same keys and values."""
    model = tiny(tmp_path, family)
    d, changed = model.head_width, {}
    for name in model.checkpoint.entries:
        if "k_proj" in name or "v_proj" in name:
            first = model.weight(name)[:d]
            changed[name] = torch.cat([first, first])
    model = replace(model, changed=changed)
    own = sizes_of(model)
    sizes = replace(own, kv_heads=1)
    chosen = chosen_for(model, sizes)
    folder = written(model, sizes, chosen, tmp_path / "pooled")
    whole = written(model, own, Selection(), tmp_path / "whole")
    ids = torch.arange(3, 40)[None]
    a, b = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (whole, folder))
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_heads_of_one_table_are_the_same_in_every_block(tmp_path: Path) -> None:
    model = tiny(tmp_path, "mpnet")
    sizes = narrower(model)
    chosen = chosen_for(model, sizes)
    assert chosen.heads is not None
    assert len({heads.queries for heads in chosen.heads}) == 1
    table = cut_tensor(model, "encoder.relative_attention_bias.weight", chosen)
    whole = model.weight("encoder.relative_attention_bias.weight")
    assert torch.equal(table, whole[:, list(chosen.heads[0].queries)])


def test_importance_does_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path, "bert")
    ids = torch.randint(3, 300, (6, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    names = watched(model, narrower(model))
    whole = slice_importance(model, ids, mask, names)
    monkeypatch.setattr("pocketsize.models.batches.BATCH_TOKENS", 16)
    parts = slice_importance(model, ids, mask, names)
    for name, one in whole.items():
        torch.testing.assert_close(parts[name].value(), one.value(), rtol=1e-5, atol=1e-6)


def test_a_selection_of_everything_is_the_model(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    all_heads = Heads((0, 1, 2, 3), ((0,), (1,)))
    chosen = Selection((all_heads,) * 2, (tuple(range(128)),) * 2, tuple(range(64)), tuple(range(320)))
    for name in model.checkpoint.entries:
        assert torch.equal(cut_tensor(model, name, chosen), model.weight(name))


def test_families_without_cuts_say_what_can_be_done(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="slices of a gpt2 model go together; leave out heads"):
        cuts_of(tiny(tmp_path, "gpt2"))
