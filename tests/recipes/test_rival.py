"""Which dense grid pruned matrices are held against, and what is said of the two."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketsize.exporting import table
from pocketsize.models.load import load
from pocketsize.pruning.mask import highest
from pocketsize.pruning.pattern import Pattern
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes import rival
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.record import LayerReport, StepReport
from pocketsize.recipes.rival import beside_dense, denser, rivals, sparse_bits, whole_of
from pocketsize.recipes.step import Context
from runs import ran
from tiny import write_tiny


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())


def said(done: Any) -> dict[str, str]:
    return {f.code: f.message for f in done.record.findings if f.code.startswith(("dense", "sparse"))}


OWN = [
    # columns, how codes are stored, share of zeros, bits that takes, the rival: its width, group and bits
    (384, Scheme(4, 128), 0.5, 3.1562, (3, 128, 3.1484)),
    (576, Scheme(4, 96), 0.5, 3.2083, (3, 96, 3.1979)),
    (384, Scheme(4, 64), 0.5, 3.3125, (3, 64, 3.2969)),
    (384, Scheme(4, 64, symmetric=True), 0.5, 3.25, (3, 64, 3.25)),
    (384, Scheme(4, None, symmetric=True), 0.5, 3.0417, (3, None, 3.0417)),
    (384, Scheme(8, 128, symmetric=True), 0.5, 5.125, (5, 96, 5.1667)),
    (384, Scheme(4, 128), 0.53, 3.0362, (3, None, 3.0495)),
    (384, Scheme(4, 128), 0.05, 4.9562, (4, 32, 4.625)),
]


@pytest.mark.parametrize(("columns", "scheme", "zeros", "bits", "wanted"), OWN, ids=str)
def test_pruned_codes_are_held_against_the_most_bits_that_fit(
    columns: int, scheme: Scheme, zeros: float, bits: float, wanted: tuple[int, int | None, float]
) -> None:
    taken = sparse_bits(zeros, columns, scheme)
    found = rivals(taken, columns, scheme)[0]
    assert taken == pytest.approx(bits, abs=1e-4)
    assert (found.bits, found.group) == wanted[:2]
    assert found.bits_per_weight(columns) == pytest.approx(wanted[2], abs=1e-4)
    assert found.symmetric is scheme.symmetric


@pytest.mark.parametrize(
    ("zeros", "wanted"), [(0.5, (8, 32)), (0.6, (5, 32)), (0.75, (5, 128)), (0.945, (2, None))], ids=str
)
def test_pruned_numbers_are_held_against_the_most_bits_that_fit(
    zeros: float, wanted: tuple[int, int | None]
) -> None:
    found = rivals(sparse_bits(zeros, 384), 384)[0]
    assert (found.bits, found.group) == wanted
    assert rivals(1.9, 384) == []


def test_of_two_grids_of_about_as_many_bits_the_better_is_the_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bits in groups of 96, or 3 in those of 16 that the step has: whichever loses less."""
    W = torch.randn(8, 384, generator=torch.Generator().manual_seed(0))
    own = Scheme(4, 16)
    near = rivals(4.25, 384, own)
    assert [(s.bits, s.group) for s in near] == [(4, 96), (3, 16)]
    whole = rival._rounded
    for bad in near:

        def rounded(W: Tensor, H: Tensor | None, scheme: Scheme, bad: Scheme = bad) -> Tensor:
            return W * 0 if scheme == bad else whole(W, H, scheme)

        monkeypatch.setattr(rival, "_rounded", rounded)
        (other,) = [s for s in near if s != bad]
        assert beside_dense(W, W, None, 4.25, like=own)["rival_bits"] == round(other.bits_per_weight(384), 4)


@pytest.mark.parametrize(("lossless", "told"), [(16.0, 16.0), (5.85, 5.85)], ids=str)
def test_what_it_was_before_loses_nothing(lossless: float, told: float) -> None:
    """A twentieth of 16-bit weights: with a mask beside them they take more than they did."""
    W = torch.randn(8, 384, generator=torch.Generator().manual_seed(0))
    X = W * highest(W.abs(), Pattern(0.05))
    found = beside_dense(W, X, None, sparse_bits(0.05, 384), lossless=lossless)
    assert found["rival"] == 0 and found["rival_bits"] == told and found["rivalled"] > 0
    (finding,) = denser([report(0.05, 16.37, found)], "16-bit weights", known=True)
    assert finding.code == "dense-is-better"
    assert f"as they were they take {told:.2f} and lose nothing" in finding.message


