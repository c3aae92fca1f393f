"""Models that are pruned already: every zero stays, and what a config says of zeros is so."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from pocketsize.errors import DataError, NumericalError, UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes.body import Layers
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.quantize import Gptq, Rtn
from tiny import write_tiny


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())


ran = partial(runs.ran, sequences=16)


def pruned(tmp_path: Path, *steps: Any, family: str = "llama") -> Path:
    """A model of this family in `m`, pruned in `p`."""
    ran(write_tiny(tmp_path / "m", family), tmp_path / "p", *steps)
    return tmp_path / "p"


def share(model: Model, name: str) -> float:
    return float((model.weight(name) == 0).double().mean())


def revived(before: Path, after: Path) -> int:
    """How many zeros are none any more."""
    a, b = load(before), load(after)
    return sum(int(((a.weight(name) == 0) & (b.weight(name) != 0)).sum()) for name in a.linears)


def said(folder: Path, value: object) -> None:
    """Makes a config say this of its zeros."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sparsity": value}))


MORE = [{"sparsity": 0.6}, {"pattern": "2:4"}, {"sparsity": 0.6, "scope": "row"}]


@pytest.mark.parametrize("score", ["alps", "sparsegpt", "surgeon", "taylor", "wanda", "magnitude"])
@pytest.mark.parametrize("update", ["auto", "sweep", "refit"])
@pytest.mark.parametrize("more", MORE, ids=str)
def test_no_zero_comes_back_and_all_of_them_count(
    score: str, update: str, more: dict[str, Any], tmp_path: Path
) -> None:
    first = pruned(tmp_path, Prune(score="magnitude"))
    done = ran(first, tmp_path / "o", Prune(score=score, update=update, **more))
    assert revived(first, tmp_path / "o") == 0
    model = load(tmp_path / "o")
    found = {name: share(model, name) for name in model.linears}
    by_parts = bool({"pattern", "scope"} & more.keys()) or score in ("sparsegpt", "wanda")
    if not by_parts:
        assert all(one == pytest.approx(0.6, abs=0.01) for one in found.values())
    assert min(found.values()) >= 0.49
    if "pattern" in more:
        for name in model.linears:
            assert int((model.weight(name) != 0).view(-1, 4).sum(1).max()) == 2
        (kept,) = [f for f in done.record.findings if f.code == "zeros-kept"]
        assert re.search(r"5\d\.\d% of the weights are zero, and 50\.0% was asked for", kept.message)
    told = {layer.name: layer.zeros for layer in done.record.steps[0].layers}
    assert told == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "mpnet", "qwen3_moe"])
@pytest.mark.parametrize("step", [Prune(sparsity=0.7), Prune(sparsity=0.7, learn=4)], ids=str)
def test_no_zero_comes_back_in_other_families(family: str, step: Prune, tmp_path: Path) -> None:
    first = pruned(tmp_path, Prune(score="magnitude"), family=family)
    done = ran(first, tmp_path / "o", step)
    assert revived(first, tmp_path / "o") == 0
    model = load(tmp_path / "o")
    assert all(share(model, name) == pytest.approx(0.7, abs=0.01) for name in model.linears)
    assert not [f for f in done.record.findings if f.code == "zeros-kept"]


FEWER: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.3}, r"prune: sparsity 0\.3: of the model's weights 0\.5 are zero .*ask for 0\.5 or more"),
    ({"pattern": "3:4"}, r"prune: pattern 3:4: .*ask for 0\.5 or more"),
    (
        {"sparsity": 0.55, "allocation": "outliers", "spread": 0.1},
        r"outliers takes as little as 0\.45.*a smaller spread",
    ),
    (
        {"sparsity": 0.6, "overrides": {"*.q_proj": 0.3}},
        r"\*\.q_proj: 0\.3: .*0\.5 or more, or null",
    ),
]


@pytest.mark.parametrize(("options", "words"), FEWER, ids=str)
def test_fewer_zeros_are_refused_before_work(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    first = load(pruned(tmp_path, Prune(score="magnitude")))
    with pytest.raises(UsageError, match=words):
        Prune(**options).resolve(first, ("folder",))
    plain = load(tmp_path / "m")
    outlined = Prune().resolve(plain, ("folder",)).outline(plain)
    with pytest.raises(UsageError, match=words):
        Prune(**options).resolve(outlined, ("folder",))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pattern": "2:4"},
        {"sparsity": 0.55, "allocation": "outliers"},
        {"sparsity": 0.6, "allocation": "taylor"},
        {"sparsity": 0.6, "overrides": {"*.q_proj": None}},
    ],
    ids=str,
)
def test_as_many_zeros_or_more_are_not_refused(options: dict[str, Any], tmp_path: Path) -> None:
    Prune(**options).resolve(load(pruned(tmp_path, Prune(score="magnitude"))), ("folder",))


def test_what_an_override_left_may_still_be_pruned_by_less(tmp_path: Path) -> None:
    first = pruned(tmp_path, Prune(overrides={"*.q_proj": None}))
    ran(first, tmp_path / "o", Prune(sparsity=0.6, overrides={"*.q_proj": 0.25}))
    assert revived(first, tmp_path / "o") == 0
    model = load(tmp_path / "o")
    for name in model.linears:
        assert share(model, name) == pytest.approx(0.25 if "q_proj" in name else 0.6, abs=0.01), name


def test_a_sum_that_has_no_zeros_is_refused(tmp_path: Path) -> None:
    first = load(pruned(tmp_path, Prune(score="magnitude")))
    with pytest.raises(UnsupportedError, match=r"oats: of the model's weights 0\.5 are zero and stay so"):
        Oats().resolve(first, ("folder",))


