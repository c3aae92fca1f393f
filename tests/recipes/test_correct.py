"""GPTAQ's and FOEM's terms in the walk: a stage of their own, refused where they mean nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from judged import applied, context
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.measurement.suite import divergence
from pocketsize.models.load import load
from pocketsize.quantization.grid import QWeight
from pocketsize.recipes import correct, stages
from pocketsize.recipes.disk import written_bytes
from pocketsize.recipes.memory import Size
from pocketsize.recipes.memory import stages as memory_stages
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.recipe import Data, Recipe
from tiny import FAMILIES, write_tiny

TERMS = {"alpha": {"alpha": 0.5}, "beta": {"beta": 0.2}, "both": {"alpha": 0.5, "beta": 0.2}}


pytestmark = pytest.mark.usefixtures("small_batches")


def same(one: QWeight, other: QWeight) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_corrects_in_every_family(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", family))
    if model.arch.refuses:
        pytest.skip(model.arch.refuses)
    step = Gptq("W2A16", group=32, symmetric=True, alpha=0.5, beta=0.1)
    if model.arch.experts is not None:
        with pytest.raises(UnsupportedError, match=r"alpha: experts of a .*use alpha: 0"):
            applied(model, context(tmp_path / "work"), step)
        step = replace(step, alpha=0.0)
    ctx = context(tmp_path / "work", padded=True)
    done = applied(model, ctx, step)
    assert len(done.quantized) == len(model.linears)
    assert [stage.name for stage in ctx.reports[0].stages] == ["gptq", "corrected"]
    assert ctx.reports[0].options["beta"] == 0.1


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_the_stage_before_is_plain_gptq_to_the_bit(terms: dict[str, Any], tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", "llama"))
    plain = applied(model, context(tmp_path / "plain"), Gptq("W3A16"))
    ctx = context(tmp_path / "work")
    applied(model, ctx, Gptq("W3A16", **terms))
    first, second = (ctx.store.beside(name).weights() for name in ("gptq", "corrected"))
    assert all(same(first[name], plain.quantized[name]) for name in model.linears)
    assert not all(same(first[name], second[name]) for name in model.linears)


def test_nothing_is_made_up_for_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = load(write_tiny(tmp_path / "model", "llama")), list[int]()
    real = correct.made_up_for
    monkeypatch.setattr(correct, "made_up_for", lambda *a, **k: called.append(1) or real(*a, **k))
    applied(model, context(tmp_path / "plain"), Gptq("W3A16"))
    applied(model, context(tmp_path / "beta"), Gptq("W3A16", beta=0.2))
    assert not called
    applied(model, context(tmp_path / "alpha"), Gptq("W3A16", alpha=0.2))
    assert len(called) == len(model.blocks) * len(model.groups)


@pytest.mark.parametrize(("plain", "corrected"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)])
def test_kept_only_where_the_model_comes_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: float, corrected: float
) -> None:
    model, told = load(write_tiny(tmp_path / "model", "llama")), iter((plain, corrected))
    monkeypatch.setattr(stages, "divergence", lambda *_: next(told))
    ctx = context(tmp_path / "work")
    done = applied(model, ctx, Gptq("W2A16", alpha=1.0, beta=0.2))
    assert [s.kept for s in ctx.reports[0].stages] == [True, corrected < plain]
    best = ctx.store.beside("corrected" if corrected < plain else "gptq").weights()
    assert all(same(done.quantized[name], best[name]) for name in model.linears)


@pytest.mark.parametrize("corrected", [1.0, 3.0])
def test_learning_begins_at_the_better_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrected: float
) -> None:
    model, told = load(write_tiny(tmp_path / "model", "llama")), iter((2.0, corrected, 0.5, 2.0, 0.5))
    monkeypatch.setattr(stages, "divergence", lambda *_: next(told))
    ctx, other = context(tmp_path / "work"), context(tmp_path / "other")
    done = applied(model, ctx, Gptq("W2A16", alpha=1.0, learn=4))
    assert [s.name for s in ctx.reports[0].stages if s.kept][-1] == "learned"
    plainly = applied(model, other, Gptq("W2A16", learn=4))
    equal = [same(done.quantized[name], plainly.quantized[name]) for name in model.linears]
    assert all(equal) == (corrected > 2.0)


def test_judged_on_windows_that_made_up_for_nothing(tmp_path: Path) -> None:
    model, ctx = load(write_tiny(tmp_path / "model", "llama")), context(tmp_path / "work")
    applied(model, ctx, Gptq("W2A16", alpha=0.5))
    for stage in ctx.reports[0].stages:
        small = model.with_quantized(ctx.store.beside(stage.name).weights())
        assert stage.divergence == pytest.approx(divergence(model, small, ctx.input_ids[12:], ctx.mask[12:]))


def test_too_little_text_to_judge_is_told(tmp_path: Path) -> None:
    model, ctx = load(write_tiny(tmp_path / "model", "llama")), context(tmp_path / "work", 12)
    done = applied(model, ctx, Gptq(alpha=0.5, learn=4))
    plain = applied(model, context(tmp_path / "plain", 12), Gptq())
    (found,) = (f for f in ctx.findings if f.code == "few-windows")
    assert found.message.endswith("nothing was corrected or learned; give 16 (sequences)")
    assert all(same(done.quantized[name], plain.quantized[name]) for name in model.linears)


def test_the_zeros_of_a_pruned_model_stay(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", "llama"))
    ctx = context(tmp_path / "work")
    pruned = Prune(score="wanda").resolve(model, ("folder",)).apply(model, ctx)
    made = context(tmp_path / "made")
    applied(pruned, made, Gptq("W4A16", group=32, alpha=1.0, beta=0.1))
    found = made.store.beside("corrected").weights()
    for name in model.linears:
        assert not bool(found[name].dequantize()[pruned.matrix(name) == 0].any())


@pytest.mark.parametrize("units", [1, 2, 3])
def test_goes_on_after_a_break_with_the_same_bits(tmp_path: Path, units: int) -> None:
    model, step = load(write_tiny(tmp_path / "model", "llama")), Gptq("W3A16", alpha=0.5, beta=0.2)
    whole = context(tmp_path / "whole")
    applied(model, whole, step)

    def stop(done: int, total: int, what: str) -> None:
        assert total == 2 * len(model.blocks)
        if done == units:
            raise KeyboardInterrupt

    broken = context(tmp_path / "broken")
    broken.progress = stop
    with pytest.raises(KeyboardInterrupt):
        applied(model, broken, step)
    again = context(tmp_path / "broken")
    applied(model, again, step)
    one, other = (ctx.store.beside("corrected").weights() for ctx in (whole, again))
    assert all(same(one[name], other[name]) for name in model.linears)
    assert again.reports[0].layers == whole.reports[0].layers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 1.5}, "alpha must lie between 0 and 1, got 1.5"),
        ({"alpha": -0.1}, "alpha must lie between 0 and 1, got -0.1"),
        ({"beta": 1.0}, "beta must be at least 0 and below 1, got 1.0"),
        ({"scheme": "W8A8", "alpha": 0.25}, "the original rounds no inputs, W8A8 does; use alpha: 0"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Gptq(**options)


def test_memory_and_disk_count_the_original_and_the_second_stage(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", "llama"))
    size = Size(windows=64, written=0, length=64, evaluated=256)
    text = Data(sequences=4, length=64, tokens=256)
    plain, alpha, beta = (
        Recipe(str(model.folder), (step,), ("folder",), text).resolved(model)
        for step in (Gptq(), Gptq(alpha=0.25), Gptq(beta=0.2))
    )
    needed = [
        memory_stages(model, recipe, size, base_bytes=0, waiting=1000.0)[0].ram_bytes
        for recipe in (plain, alpha, beta)
    ]
    assert needed[2] == needed[0] < needed[1] < 1.5 * needed[0]
    work = [written_bytes(model, recipe).work_bytes for recipe in (plain, alpha, beta)]
    assert work == [work[0], 2 * work[0], 2 * work[0]]