def report(zeros: float, bits: float, told: Any) -> LayerReport:
    return LayerReport("a", 8, 384, 4, bits, 0.1, 0.1, zeros=zeros, **told)


@pytest.mark.parametrize(
    ("few", "share", "code"), [(False, 0.5, "dense-is-better"), (True, 0.75, "sparse-is-better")], ids=str
)
def test_the_verdict_where_it_is_clear(few: bool, share: float, code: str) -> None:
    """Normal weights are better dense; where three of four are next to nothing, they are better left out."""
    generator, scheme = torch.Generator().manual_seed(0), Scheme(4, 128)
    W = torch.randn(32, 384, generator=generator)
    if few:
        W *= torch.where(torch.rand(32, 384, generator=generator) < 0.75, 1e-3, 1.0)
    mask = highest(W.abs(), Pattern(share))
    X = rtn(W * mask, scheme, weight=torch.ones(384)).dequantize() * mask
    bits = sparse_bits(share, 384, scheme)
    found = beside_dense(W, X, torch.eye(384), bits, like=scheme)
    (finding,) = denser([report(share, bits, found)], "codes", known=True)
    assert finding.code == code
    assert f"{found['rival_bits']:.2f}" in finding.message


def test_codes_of_a_default_run_are_held_against_three_bits(tmp_path: Path) -> None:
    done = ran(write_tiny(tmp_path / "m", "llama"), tmp_path / "o", Prune(), Gptq())
    assert {round(layer.rival_bits) for layer in done.record.steps[1].layers if layer.zeros} == {3}
    assert list(said(done)) == ["dense-is-better"]


STEPS = (Prune(sparsity=0.6), Prune(score="magnitude"), Gptq())


@pytest.mark.parametrize(
    ("step", "marked"), [*product(STEPS, (True, False)), (Oats(), False)], ids=str
)  # `oats` refuses what is marked
def test_of_a_model_that_came_pruned_nothing_is_said(step: Any, marked: bool, tmp_path: Path) -> None:
    """What was taken from it is not known; others than us do not even say that something was."""
    source = write_tiny(tmp_path / "m", "llama")
    ran(source, tmp_path / "o", Prune(score="magnitude"))
    if not marked:
        config = json.loads((tmp_path / "o" / "config.json").read_text())
        del config["sparsity"]
        (tmp_path / "o" / "config.json").write_text(json.dumps(config))
    done = ran(tmp_path / "o", tmp_path / "again", step)
    assert all(layer.rival is None for layer in done.record.steps[0].layers)
    quantized = isinstance(step, Gptq)
    assert list(said(done)) == (["dense-unknown"] if marked or not quantized else [])


def test_what_follows_pruning_is_held_against_the_model_before_it(tmp_path: Path) -> None:
    source, codes = write_tiny(tmp_path / "m", "llama"), Gptq("W8A16", embeddings=None)
    done = ran(source, tmp_path / "o", Prune(sparsity=0.4, score="magnitude"), codes)
    for first, then in zip(*(step.layers for step in done.record.steps), strict=True):
        assert then.rivalled > 0.5 * first.rivalled > 0


def test_weights_that_learned_another_task_since_are_not_judged(tmp_path: Path) -> None:
    source = load(write_tiny(tmp_path / "m", "llama"))
    pruned = source.with_sparsity({"structure": "unstructured", "share": 0.5})
    ctx = Context(torch.ones(1, 8).long(), torch.ones(1, 8).bool(), None, lambda *_: None, whole=source)  # type: ignore[arg-type]
    for kinds, whole in (
        (["finetune", "prune"], source),
        (["prune", "distill"], source),
        (["prune", "finetune"], None),
    ):
        ctx.reports[:] = [StepReport(kind, {}) for kind in kinds]
        assert whole_of(pruned, ctx) is whole
    ctx.whole = None
    assert whole_of(pruned, ctx) is None and whole_of(source, ctx) is source
