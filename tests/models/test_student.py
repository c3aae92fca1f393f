"""Bodies that are built: within their budget, in stock transformers, and refused where nothing fits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.io.checkpoint import TensorSpec, write_safetensors
from pocketsize.models.arch import arch_of
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.student import (
    FAMILIES,
    Body,
    config_of,
    family_of,
    fitted,
    ladder,
    parameters_of,
    random_weights,
    shapes_of,
    unlike,
)
from tiny import write_tiny

ENCODERS = ("bert", "electra", "distilbert", "squeezebert", "mobilebert")
GENERATORS = ("llama", "qwen2", "mistral")


def teacher(tmp_path: Path, family: str) -> Model:
    return load(write_tiny(tmp_path / "teacher", "bert" if family in ENCODERS else "llama"))


def usual(model: Model, name: str, budget: int) -> Body:
    family = family_of(name, model)
    return fitted(lambda layers, hidden: family.body(model, name, layers, hidden), family, budget)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_budget_is_kept_and_nearly_used(name: str, tmp_path: Path) -> None:
    model = teacher(tmp_path, name)
    for budget in (600_000, 2_000_000):
        body = usual(model, name, budget)
        assert 0.7 * budget <= parameters_of(body) <= budget
        assert body.hidden // FAMILIES[name].narrow % body.heads == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_transformers_loads_it_whole(name: str, tmp_path: Path) -> None:
    model = teacher(tmp_path, name)
    body = usual(model, name, 700_000)
    made, raw = random_weights(body, 0), config_of(body)
    assert {n: tuple(t.shape) for n, t in made.items()} == shapes_of(raw)
    assert sum(math.prod(t.shape) for t in made.values()) == parameters_of(body)
    folder = tmp_path / "student"
    folder.mkdir()
    specs = [TensorSpec(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in made.items()]
    write_safetensors(folder / "model.safetensors", specs, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    auto = AutoModelForCausalLM if arch_of(name).task == "generate" else AutoModel
    stock, told = auto.from_pretrained(folder, output_loading_info=True)
    assert not {n for n in told["missing_keys"] if not n.startswith("pooler.")}
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    assert type(stock).__name__ == raw["architectures"][0]
    assert stock(torch.arange(3, 20)[None])[0].isfinite().all()


def test_chance_is_that_of_the_seed(tmp_path: Path) -> None:
    model = teacher(tmp_path, "bert")
    body = usual(model, "bert", 600_000)
    state = torch.random.get_rng_state()
    a, b, c = (random_weights(body, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_a_given_depth_is_kept_and_gives_the_widest(tmp_path: Path) -> None:
    model, family = teacher(tmp_path, "bert"), FAMILIES["bert"]
    body = fitted(lambda layers, hidden: family.body(model, "bert", 3, hidden), family, 2_000_000)
    wider = family.body(model, "bert", 3, body.hidden + family.step)
    assert body.layers == 3
    assert parameters_of(body) <= 2_000_000 < parameters_of(wider)


def test_too_small_a_budget_says_what_would_do(tmp_path: Path) -> None:
    model = teacher(tmp_path, "llama")
    with pytest.raises(UsageError) as error:
        usual(model, "llama", 10_000)
    least = int(str(error.value).partition("; allow ")[2].partition(", or")[0].replace(",", ""))
    assert "320 tokens take 20,480" in str(error.value)
    assert parameters_of(usual(model, "llama", least)) <= least


def test_families_are_refused_by_task_and_by_name(tmp_path: Path) -> None:
    model = teacher(tmp_path, "bert")
    with pytest.raises(UnsupportedError, match=r"llama: is for generate.* use one of bert"):
        family_of("llama", model)
    with pytest.raises(UsageError, match=r"unknown family 'brt'.*bert"):
        family_of("brt", model)


def test_ladders_rise(tmp_path: Path) -> None:
    shapes = list(ladder(FAMILIES["bert"]))
    assert shapes == sorted(shapes, key=lambda shape: shape[1])
    depths = [layers for layers, _ in shapes]
    assert depths == sorted(depths)


def test_a_shape_unlike_its_family_is_told(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "bert"))
    family = family_of("squeezebert", model)
    usual, deep = (family.body(model, "squeezebert", layers, 96) for layers in (2, 27))
    assert unlike(usual, family) is None
    assert str(unlike(deep, family)).startswith(
        "27 blocks of 96 channels, 3.6 for each block where squeezebert has about 64; of "
    )
    assert f"{model.config.vocab_size:,} tokens take {96 * model.config.vocab_size:,}: keep" in str(
        unlike(deep, family)
    )
