"""Every family from a folder of weights to a smaller one, with which stock transformers computes the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from pocketsize.errors import UnsupportedError
from pocketsize.exporting.behaviour import loaded
from pocketsize.exporting.compressed_tensors import predict_bytes, stored_value, write
from pocketsize.exporting.read_back import read_folder
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.quiet import quiet
from pocketsize.models.walk import Site
from pocketsize.quantization.grid import QWeight
from pocketsize.recipes import awq
from pocketsize.recipes.awq import Awq
from pocketsize.recipes.grids import block_scheme
from pocketsize.recipes.quantize import Gptq, Rtn
from pocketsize.recipes.record import LayerReport
from pocketsize.recipes.step import Context
from pocketsize.search.ladder import ladder
from tiny import FAMILIES, GENERATORS, VOCAB, write_tiny, write_weights

STEPS = {
    "gptq": Gptq(),
    "gptq-symmetric": Gptq(scheme="W5A16", symmetric=True),
    "rtn-rows": Rtn(scheme="W8A16", group=None),
}


class Memory:
    """A store that lasts as long as the test."""

    def __init__(self) -> None:
        self.held: dict[str, QWeight] = {}
        self.vectors: dict[str, torch.Tensor] = {}

    def keep(
        self,
        key: str,
        weights: Mapping[str, QWeight],
        reports: tuple[LayerReport, ...],
        changed: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.held |= weights
        self.vectors |= changed

    def finished(self, key: str) -> None:
        return None

    def weights(self) -> Mapping[str, QWeight]:
        return self.held

    def changed(self) -> Mapping[str, torch.Tensor]:
        return self.vectors

    def beside(self, name: str) -> Memory:
        return Memory()


def text(model: Model, seed: int, rows: int) -> torch.Tensor:
    return torch.randint(5, VOCAB - 1, (rows, 40), generator=torch.Generator().manual_seed(seed))


def quantized(model: Model, step: Gptq | Rtn | Awq) -> tuple[Model, Context]:
    ids = text(model, 0, 8)
    context = Context(ids, torch.ones_like(ids, dtype=torch.bool), Memory(), lambda *_: None)
    return step.apply(model, context), context


def stock(folder: Path, family: str) -> torch.nn.Module:
    """The model as transformers loads it, without anything of ours."""
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    auto = AutoModelForCausalLM if family in GENERATORS else AutoModel
    with quiet():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_quantized_saved_and_reloaded(family: str, kind: str, tmp_path: Path) -> None:
    original = load(write_tiny(tmp_path / "in", family))
    step = STEPS[kind].resolve(original, ("folder",))
    model, context = quantized(original, step)
    assert set(model.quantized) == set(model.linears)
    (layers,) = (report.layers for report in context.reports)
    assert all(0 < layer.error < 0.05 for layer in layers) and len(layers) == len(model.linears)

    out = tmp_path / "out"
    out.mkdir()
    artifact = write(model, out)
    schemes = dict.fromkeys(model.linears, block_scheme(step))
    assert artifact.bytes == predict_bytes(original, schemes.get)
    assert artifact.bytes < 0.75 * original.origin.bf16_bytes

    ids = text(model, 1, 2)
    module = stock(out, family)
    theirs, ours = module(ids)[0], loaded(model, lambda name: stored_value(model, name))(ids)[0]
    assert torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4)
    whole = stock(tmp_path / "in", family)(ids)[0]
    assert 1e-4 < float((theirs - whole).norm() / whole.norm()) < 0.5

    _require_read_back(out, model)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "with zeros"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ends_packed_as_the_linears_are(family: str, symmetric: bool, tmp_path: Path) -> None:
    original = load(write_tiny(tmp_path / "in", family))
    step = Rtn("W4A16", group=32, symmetric=symmetric, embeddings="same")
    if original.arch.dense_on_load:
        with pytest.raises(UnsupportedError, match=r"unpacks no embedding|without zeros alone"):
            step.resolve(original, ("folder",))
        return
    model, _ = quantized(original, step.resolve(original, ("folder",)))
    assert set(model.quantized) == {*model.linears, *model.ends}
    out = tmp_path / "out"
    out.mkdir()
    artifact = write(model, out)
    schemes = {name: weight.scheme for name, weight in model.quantized.items()}
    assert artifact.bytes == predict_bytes(original, schemes.get)
    stored = open_checkpoint(out).entries
    assert all(f"{original.checkpoint.entries[name].name}_packed" in stored for name in model.ends)

    ids = text(model, 1, 2)
    theirs, ours = stock(out, family)(ids)[0], loaded(model, lambda name: stored_value(model, name))(ids)[0]
    assert torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4)
    _require_read_back(out, model)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scales_move_between_layers_and_change_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever scales are found: stock transformers computes what the walk saw, where no norm was changed."""
    original = load(write_tiny(tmp_path / "in", family, dtype=torch.float32))
    step = Awq("W4A16", group=32)
    if all(group.fed_by is None for group in original.arch.groups):
        with pytest.raises(UnsupportedError, match="nothing before a linear can take its scales"):
            step.resolve(original, ("folder",))
        return
    scaled: list[torch.Tensor] = []

    def anything(*_: object, most: torch.Tensor, **__: object) -> torch.Tensor:
        g = torch.Generator().manual_seed(len(scaled))
        scaled.append(torch.minimum(torch.exp2(torch.randint(-3, 4, most.shape, generator=g).float()), most))
        return scaled[-1]

    real, effective = awq._scaled_site, dict[str, torch.Tensor]()

    def seen(site: Site, *rest: Any) -> Iterator[tuple[str, QWeight, LayerReport]]:
        yield from real(site, *rest)
        effective.update({name: original.as_stored(name, W) for name, W in site.replaced.items()})

    monkeypatch.setattr(awq, "input_scales", anything)
    monkeypatch.setattr(awq, "_scaled_site", seen)
    model, _ = quantized(original, step.resolve(original, ("folder",)))
    sites = [group for group in model.groups if group.fed_by is not None]
    assert len(scaled) >= len(sites) * len(model.blocks) * 0.5  # experts without held-out tokens are not
    out = tmp_path / "out"
    out.mkdir()
    write(replace(model, dtype=torch.float32), out)
    ids = text(model, 1, 2)
    theirs = stock(out, family)(ids)[0]
    ours = loaded(original, lambda name: effective.get(name, original.weight(name)))(ids)[0]
    assert torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4)
    assert any(not torch.equal(model.weight(name), effective[name]) for name in effective)
    _require_read_back(out, replace(model, dtype=torch.float32))


