from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import pocketsize as ps
from pocketsize.errors import (
    DataError,
    IntegrityError,
    NumericalError,
    ResourceError,
    Stopped,
    UnsupportedError,
    UsageError,
)
from pocketsize.exporting import table
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.depth import with_blocks
from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise
from pocketsize.recipes import journal as journals
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Rtn
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.recipes.run import prepare
from pocketsize.recipes.training import count_of
from pocketsize.training import loop
from pocketsize.training.recompute import recompute
from tiny import write_texts, write_tiny, write_weights

SHORT = {"batch": 4, "length": 32, "rate": 1e-3}


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one test needs a process that knows nothing of Pocketsize; it takes seconds to start."""
    if "stock" not in request.node.name:
        monkeypatch.setattr(table, "reload_check", lambda *_: ())


class Quiet:
    """A console that says nothing, and may stop the run at a step of a training."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.said = stop, list[str]()

    def phase(self, text: str) -> None:
        self.said.append(text)

    def progress(self, done: int, total: int, what: str) -> None:
        self.said.append(what)
        if self.stop and "loss" in what and done == self.stop:
            raise KeyboardInterrupt


def data(tmp_path: Path, **options: Any) -> Data:
    calibrate, evaluate = write_texts(tmp_path)
    return Data((calibrate,), (evaluate,), sequences=4, length=32, tokens=256, written=0.0, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    stored = open_checkpoint(folder)
    return {name: stored.read(name) for name in stored.entries}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mpnet"])
def test_a_shorter_student_learns_and_stock_transformers_loads_it(family: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", family)
    steps = [Layers(keep=1), Distill(tokens="4k", **SHORT)]
    done = ps.run(
        source,
        steps,
        out=tmp_path / "o",
        export=["folder"],
        data=data(tmp_path),
        console=Quiet(),
        dtype="fp32",
    )
    auto = AutoModelForCausalLM if family in ("llama", "gpt2") else AutoModel
    student = auto.from_pretrained(tmp_path / "o")
    assert student.config.num_hidden_layers == 1
    layers, report = done.record.steps
    assert layers.options["kept"] == [0] and report.training is not None
    assert report.training.tokens == report.tokens >= 3500 and report.training.teachers == ("m",)
    losses = [loss for _, loss in report.training.losses]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [t.role for t in done.record.texts] == ["calibrate", "evaluate", "train"]
    # Every tensor moved but none is lost.
    before, after = tensors(source), tensors(tmp_path / "o")
    assert {n for n in before if ".1." not in n} == {*after}


def test_a_run_killed_in_the_middle_of_an_epoch_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY_S", 0.0)  # a checkpoint after every step
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    steps = [Layers(keep=1), Distill(tokens="3k", **SHORT), Rtn()]
    whole = ps.run(source, steps, out=tmp_path / "a", export=["folder"], data=given, console=Quiet())
    for stop in (2, 7, 20):
        with pytest.raises(KeyboardInterrupt):
            ps.run(source, steps, out=tmp_path / "b", export=["folder"], data=given, console=Quiet(stop))
        assert not (tmp_path / "b").exists() and any((tmp_path / ".b.work" / "drafts").rglob("*.safetensors"))
    again = ps.run(source, steps, out=tmp_path / "b", export=["folder"], data=given, console=Quiet())
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert again.record.steps == whole.record.steps and again.record.timing.resumed >= 2
    assert not (tmp_path / ".b.work").exists()


def test_a_training_that_was_begun_is_not_thrown_away_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)

    def run(**options: Any) -> None:
        step = Distill(tokens="3k", **(SHORT | options))
        ps.run(source, [step], out=tmp_path / "o", export=["folder"], data=given, console=Quiet(3))

    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(IntegrityError, match=r"recipe.steps.0.distill.rate was '0.001' and is now '0.002'"):
        run(rate=2e-3)
    assert any((tmp_path / ".o.work" / "drafts").rglob("*.safetensors"))


def test_a_damaged_checkpoint_does_not_count(tmp_path: Path) -> None:
    course = open_journal(tmp_path / "w", {"a": "1"}).course("distill")
    course.save({"x": torch.arange(3.0)}, {"step": 1})
    course.save({"x": torch.arange(4.0)}, {"step": 2})
    (path,) = (tmp_path / "w" / "drafts" / "distill").glob("*.safetensors")
    journal = open_journal(tmp_path / "w", {"a": "1"})
    found = journal.course("distill").last()
    assert found is not None and found[1] == {"step": 2} and torch.equal(found[0]["x"], torch.arange(4.0))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert journal.course("distill").last() is None
    with pytest.raises(IntegrityError, match="a was '1' and is now '2'"):
        open_journal(tmp_path / "w", {"a": "2"})


def test_a_full_disk_during_a_checkpoint_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = open_journal(tmp_path / "w", {"a": "1"}).course("distill")
    course.save({"x": torch.arange(3.0)}, {"step": 1})

    def full(*_: object) -> str:
        raise ResourceError("no space left")

    monkeypatch.setattr(journals, "write_safetensors", full)
    with pytest.raises(ResourceError):
        course.save({"x": torch.arange(4.0)}, {"step": 2})
    found = course.last()
    assert found is not None and found[1] == {"step": 1}


def test_a_finished_model_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    made: list[str] = []

    def write(folder: Path) -> None:
        made.append(folder.name)
        (folder / "a").write_text("1")

    journal = open_journal(tmp_path / "w", {"a": "1"})
    place = journal.made("student", write, [])
    assert journal.made("student", write, []) == place and len(made) == 1
    assert open_journal(tmp_path / "w", {"a": "1"}).made("student", write, []) == place and len(made) == 1
    (place / "a").write_text("2")
    again = open_journal(tmp_path / "w", {"a": "1"}).made("student", write, [])
    assert again.joinpath("a").read_text() == "1" and len(made) == 2


def test_influence_keeps_the_ends_and_what_changes_most(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    config = json.loads((source / "config.json").read_text())
    # Four blocks, of which the second does nothing: its outputs are scaled to nearly zero.
    stored = tensors(source)
    for name in [n for n in stored if ".layers." in n]:
        for i in (2, 3):
            stored[name.replace(".0.", f".{i}.").replace(".1.", f".{i}.")] = stored[name].clone()
        if ".1." in name and ("o_proj" in name or "down_proj" in name):
            stored[name] *= 1e-3
    write_weights(source, stored)
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    done = ps.run(
        source,
        [Layers(keep=3, pick="influence")],
        out=tmp_path / "o",
        export=["folder"],
        data=data(tmp_path),
        console=Quiet(),
        dtype="fp32",
    )
    assert done.record.steps[0].options["kept"] == [0, 2, 3]
    after = tensors(tmp_path / "o")
    assert torch.equal(
        after["model.layers.1.mlp.up_proj.weight"], stored["model.layers.2.mlp.up_proj.weight"]
    )
    assert load(tmp_path / "o").config.num_hidden_layers == 3


def test_another_teacher_and_finetuning(tmp_path: Path) -> None:
    source, other = (write_tiny(tmp_path / n, "llama", seed=i) for i, n in enumerate(("m", "t")))
    given = data(tmp_path)
    outs = []
    for i, step in enumerate(
        [Distill(tokens="2k", teacher=str(other), **SHORT), Finetune(tokens="2k", **SHORT)]
    ):
        done = ps.run(source, [step], out=tmp_path / str(i), export=["folder"], data=given, console=Quiet())
        outs.append(done.record.steps[0])
    assert outs[0].training is not None and outs[0].training.teachers == ("t",)
    assert outs[1].training is not None and outs[1].training.teachers == ()


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_learns_to_stop_early_is_better_there(again: bool, tmp_path: Path) -> None:
    source, other = (write_tiny(tmp_path / n, "llama", seed=i) for i, n in enumerate(("m", "t")))
    losses = {}
    for name, keys in (("plain", {}), ("early", {"exits": "auto", "early": 2.0})):
        step = Distill(tokens="3k", teacher=str(other), recompute=again, **keys, **SHORT)
        done = ps.run(
            source, [step], out=tmp_path / name, export=["folder"], data=data(tmp_path), console=Quiet()
        )
        module, ids = materialise(with_blocks(load(tmp_path / name), [0])), torch.arange(5, 60)[None]
        with torch.no_grad():
            asked = materialise(load(other))(input_ids=ids).logits.softmax(-1)
            losses[name] = float(-(asked * module(input_ids=ids).logits.log_softmax(-1)).sum(-1).mean())
        assert done.record.steps[0].options["exits"] == ((0,) if keys else None)
    assert losses["early"] < losses["plain"] - 0.01


def test_a_family_that_cannot_compute_again_is_told(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "squeezebert"))
    with pytest.raises(UnsupportedError, match="keeps all activations of a squeezebert"):
        recompute(materialise(model))


def test_exits_that_a_model_cannot_learn_are_refused(tmp_path: Path) -> None:
    llama, gpt2, bert = (load(write_tiny(tmp_path / f, f)) for f in ("llama", "gpt2", "bert"))
    with pytest.raises(UsageError, match="distill: exits: 1; the model has 2 blocks"):
        Distill(exits=(0, 1)).resolve(llama, ("folder",))
    with pytest.raises(UnsupportedError, match="bert predicts no tokens; keep fewer blocks"):
        Finetune(exits=(0,)).resolve(bert, ("folder",))
    with pytest.raises(UnsupportedError, match=r"a gpt2 has no transformer\.norm to read"):
        Distill(exits=(0,)).resolve(gpt2, ("folder",))
    assert Finetune(exits="auto").resolve(llama, ("folder",)).exits == (0,)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            Distill(tokens=2048, rate=0.99, clip=1e30, batch=4, length=32),
            "text that it read.*from its teacher",
        ),
        (
            Finetune(tokens=2048, rate=0.99, clip=1e30, batch=4, length=32),
            "text that it read.*predicts it worse",
        ),
        (Distill(tokens=2048, rate=0.99, clip=1e30, batch=4, length=32, patience=50), "held-out text"),
        (Distill(tokens=2048, rate=1e-3, batch=4, length=32), ""),
        (Finetune(tokens=2048, rate=1e-3, batch=4, length=32, patience=50), ""),
    ],
    ids=str,
)
def test_a_training_that_made_a_model_worse_is_told(step: Any, said: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    steps = [Layers(keep=1), step]
    done = ps.run(source, steps, out=tmp_path / "o", export=["folder"], data=data(tmp_path), console=Quiet())
    report = done.record.steps[1].training
    assert report is not None and len(report.judged) == 2
    assert (report.judged[1] > report.judged[0]) is bool(said)
    told = [f.message for f in done.record.findings if f.code == "training-worse"]
    assert len(told) == bool(said)
    if said:
        assert re.search(said, told[0]) and f"{report.judged[1]:.4g} after" in told[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"hidden": 1e38}, "look at hidden: 1e[+]38"), ({"temperature": 1e-42}, "look at temperature: 1e-42")],
)
def test_where_no_step_was_ever_finite_the_rate_is_not_blamed(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    steps = [Layers(keep=1), Distill(tokens="4k", **SHORT, **options)]
    with pytest.raises(NumericalError, match=f"the rate is not the cause: {said}"):
        ps.run(source, steps, out=tmp_path / "o", data=data(tmp_path), console=Quiet())


def test_windows_that_the_model_cannot_read_are_told(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    positions = load(source).positions
    recipe = Recipe(str(source), (Finetune(tokens=100, length=positions + 1),), data=data(tmp_path))
    told = [f.message for f in prepare(recipe)[2].findings if f.code == "shorter-windows"]
    wanted = f"finetune: windows of {positions} tokens instead of {positions + 1}: the model reads no more"
    assert told == [wanted]
    recipe = replace(recipe, steps=(Finetune(tokens=100, length=positions),))
    assert not [f for f in prepare(recipe)[2].findings if f.code == "shorter-windows"]


def test_text_that_was_read_too_often_is_told(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    few = tmp_path / "few.txt"
    few.write_text("One two three four five six seven eight nine ten. " * 20)
    given = data(tmp_path, train=(str(few),))
    step = Distill(epochs=5.0, **SHORT)
    done = ps.run(source, [step], out=tmp_path / "o", export=["folder"], data=given, console=Quiet())
    assert [f.code for f in done.record.findings].count("repeated-training-text") == 1
    report = done.record.steps[0].training
    assert report is not None and report.epochs == pytest.approx(5.0)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(DataError, match="is empty; give a file with text in it"):
        ps.run(source, [step], out=tmp_path / "p", data=replace(given, train=(str(empty),)), console=Quiet())


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Layers(), "keep is how many blocks stay"),
        (lambda: Layers(keep=(1, 0)), "rising, each once"),
        (lambda: Layers(keep=1, pick="evn"), "did you mean"),
        (lambda: Distill(tokens="2M", epochs=1.0), "one budget; keep one of tokens and epochs"),
        (lambda: Distill(tokens="two"), "tokens is a number such as 500k or 2M, got 'two'"),
        (lambda: Distill(loss="forwrd_kl"), "did you mean 'forward_kl'"),
        (lambda: Distill(loss="js", mix=2.0), "mix must lie between 0 and 1"),
        (lambda: Distill(temperature=0.0), "temperature must be above 0"),
        (lambda: Distill(weigh="best"), "weigh is equal or loss"),
        (lambda: Distill(soft=-1.0), "soft must be a number from 0 upwards"),
        (lambda: Distill(rate=2.0), "rate must be auto or lie between 0 and 1"),
        (lambda: Distill(batch=0), "batch must be above 0"),
        (lambda: Finetune(patience=-1), "patience must be a whole number"),
        (lambda: Finetune(precision="fp16"), "precision is one of auto, fp32, bf16, got 'fp16'"),
        (lambda: Finetune(exits=(3, 1)), "finetune: exits lists numbers of blocks, rising"),
        (lambda: Distill(exits=3), "exits is auto or a list of numbers of blocks, got 3"),
        (lambda: Distill(exits=(1,), early=0.0), "distill: early must be above 0"),
        (lambda: Distill(early=2.0), "early is what the loss behind exits counts; name exits"),
        (lambda: Finetune(average=1.0), "average must be null or lie between 0 and 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        make()


def test_what_a_model_cannot_have_is_refused_before_work(tmp_path: Path) -> None:
    llama, bert = (load(write_tiny(tmp_path / f, f)) for f in ("llama", "bert"))
    for step, word in (
        (Layers(keep=3), "keep asks for 3 blocks; the model has 2"),
        (Layers(keep=(0, 5)), "keep asks for block 5; the model has 2"),
        (Layers(keep=2), "leaves nothing out"),
    ):
        with pytest.raises(UsageError, match=word):
            Recipe("m", (step,)).resolved(llama)
    with pytest.raises(UsageError, match="name labelled text as `train`"):
        Recipe("m", (Finetune(),)).resolved(bert)
    with pytest.raises(UnsupportedError, match="has no true tokens"):
        Recipe("m", (Distill(hard=1.0),)).resolved(bert)
    with pytest.raises(UsageError, match="distill after rtn would undo it; put rtn last"):
        Recipe("m", (Rtn(), Distill()))
    with pytest.raises(UsageError, match="distill is there twice"):
        Recipe("m", (Distill(), Distill()))
    resolved = Recipe("m", (Layers(keep=1), Distill())).resolved(llama)
    assert resolved.steps[1].tokens == 2_000_000 and len(resolved.outline(llama).blocks) == 1  # type: ignore[attr-defined]


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    source, other = write_tiny(tmp_path / "m", "llama"), write_tiny(tmp_path / "t", "llama")
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    merged = {token for pair in raw["model"]["merges"] for token in pair} | {
        "".join(pair) for pair in raw["model"]["merges"]
    }
    name = next(t for t in vocabulary if t not in merged and len(t) == 1)
    vocabulary["neverseen"] = vocabulary.pop(name)
    (other / "tokenizer.json").write_text(json.dumps(raw))
    step = Distill(tokens="1k", teacher=str(other), **SHORT)
    with pytest.raises(UnsupportedError, match="is none of the teacher's; both need one tokenizer"):
        ps.run(source, [step], out=tmp_path / "o", export=["folder"], data=data(tmp_path), console=Quiet())


def test_counts_are_read_as_people_write_them() -> None:
    assert [count_of(t) for t in ("2M", "500k", "1.5m", 7, "3")] == [2_000_000, 500_000, 1_500_000, 7, 3]


def test_a_stop_ends_the_training_at_its_next_step(tmp_path: Path) -> None:
    class Stopping(Quiet):
        def progress(self, done: int, total: int, what: str) -> None:
            if "loss" in what and done == 3:
                os.kill(os.getpid(), signal.SIGINT)

    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    steps = [Distill(tokens="3k", **SHORT)]
    with pytest.raises(Stopped, match="after step 3 of the training; nothing is lost"):
        ps.run(source, steps, out=tmp_path / "o", export=["folder"], data=given, console=Stopping())
    done = ps.run(source, steps, out=tmp_path / "o", export=["folder"], data=given, console=Quiet())
    assert done.record.timing.resumed >= 1


@pytest.mark.parametrize(("tokens", "looks"), [("450", 4), ("1k", 4), ("6k", 4)])
def test_a_short_training_has_four_looks_at_what_judges(tokens: str, looks: int, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    step = Distill(tokens=tokens, batch=2, length=32, patience=9)
    done = ps.run(source, [step], out=tmp_path / "o", export=["folder"], data=data(tmp_path), console=Quiet())
    (report,) = done.record.steps
    assert report.training is not None and 3 <= len(report.training.looks) <= looks
