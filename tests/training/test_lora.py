"""Narrow corrections: what a plain loop over W + s B A learns, and nothing else of the model moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketsize as ps
from oracles.lora import trained_slow
from pocketsize.errors import UsageError
from pocketsize.exporting import table
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.training import loop
from pocketsize.training.examples import Batch
from pocketsize.training.loop import Pace, train
from pocketsize.training.lora import DOWN, UP, adapted, narrow_parameters
from pocketsize.training.objective import Losses, NextToken
from tiny import VOCAB, write_texts, write_tiny

SHORT = {"batch": 4, "length": 32, "rate": 1e-2, "lora": 4}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())


class Quiet:
    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop

    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None:
        if "loss" in what and done == self.stop:
            raise KeyboardInterrupt


class Nowhere:
    stopping = False

    def last(self) -> None:
        return None

    def save(self, *_: Any) -> None: ...

    def safe_point(self, where: str) -> None: ...


def data(tmp_path: Path) -> Data:
    calibrate, evaluate = write_texts(tmp_path)
    return Data((calibrate,), (evaluate,), sequences=4, length=32, tokens=256, written=0.0)


def batches(number: int) -> Batch:
    ids = torch.randint(5, VOCAB - 1, (2, 16), generator=torch.Generator().manual_seed(number))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), (0, 1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_a_plain_loop_over_whole_matrices(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    module = materialise(model)
    with adapted(module, model, 3, 6.0, seed=5) as adapters:
        begin = {
            name: (
                one.linear.get_parameter(DOWN).detach().clone(),
                one.linear.get_parameter(UP).detach().clone(),
            )
            for name, one in zip(model.linears, adapters, strict=True)
        }
        pace = Pace(steps=4, peak=1e-2, warmup=0.0, floor=1.0, decay=0.0, clip=1e9)
        train(module, NextToken(module, Losses(soft=0.0, hard=1.0)), batches, pace, Nowhere())
        learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert learned == narrow_parameters(model, 3)
    wanted = trained_slow(model, begin, 2.0, [batches(i).ids for i in range(4)], 1e-2)
    own = dict(module.named_parameters())
    assert not any("lora" in name for name in own)
    for name, W in wanted.items():
        torch.testing.assert_close(own[name], W, rtol=1e-2, atol=5e-4)
    moved = {name for name in wanted if not torch.equal(wanted[name], model.weight(name))}
    assert moved == {*model.linears}


def test_at_first_nothing_is_changed(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    module, ids = materialise(model), batches(0).ids
    before = module(ids).logits
    with adapted(module, model, 2, 4.0, seed=0):
        assert torch.equal(module(ids).logits, before)
    assert torch.equal(module(ids).logits, before)


def test_an_error_is_told_as_it_is_and_nothing_is_merged(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    module = materialise(model)
    before = module.get_parameter(model.linears[0]).clone()
    with pytest.raises(OSError, match="full"), adapted(module, model, 2, 4.0, seed=0) as adapters:
        for name, p in adapters[0].linear.named_parameters():
            p.data.add_(0.0 if name == "weight" else 1.0)
        raise OSError("full")
    assert torch.equal(module.get_parameter(model.linears[0]), before)


def test_zeros_of_a_pruned_model_stay(tmp_path: Path) -> None:
    said = {"structure": "unstructured", "share": 0.5}
    model = load(write_tiny(tmp_path / "m", "llama")).with_sparsity(said)
    g = torch.Generator().manual_seed(0)
    changed = {
        n: model.weight(n) * (torch.rand(model.weight(n).shape, generator=g) < 0.5) for n in model.linears
    }
    model = replace(model, changed=changed)
    module, changed = materialise(model), {name: W.clone() for name, W in changed.items()}
    with adapted(module, model, 2, 4.0, seed=0) as adapters:
        for one in adapters:
            one.linear.get_parameter(UP).data.normal_(generator=g)
        inside = module(batches(0).ids).logits
    for name, W in changed.items():
        own = module.get_parameter(name)
        assert torch.equal(own == 0, W == 0) and not torch.equal(own, W)
    torch.testing.assert_close(module(batches(0).ids).logits, inside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family,step", [("llama", Distill), ("llama", Finetune), ("mpnet", Distill)])
def test_what_comes_of_it_is_a_plain_model(family: str, step: Any, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", family)
    steps = [ps.Layers(keep=1, heal=False), step(tokens="3k", **SHORT)]
    done = ps.run(
        source,
        steps,
        out=tmp_path / "o",
        export=["folder"],
        data=data(tmp_path),
        console=Quiet(),
        dtype="fp32",
    )
    stored = open_checkpoint(tmp_path / "o")
    before = open_checkpoint(source)
    linears = load(tmp_path / "o").linears
    assert {n for n in stored.entries if not torch.equal(stored.read(n), before.read(n))} == {*linears}
    report = done.record.steps[1]
    assert report.options["lora"] == 4 and report.training is not None
    losses = [loss for _, loss in report.training.losses]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_new_head_for_classes_learns_whole(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "bert", classes=("a", "b")))
    module = materialise(model)
    with adapted(module, model, 2, 4.0, seed=0):
        learning = {name for name, p in module.named_parameters() if p.requires_grad}
    whole = {name for name in learning if "lora" not in name}
    assert "classifier.weight" in whole and all(n.startswith(("classifier.", "bert.pooler.")) for n in whole)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    steps = [ps.Layers(keep=1), Distill(tokens="2k", **SHORT)]
    ps.run(source, steps, out=tmp_path / "a", export=["folder"], data=given, console=Quiet())
    for stop in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            ps.run(source, steps, out=tmp_path / "b", export=["folder"], data=given, console=Quiet(stop))
        (kept,) = (tmp_path / ".b.work" / "drafts").rglob("*.safetensors")
        assert kept.stat().st_size < 0.3 * 12 * load(source).origin.parameters
    ps.run(source, steps, out=tmp_path / "b", export=["folder"], data=given, console=Quiet())
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_corrections_that_are_none_are_refused(tmp_path: Path) -> None:
    for options, why in (
        ({"lora": 0}, "lora is the rank of corrections, at least 1"),
        ({"alpha": 4.0}, "give lora, or leave it out"),
        ({"lora": 2, "alpha": 0.0}, "alpha must be above 0"),
    ):
        for step in (Distill, Finetune):
            with pytest.raises(UsageError, match=why):
                step(**options)
    model = load(write_tiny(tmp_path / "m", "llama"))
    with pytest.raises(UsageError, match="lora: 64 is no narrow correction; the matrices have rank 64"):
        Recipe("m", (Distill(lora=64),)).resolved(model)


def test_a_plan_knows_that_less_is_held(tmp_path: Path) -> None:
    from pocketsize.recipes.disk import written_bytes

    model = load(write_tiny(tmp_path / "m", "llama"))
    full, narrow = (Recipe("m", (Distill(tokens="1k", lora=r),)).resolved(model) for r in (None, 2))
    assert written_bytes(model, narrow).work_bytes < 0.4 * written_bytes(model, full).work_bytes