@torch.no_grad()
def test_names_in_the_file_are_kept(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "in", "bert")
    tensors = load_file(folder / "model.safetensors")
    older = {f"bert.{n}".replace("Norm.weight", "Norm.gamma"): t for n, t in tensors.items()}
    write_weights(folder, older | {"cls.predictions.bias": torch.zeros(VOCAB)})
    original = load(folder)
    model, _ = quantized(original, STEPS["rtn-rows"].resolve(original, ("folder",)))
    (tmp_path / "out").mkdir()
    write(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "bert.embeddings.LayerNorm.gamma" in written and "cls.predictions.bias" in written
    assert "bert.encoder.layer.0.output.dense.weight_packed" in written
    ids = text(model, 1, 2)
    ours = loaded(model, lambda name: stored_value(model, name))(ids)[0]
    assert torch.allclose(stock(tmp_path / "out", "bert")(ids)[0], ours, atol=1e-4, rtol=1e-4)
    _require_read_back(tmp_path / "out", model)


@torch.no_grad()
def test_experts_without_tokens_are_counted(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "in", "mixtral")
    raw = json.loads((folder / "config.json").read_text()) | {"num_experts_per_tok": 1}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    router[1], router[2:] = -router[0], 0  # one of the first two is always above the others
    write_weights(folder, tensors)
    original = load(folder)
    model, context = quantized(original, STEPS["gptq-symmetric"].resolve(original, ("folder",)))
    counted = {finding.code: finding for finding in context.findings}
    assert counted["experts-without-tokens"].message.startswith("6 of 24 matrices saw no calibration token")
    starved = [layer for layer in context.reports[0].layers if not layer.tokens]
    assert {layer.name.split(".w")[0] for layer in starved} == {
        f"model.layers.1.mlp.experts.{i}" for i in (2, 3)
    }
    assert all(layer.error <= 1.0001 * layer.rtn_error for layer in starved)
    assert set(model.quantized) == set(model.linears)


def test_experts_with_zeros_are_refused_before_work_starts(tmp_path: Path) -> None:
    original = load(write_tiny(tmp_path, "qwen3_moe"))
    with pytest.raises(UnsupportedError, match=r"packed experts without zeros alone; use symmetric: true"):
        Gptq(symmetric=False).resolve(original, ("folder",))
    assert all(rung.symmetric for rung in ladder(original, ("folder",)))


def _require_read_back(out: Path, model: Model) -> None:
    """Our own reader finds every tensor as it was stored."""
    back = read_folder(out)
    assert set(back.checkpoint.entries) == set(model.checkpoint.entries)
    assert all(torch.equal(back.weight(name), stored_value(model, name)) for name in back.checkpoint.entries)
