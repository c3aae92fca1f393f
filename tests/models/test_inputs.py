"""Linears that round what they read: in forward passes, and as the walk calibrates on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporting.rounded import quantized
from pocketsize.models import batches
from pocketsize.models import calls as calling
from pocketsize.models import walk as walking
from pocketsize.models.batches import HELD_OUT
from pocketsize.models.inputs import round_inputs
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.models.walk import walk
from pocketsize.quantization.activations import rounded
from pocketsize.quantization.scheme import NAMED
from pocketsize.recipes.journal import open_journal
from tiny import write_tiny

IDS = torch.randint(5, 300, (8, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS, dtype=torch.bool)
W8A8 = NAMED["W8A8"]


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact arithmetic on every machine; several batches even for little text."""
    for module in (calling, walking):
        monkeypatch.setattr(module, "forward_dtype", lambda: torch.float32)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 96)


@torch.no_grad()
def read_by(module: torch.nn.Module, name: str) -> torch.Tensor:
    """What a linear is handed, before it rounds it."""
    seen: list[torch.Tensor] = []
    linear = module.get_submodule(name.removesuffix(".weight"))
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
    module(input_ids=IDS)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_a_forward_pass_rounds_what_each_linear_reads(tmp_path: Path) -> None:
    module = materialise(load(write_tiny(tmp_path, "llama")))
    X = read_by(module, "model.layers.1.mlp.down_proj.weight")
    linear = module.get_submodule("model.layers.1.mlp.down_proj")
    plain = linear(X)
    round_inputs(module, {"model.layers.1.mlp.down_proj.weight": NAMED["FP8"]})
    assert torch.equal(linear(X), rounded(X, floats=True) @ linear.weight.T)
    assert not torch.equal(linear(X), plain)


def test_divisors_round_what_is_divided(tmp_path: Path) -> None:
    module, name = materialise(load(write_tiny(tmp_path, "llama"))), "model.layers.0.mlp.up_proj.weight"
    linear, X = module.get_submodule(name.removesuffix(".weight")), torch.randn(3, 5, 64)
    s = 2.0 ** (torch.arange(64) % 7 - 3)
    round_inputs(module, {name: W8A8}, {name: s})
    assert torch.equal(linear(X), (rounded(X / s, floats=False) * s) @ linear.weight.T)


def settled(
    model: Model, done: dict[str, torch.Tensor], divisors: dict[str, torch.Tensor]
) -> torch.nn.Module:
    """The whole model with what is settled so far."""
    module = materialise(model)
    for name, W in done.items():
        module.get_parameter(name).data = W
    round_inputs(module, dict.fromkeys(done, W8A8), divisors)
    return module


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_walk_calibrates_on_what_will_be_read(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, family))
    done: dict[str, torch.Tensor] = {}
    divisors: dict[str, torch.Tensor] = {}
    for site in walk(model, IDS, MASK, hold_out=True, sampled=40, rounds=dict.fromkeys(model.linears, W8A8)):
        X = read_by(settled(model, done, divisors), site.names[0])
        rows = X.reshape(-1, X.shape[-1])
        assert torch.allclose(site.gram.mean(), rows.T @ rows / len(rows), atol=1e-3, rtol=1e-2)
        assert site.sample is not None
        taught = torch.arange(len(IDS)) % HELD_OUT != HELD_OUT - 1
        assert torch.allclose(site.sample.peak, X[taught].abs().amax((0, 1)), atol=0.02, rtol=0.02)
        assert len(site.sample.rows) == len(site.sample.held) == 40
        site.divisor = 2.0 ** (torch.arange(X.shape[-1]) % 3 - 1)
        for name, W in zip(site.names, site.weights, strict=True):
            site.replaced[name] = done[name] = W * 0.8
            divisors[name] = site.divisor


def test_schemes_are_known_without_reading_weights(tmp_path: Path) -> None:
    model = quantized(load(write_tiny(tmp_path / "m", "llama")), W8A8)
    journal = open_journal(tmp_path / "work", {})
    journal.keep("unit", model.quantized, ())
    kept = model.with_quantized(journal.weights())
    for path in (tmp_path / "work" / "objects").iterdir():
        path.unlink()
    assert kept.rounds == model.rounds == dict.fromkeys(model.linears, W8A8)
