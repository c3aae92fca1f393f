"""Narrower models: equal to the slow way, and the same function where nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ElectraConfig,
    GPT2Config,
)

from oracles.slices import fused_rows_slow, importance_slow, llama_cut_slow
from pocketsize.distillation.slices import Heads, Importance, best, kept_heads
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.io.checkpoint import TensorSpec, write_safetensors
from pocketsize.models.importance import slice_importance
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.shares import sizes_without
from pocketsize.models.skeleton import materialise
from pocketsize.models.surgery import (
    Selection,
    Sizes,
    cut_config,
    cut_shape,
    cut_tensor,
    cuts_of,
    outlined,
    readers,
    selection,
    sizes_of,
    watched,
)
from tiny import FAMILIES, weights, write_tiny, write_weights


def tiny(tmp_path: Path, family: str) -> Model:
    return load(write_tiny(tmp_path / family, family))


def narrower(model: Model) -> Sizes:
    """Half the heads and inner channels, half the width."""
    own = sizes_of(model)
    if model.config.model_type == "mobilebert":
        return replace(own, ffn=own.ffn // 2)
    if model.config.model_type in ("opt", "electra"):  # half is as wide as their embedding
        return Sizes(3, 3, own.ffn // 2, 48, own.vocabulary)
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


@pytest.mark.parametrize("family", FAMILIES)
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
        [list(chosen.ffn[f"{path}.mlp.down_proj"]) for path in model.blocks],
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
    assert all(list(kept) == sorted(alive.tolist()) for kept in chosen.ffn.values())


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
    ffn = {f"{path}.mlp.down_proj": tuple(range(128)) for path in model.blocks}
    chosen = Selection((all_heads,) * 2, ffn, tuple(range(64)), tuple(range(320)))
    for name in model.checkpoint.entries:
        assert torch.equal(cut_tensor(model, name, chosen), model.weight(name))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mobilebert"])
def test_no_matrix_of_a_block_is_as_wide_as_the_model_on_both_sides(family: str, tmp_path: Path) -> None:
    """Where attention is as wide as the model, a side that is forgotten has the right shape by chance."""
    model = tiny(tmp_path, family)
    cuts = cuts_of(model)
    named = {side.rpartition(":")[0] for side in (*cuts.heads, *cuts.keys, *cuts.bundles)}
    for group in model.groups:
        for name in group.names:
            given, read = (set(cuts.kinds(f"{name}:{end}")) for end in ("out", "in"))
            assert (given == {"width"}) != (read == {"width"}), name
            if group.attends:
                assert given <= {"heads", "keys", "bundles"} and name in named
            elif read == {"width"}:
                assert given == {"ffn"}
    assert len(readers(model, "heads")) == 1 and readers(model, "ffn")


def parts_that_stay(model: Model) -> tuple[Sizes, Selection]:
    """Half the inner channels, and half the groups of heads where attention has a width of its own."""
    own, cuts = sizes_of(model), cuts_of(model)
    draw = torch.Generator().manual_seed(3)
    read = [f"{path}.{name}" for path in model.blocks for name in readers(model, "ffn")]
    half = own.ffn // 2
    ffn = {name: tuple(sorted(torch.randperm(own.ffn, generator=draw)[:half].tolist())) for name in read}
    sizes, chosen = replace(own, ffn=half), Selection(ffn=ffn)
    if cuts.square or not cuts.heads:
        return sizes, chosen
    per = own.heads // own.kv_heads
    heads = [kept_heads(torch.rand(own.heads, generator=draw), own.kv_heads, per, 1) for _ in model.blocks]
    return replace(sizes, heads=per, kv_heads=1), replace(chosen, heads=tuple(heads))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_nothing_reads_can_go(family: str, tmp_path: Path) -> None:
    """Heads and channels whose readers ignore them: what is left is the same function, fused or not."""
    model = tiny(tmp_path, family)
    sizes, chosen = parts_that_stay(model)
    assert chosen.ffn is not None
    d, changed = model.head_width, {}
    stay = {name: list(kept) for name, kept in chosen.ffn.items()}
    if chosen.heads is not None:
        (reader,) = readers(model, "heads")
        named = zip(model.blocks, chosen.heads, strict=True)
        stay |= {
            f"{path}.{reader}": [q * d + i for q in one.queries for i in range(d)] for path, one in named
        }
    for path, kept in stay.items():
        W = model.matrix(f"{path}.weight")
        only = torch.zeros_like(W)
        only[:, kept] = W[:, kept]
        changed[f"{path}.weight"] = model.as_stored(f"{path}.weight", only)
    whole = replace(model, changed=changed)
    cut = load(written(model, sizes, chosen, tmp_path / "cut"))
    ids = torch.randint(5, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (materialise(one)(ids)[0] for one in (whole, cut))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert (materialise(model)(ids)[0] - a).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_one_matrix_for_queries_keys_and_values_is_cut_the_slow_way(family: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, family)
    chosen = chosen_for(model, narrower(model))
    assert chosen.width is not None and chosen.heads is not None
    part = model.groups[0].names[0]
    for path, heads in zip(model.blocks, chosen.heads, strict=True):
        rows = fused_rows_slow(family, list(heads.queries), 64, model.head_width)
        W, b = (model.weight(f"{path}.{part}.{name}") for name in ("weight", "bias"))
        W = W.T if family == "gpt2" else W
        wanted = torch.stack([torch.stack([W[i, j] for j in chosen.width]) for i in rows])
        cut = cut_tensor(model, f"{path}.{part}.weight", chosen)
        assert torch.equal(cut.T if family == "gpt2" else cut, wanted)
        assert torch.equal(
            cut_tensor(model, f"{path}.{part}.bias", chosen), torch.stack([b[i] for i in rows])
        )


@pytest.mark.parametrize("family", ["gpt2", "opt", "electra", "mobilebert", "mixtral", "gpt_neox", "phi3"])
def test_classifiers_are_cut_with_their_heads(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family, classes=("a", "b", "c")))
    sizes = narrower(model)
    folder = written(model, sizes, chosen_for(model, sizes), tmp_path / "cut")
    stock, told = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock(torch.arange(3, 20)[None]).logits.shape == (1, 3)


def test_an_experts_channels_are_weighed_by_the_tokens_it_is_given(tmp_path: Path) -> None:
    """To the tokens that others are given they carry nothing."""
    model = tiny(tmp_path, "mixtral")
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    path = f"{model.blocks[1]}.mlp.experts.2.w2"
    found = slice_importance(model, ids, mask, {path: 1})[path].value()
    module, dense = materialise(model), torch.zeros(ids.numel(), 128)

    def see(_: object, args: tuple[torch.Tensor, torch.Tensor]) -> None:
        dense[args[1]] = args[0]

    module.get_submodule(path).register_forward_pre_hook(see)
    with torch.no_grad():
        module(input_ids=ids, attention_mask=mask.long())
    wanted = importance_slow(dense.view(4, 12, -1), mask, 1)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_an_embedding_that_is_as_wide_stays_so_and_a_narrower_one_stays(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", "electra")
    narrow = load(folder)
    assert cut_config(narrow, narrower(narrow), tied=False)["embedding_size"] == 32
    with pytest.raises(UsageError, match="hidden: 32 is as wide as the embedding of this electra"):
        outlined(narrow, replace(narrower(narrow), hidden=32, heads=2, kv_heads=2))
    config = ElectraConfig(**{**narrow.config.to_dict(), "embedding_size": 64})
    config.save_pretrained(folder)
    write_weights(folder, weights(config, torch.float32, 0))
    wide = load(folder)
    assert cut_config(wide, narrower(wide), tied=False)["embedding_size"] == 48
    cut = written(wide, narrower(wide), chosen_for(wide, narrower(wide)), tmp_path / "cut")
    assert AutoModel.from_pretrained(cut)(torch.arange(3, 20)[None])[0].shape == (1, 17, 48)


def test_heads_for_other_tasks_stay_behind(tmp_path: Path) -> None:
    """Published ELECTRAs bring the head of their pretraining, BERTs one with a number for each token."""
    for family, extra in (
        ("electra", {"discriminator_predictions.dense.weight": (64, 64), "classifier.bias": (5,)}),
        ("bert", {"cls.predictions.bias": (320,), "cls.predictions.transform.dense.weight": (64, 64)}),
    ):
        folder = write_tiny(tmp_path / family, family)
        more = {name: torch.ones(shape) for name, shape in extra.items()}
        model = load(folder)
        write_weights(folder, {name: model.original(name) for name in model.checkpoint.entries} | more)
        model = load(folder)
        assert set(extra) < set(model.checkpoint.entries)
        sizes = replace(narrower(model), vocabulary=300)
        chosen = replace(chosen_for(model, sizes), tokens=tuple(range(300)))
        again = load(written(model, sizes, chosen, tmp_path / f"{family}-cut"))
        assert not set(extra) & set(again.checkpoint.entries) and again.config.vocab_size == 300


def test_experts_without_a_token_are_cut_by_their_weights(tmp_path: Path) -> None:
    model = tiny(tmp_path, "mixtral")
    sizes = replace(sizes_of(model), ffn=64)
    names = watched(model, sizes)
    idle = next(name for name in names if ".experts.3." in name)
    seen = {name: Importance(torch.rand(128, dtype=torch.float64) + 1) for name in names}
    seen[idle] = Importance.zeros(128)
    chosen = selection(model, sizes, seen, None)
    assert chosen.ffn is not None
    norms = model.weight(f"{idle}.weight").norm(dim=0)
    assert chosen.ffn[idle] == tuple(best(norms, 64)) != tuple(range(64))


def test_inner_channels_that_a_config_leaves_to_a_rule_are_counted(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", "gpt2")
    config = GPT2Config(**{**load(folder).config.to_dict(), "n_inner": None})
    config.save_pretrained(folder)
    write_weights(folder, weights(config, torch.float32, 0))
    model = load(folder)
    assert sizes_of(model).ffn == 256 and model.config.n_inner is None
    assert cut_config(model, replace(sizes_of(model), ffn=96), tied=False)["n_inner"] == 96


def test_bottlenecks_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny(tmp_path, "mobilebert")
    with pytest.raises(
        UnsupportedError, match="student: hidden: heads and channels of a mobilebert go through"
    ):
        cuts_of(model, ["hidden"])
    assert sizes_without(model, 0.1).heads == sizes_of(model).heads