SHORT: dict[str, Any] = {"tokens": "2k", "batch": 4, "length": 32, "rate": 1e-3}
UNEVEN = [
    (Prune(overrides={"*.q_proj": None}), 0.5),
    (Prune(pattern="2:4", overrides={"*.q_proj": None}), 0.5),
    (Prune(overrides={"*attn*": 0.3, "*mlp*": 0.4}), 0.4),
    (Prune(allocation="outliers"), 0.5),
    (Prune(score="magnitude", scope="model"), 0.5),
    (Gradual(sparsity=0.5, scope="model", **SHORT), 0.5),
    (Gradual(sparsity=0.5, scope="erk", **SHORT), 0.5),
]


@pytest.mark.parametrize(("step", "most"), UNEVEN, ids=str)
def test_linears_that_differ_are_told_and_go_on(step: Any, most: float, tmp_path: Path) -> None:
    first = pruned(tmp_path, step)
    told = json.loads((first / "config.json").read_text())["sparsity"]
    assert told["uneven"] is True and told["share"] == pytest.approx(most, abs=1e-3)
    ran(first, tmp_path / "o", Layers(keep=1), Rtn(), export=("folder", "sparse"))
    assert load(tmp_path / "o").pattern == load(tmp_path / "o" / "sparse").pattern == load(first).pattern


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("step", [Prune(), Prune(pattern="2:4"), Prune(score="wanda", sparsity=0.9)], ids=str)
def test_linears_that_do_not_differ_are_held_to_the_config(step: Prune, family: str, tmp_path: Path) -> None:
    first = pruned(tmp_path, step, family=family)
    assert "uneven" not in json.loads((first / "config.json").read_text())["sparsity"]
    ran(first, tmp_path / "o", Gptq(), export=("folder", "sparse"))
    load(tmp_path / "o"), load(tmp_path / "o" / "sparse")


def test_linears_that_had_more_zeros_do_not_raise_the_share_of_each(tmp_path: Path) -> None:
    first = pruned(tmp_path, Prune(score="magnitude", overrides={"*.q_proj": 0.9}))
    ran(first, tmp_path / "o", Gradual(sparsity=0.6, **SHORT))
    assert revived(first, tmp_path / "o") == 0
    model = load(tmp_path / "o")
    assert model.pattern is not None and model.pattern.sparsity == 0.6 and not model.pattern.uneven
    assert {round(share(model, name), 1) for name in model.linears} == {0.6, 0.9}


ODD = [
    (
        {"structure": "2:4", "share": 0.5},
        r"\d+ of 2048 groups of 4 keep more than 2.*sparsity: 2:4, 0\.5",
    ),
    (
        {"structure": "unstructured", "share": 0.9},
        r"0\.5 of its weights are zero.*unstructured, 0\.9",
    ),
]


@pytest.mark.parametrize(("value", "words"), ODD, ids=str)
@pytest.mark.parametrize("export", ["folder", "sparse"])
def test_a_config_that_tells_of_other_zeros_is_refused(
    value: dict[str, Any], words: str, export: str, tmp_path: Path
) -> None:
    ran(write_tiny(tmp_path / "m", "llama"), tmp_path / "p", Prune(score="magnitude"), export=(export,))
    said(tmp_path / "p", value)
    with pytest.raises(DataError, match=rf"model\.safetensors: tensor model\.layers\.0\.\S+: {words}"):
        load(tmp_path / "p")
    said(tmp_path / "p", value | {"uneven": True})
    with pytest.raises(
        DataError, match=r"config\.json: sparsity: .*none of the 14 linears has as many zeros"
    ):
        load(tmp_path / "p")


@pytest.mark.parametrize("step", [Prune(allocation="taylor"), Prune(overrides={"*.up_proj": None})], ids=str)
def test_zeros_of_linears_that_differ_are_missed_once_none_has_them(step: Prune, tmp_path: Path) -> None:
    first = pruned(tmp_path, step)
    held, linears = load_file(first / "model.safetensors"), load(first).linears
    for name in linears:
        load(first)
        held[name] = held[name].where(held[name] != 0, 0.01)
        save_file(held, first / "model.safetensors", metadata={"format": "pt"})
        if all(bool(held[other].all()) for other in linears):
            break
    with pytest.raises(DataError, match="none of the 14 linears"):
        load(first)


def test_one_linear_that_was_filled_is_named(tmp_path: Path) -> None:
    first = pruned(tmp_path, Prune(score="magnitude"))
    held, name = load_file(first / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    held[name] = torch.ones_like(held[name])
    save_file(held, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"tensor {re.escape(name)}: 0 of its weights are zero"):
        load(first)


def test_a_layer_that_reads_only_zeros_is_told_how_to_be_left(tmp_path: Path) -> None:
    """What the error says works as it is."""
    source = write_tiny(tmp_path / "m", "llama")
    held = load_file(source / "model.safetensors")
    norm = "model.layers.1.post_attention_layernorm.weight"
    held[norm] = torch.zeros_like(held[norm])
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"gate_proj\.weight: all its 64 inputs") as caught:
        ran(source, tmp_path / "o", Prune())
    assert "rtn" not in str(caught.value)
    (words,) = re.findall(r'--set "overrides=\{(.*?)\}"', str(caught.value))
    names = re.findall(r"'(\S+?)': null", words)
    assert names == [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
    with pytest.raises(NumericalError, match=r"'model\.layers\.1\.mlp\.down_proj': null"):
        ran(source, tmp_path / "a", Prune(overrides=dict.fromkeys(names)))
    ran(source, tmp_path / "b", Prune(overrides={"model.layers.1.mlp.*": None}))
