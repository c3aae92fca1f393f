"""Learned blocks in the walk: kept where they help, told in the reports, the same after a break."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from judged import applied, context
from pocketsize.measurement.suite import divergence
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.walk import walk
from pocketsize.quantization.grid import QWeight
from pocketsize.recipes import learn, stages
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.step import Context
from tiny import FAMILIES, VOCAB, write_tiny

STEPS = 8


pytestmark = pytest.mark.usefixtures("small_batches")


def learned_shares(model: Model, ctx: Context) -> list[float | None]:
    """What the learned stage tells of each matrix, whether or not it was kept."""
    units = [ctx.store.beside("learned").finished(path) for path in model.blocks]
    return [layer.learned for unit in units for layer in unit or ()]


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_in_every_family(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", family))
    if model.arch.refuses:
        pytest.skip(model.arch.refuses)
    ctx = context(tmp_path / "work", padded=True)
    done = applied(model, ctx, Gptq("W3A16", group=32, symmetric=True, learn=STEPS))
    shares = learned_shares(model, ctx)
    assert len(shares) == len(model.linears) == len(done.quantized)
    assert all(share is not None and 0 < share <= 1 for share in shares)
    assert any(share is not None and share < 1 for share in shares)


@pytest.mark.parametrize("scheme", ["W3A16", "W2A16"])
def test_blocks_end_nearer_to_the_original(scheme: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", "llama"))
    ctx = context(tmp_path / "work", windows=48)
    applied(model, ctx, Gptq(scheme, learn=40))
    plain, learned = (ctx.store.beside(name).weights() for name in ("gptq", "learned"))
    other = torch.randint(5, VOCAB - 1, (16, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(other, dtype=torch.bool)

    def distance(quantized: Mapping[str, QWeight]) -> float:
        weights = {name: quantized[name].dequantize() for name in model.linears}
        for site in walk(model, other, mask, beside=True):
            site.replaced = {name: weights[name] for name in site.names}
            if site.whole is not None:
                for name, W in site.replaced.items():
                    site.whole.put(name.removeprefix(f"{site.block}."), W)
                with torch.no_grad():
                    found = sum(float(site.whole.loss(i)) for i in range(len(site.whole.calls)))
        return found

    assert distance(learned) < 0.97 * distance(plain)


def test_a_block_that_gains_nothing_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(write_tiny(tmp_path / "model", "llama"))
    plain = applied(model, context(tmp_path / "plain"), Gptq())
    monkeypatch.setattr(learn, "judged", lambda whole, numbers: 1.0)
    ctx = context(tmp_path / "work")
    same = applied(model, ctx, Gptq(learn=STEPS))
    assert {*learned_shares(model, ctx)} == {1.0}
    for name in model.linears_of(model.blocks[0]):
        assert torch.equal(same.quantized[name].codes, plain.quantized[name].codes)


@pytest.mark.parametrize(("gptq", "learned"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)])
def test_a_stage_is_kept_only_where_the_model_comes_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gptq: float, learned: float
) -> None:
    model, told = load(write_tiny(tmp_path / "model", "llama")), iter((gptq, learned))
    monkeypatch.setattr(stages, "divergence", lambda *_: next(told))
    ctx = context(tmp_path / "work")
    done = applied(model, ctx, Gptq("W2A16", learn=STEPS))
    (report,) = ctx.reports
    assert [s.divergence for s in report.stages] == [gptq, learned]
    assert [s.kept for s in report.stages] == [True, learned < gptq]
    best = ctx.store.beside("learned" if learned < gptq else "gptq").weights()
    assert all(_same(done.quantized[name], best[name]) for name in model.linears)
    assert all((layer.learned is not None) == (learned < gptq) for layer in report.layers)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_stages_are_judged_on_windows_that_did_not_teach(tmp_path: Path, family: str) -> None:
    model, ctx = load(write_tiny(tmp_path / "model", family)), context(tmp_path / "work")
    applied(model, ctx, Gptq("W2A16", learn=STEPS))
    ids, mask = ctx.input_ids[12:], ctx.mask[12:]
    for stage in ctx.reports[0].stages:
        small = model.with_quantized(ctx.store.beside(stage.name).weights())
        assert stage.divergence == pytest.approx(divergence(model, small, ids, mask))
    lowest = min(stage.divergence for stage in ctx.reports[0].stages)
    assert [stage for stage in ctx.reports[0].stages if stage.kept][-1].divergence == lowest


def test_too_little_text_to_judge_is_told(tmp_path: Path) -> None:
    model, ctx = load(write_tiny(tmp_path / "model", "llama")), context(tmp_path / "work", 12)
    done = applied(model, ctx, Gptq(learn=STEPS))
    plain = applied(model, context(tmp_path / "plain", 12), Gptq())
    (found,) = (f for f in ctx.findings if f.code == "few-windows")
    assert found.message == (
        "gptq: every 4th batch of calibration windows judges; of 3 batches none does: nothing was "
        "learned; give 16 (sequences)"
    )
    assert all(_same(done.quantized[name], plain.quantized[name]) for name in model.linears)


@pytest.mark.parametrize("units", [1, 3])
def test_goes_on_after_a_break_with_the_same_bits(tmp_path: Path, units: int) -> None:
    model, step = load(write_tiny(tmp_path / "model", "llama")), Gptq("W3A16", learn=STEPS)
    whole = applied(model, context(tmp_path / "whole"), step)

    def stop(done: int, total: int, what: str) -> None:
        assert total == 2 * len(model.blocks)
        if done == units:
            raise KeyboardInterrupt

    broken = context(tmp_path / "broken")
    broken.progress = stop
    with pytest.raises(KeyboardInterrupt):
        applied(model, broken, step)
    again = context(tmp_path / "broken")
    assert again.store.beside("gptq").finished(model.blocks[0]) is not None
    resumed = applied(model, again, step)
    assert all(_same(resumed.quantized[name], whole.quantized[name]) for name in model.linears)
    assert again.reports[0].layers == _reports(model, tmp_path / "once more", step)


def _reports(model: Model, folder: Path, step: Gptq) -> object:
    ctx = context(folder)
    applied(model, ctx, step)
    return ctx.reports[0].layers


def _same(one: QWeight, other: QWeight) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
