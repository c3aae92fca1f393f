"""What the steps make of a site's statistics, and say where the calibration text tells little or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketsize.errors import NumericalError
from pocketsize.linalg import Gram
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.walk import Site
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.awq import Awq
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn, quantize_site
from pocketsize.recipes.step import Context
from tiny import write_tiny

NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture
def dead(tmp_path: Path) -> Model:
    """The linears that read this norm's output read nothing but zeros."""
    folder = write_tiny(tmp_path / "model", "llama")
    held = load_file(folder / "model.safetensors")
    held[NORM] = torch.zeros_like(held[NORM])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


def context(tmp_path: Path, windows: int) -> Context:
    ids = torch.randint(3, 320, (windows, 16), generator=torch.Generator().manual_seed(0))
    journal = open_journal(tmp_path / "work", {"recipe": "test"})
    return Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)


def test_a_layer_that_saw_no_data_is_an_error(dead: Model, tmp_path: Path) -> None:
    step = Gptq().resolve(dead, ("folder",))
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.gate_proj.*: all its 64 inputs were zero"):
        step.apply(dead, context(tmp_path, 16))


def test_rounding_to_nearest_needs_no_data(dead: Model, tmp_path: Path) -> None:
    done = Rtn().resolve(dead, ("folder",)).apply(dead, context(tmp_path, 16))
    assert all(bool(torch.isfinite(done.weight(name)).all()) for name in dead.linears)


@pytest.mark.parametrize("kind", [Gptq, Rtn], ids=lambda kind: kind.kind)
def test_a_grid_that_float16_cannot_hold_is_refused_by_name(kind: type[Gptq | Rtn], tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    held = load_file(folder / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3] = -1e6
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    step = kind(float_zeros=True).resolve(model, ("gguf",))
    with pytest.raises(
        NumericalError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: 2 of its .*float_zeros"
    ):
        step.apply(model, context(tmp_path, 16))


@pytest.mark.parametrize("step", [Rtn(), Hqq()], ids=lambda step: step.kind)
def test_subnormal_and_constant_weights_stay_finite(step: Rtn | Hqq, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    held = load_file(folder / "model.safetensors")
    names = [name for name in held if "layers.1." in name and "norm" not in name]
    for name, value in zip(names, (1e-40, -1e-40, 0.0, 1e-30, 3.5, -3.5, 1e4), strict=True):
        held[name] = torch.full_like(held[name], value)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    done = step.resolve(model, ("folder",)).apply(model, context(tmp_path, 1))
    for name, value in zip(names, (0.0, 0.0, 0.0, 0.0, 3.5, -3.5, 1e4), strict=True):
        assert torch.allclose(done.weight(name), torch.full_like(held[name], value), rtol=0.01, atol=1e-4), (
            name
        )


@pytest.mark.parametrize(("windows", "said"), [(7, True), (8, False)])
def test_fewer_tokens_than_inputs_are_a_finding(windows: int, said: bool, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", "llama"))
    ctx = context(tmp_path, windows)
    done = Gptq().resolve(model, ("folder",)).apply(model, ctx)
    found = [finding for finding in ctx.findings if finding.code == "few-tokens"]
    assert bool(found) is said and all(
        bool(torch.isfinite(done.weight(name)).all()) for name in model.linears
    )
    if said:
        assert found[0].where.endswith("down_proj.weight") and "112 calibration tokens" in found[0].message
        assert "112 of 128 directions" in found[0].message


def site(*, first: bool) -> Site:
    """One matrix, what it reads, and (in quite another direction) what first positions read."""
    g = torch.Generator().manual_seed(0)
    gram, loud = Gram.zeros(64), Gram.zeros(64)
    gram.update(torch.randn(512, 64, generator=g))
    loud.update(torch.randn(1, 64, generator=g).repeat(8, 1) * 4)
    W = torch.randn(16, 64, generator=g)
    return Site("block", ("w",), (W,), gram, last=True, first=loud if first else None)


@pytest.mark.parametrize("sink", [0.0, 0.5, 3.0])
def test_first_positions_count_as_much_as_sink_says(sink: float) -> None:
    scheme, one = Scheme(3, 32), site(first=True)
    assert one.first is not None
    ((_, weight, report),) = quantize_site(one, scheme, Gptq("W3A16", sink=sink))
    objective = one.gram.mean() + sink * one.first.mean()
    assert torch.equal(weight.codes, gptq(one.weights[0], objective, scheme).weight.codes)
    E, H = one.weights[0] - weight.dequantize(), one.gram.mean()
    whole = ((one.weights[0] @ H) * one.weights[0]).sum()
    assert report.error == pytest.approx(float(((E @ H) * E).sum() / whole), rel=1e-3)


def test_an_error_at_first_positions_falls_and_elsewhere_sink_changes_nothing() -> None:
    one = site(first=True)
    assert one.first is not None
    X = one.first.mean()

    def error(sink: float) -> float:
        ((_, weight, _),) = quantize_site(one, Scheme(3, 32), Gptq("W3A16", sink=sink))
        E = one.weights[0] - weight.dequantize()
        return float(((E @ X) * E).sum())

    assert error(1.0) < 0.25 * error(0.0)
    codes = [
        next(quantize_site(site(first=False), Scheme(3, 32), Gptq("W3A16", sink=s)))[1].codes for s in (0, 3)
    ]
    assert torch.equal(*codes)


@pytest.mark.parametrize("step", [Gptq(), Awq()], ids=lambda step: step.kind)
def test_inputs_that_were_always_zero_are_told_once_and_name_the_worst(
    step: Gptq | Awq, tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    held = load_file(folder / "model.safetensors")
    for block, count in ((0, 5), (1, 3)):
        held[f"model.layers.{block}.post_attention_layernorm.weight"][:count] = 0
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    model, ctx = load(folder), context(tmp_path, 16)
    step.resolve(model, ("folder",)).apply(model, ctx)
    (found,) = (f for f in ctx.findings if f.code == "dead-inputs")
    assert found.message == "4 of 14 matrices have inputs that were always zero, at most 5 of 64"
    assert found.where.startswith("model.layers.0.mlp.")
