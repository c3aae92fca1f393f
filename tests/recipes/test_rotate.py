"""Recipe step `rotate`: the model stays what it was, whoever reads it, and what comes after takes it up."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import pocketsize as ps
from pocketsize.cli.options import raw_steps
from pocketsize.errors import PocketsizeError, UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.load import load
from pocketsize.recipes import rotate as rotating
from pocketsize.recipes.recipe import Data, Recipe, parse_step
from pocketsize.recipes.rotate import Rotate
from tiny import write_texts, write_tiny

BOTH = Rotate(residual=True)
IDS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "both_formats" not in request.node.name:
        monkeypatch.setattr(table, "reload_check", lambda *_: ())


class Quiet:
    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...


def data(tmp_path: Path) -> Data:
    calibrate, evaluate = write_texts(tmp_path)
    return Data((calibrate,), (evaluate,), sequences=4, length=32, tokens=256, written=0.0)


def ran(tmp_path: Path, family: str, *steps: Any, out: str = "o", **options: Any) -> Any:
    source = tmp_path / "m"
    if not source.exists():
        write_tiny(source, family)
    options = {"export": ["folder"], "dtype": "fp32"} | options
    return ps.run(source, list(steps), out=tmp_path / out, data=data(tmp_path), console=Quiet(), **options)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("llama", BOTH),
        ("qwen2", BOTH),
        ("qwen3", Rotate(values=False, residual=True)),
        ("phi3", Rotate(values=False, residual=True)),
        ("gemma3_text", Rotate()),
        ("mixtral", Rotate()),
        ("opt", Rotate()),
        ("mpnet", Rotate()),
    ],
)
def test_a_turned_model_is_what_it_was_to_stock_transformers(
    family: str, step: Rotate, tmp_path: Path
) -> None:
    done = ran(tmp_path, family, step)
    encodes = family == "mpnet"
    found = done.measurements["one_minus_cosine" if encodes else "kl_mean"].value
    assert abs(found) < 1e-6
    auto = AutoModel if encodes else AutoModelForCausalLM
    stock, told = auto.from_pretrained(tmp_path / "o", output_loading_info=True)
    before = auto.from_pretrained(tmp_path / "m")
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        a, b = (model(IDS)[0] for model in (before, stock))
    assert torch.allclose(a, b, atol=5e-4)
    turned = {n for n, p in before.state_dict().items() if not torch.equal(p, stock.state_dict()[n])}
    assert turned
    assert (stock.config.tie_word_embeddings is False) >= step.residual
    codes = {finding.code for finding in done.record.findings}
    assert ("head-apart" in codes) is step.residual


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq", "hqq", "qat"])
def test_what_quantizes_takes_the_turned_model_up(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme": "W4A16", "embeddings": None}
    if method == "qat":
        options |= {"tokens": 256, "batch": 2, "length": 32, "scales": False}
    done = ran(tmp_path, "llama", BOTH, parse_step({method: options}), dtype="bf16")
    assert [step.kind for step in done.record.steps] == ["rotate", method]
    assert 0 < done.measurements["kl_mean"].value < 1
    assert all(check.ok for check in ps.verify(tmp_path / "o"))


def test_both_formats_hold_the_head_that_is_a_matrix_of_its_own(tmp_path: Path) -> None:
    done = ran(tmp_path, "llama", BOTH, ps.Gptq("W4A16"), export=["gguf", "folder"], dtype="bf16")
    assert all(check.ok for check in ps.verify(tmp_path / "o"))
    assert [a.format for a in done.record.artifacts] == ["gguf", "folder"]
    entries = open_checkpoint(tmp_path / "o").entries
    assert "lm_head.weight" in entries
    norms = [open_checkpoint(tmp_path / "o").read(n) for n in entries if "norm" in n]
    assert len(norms) == 5 and all(bool((norm == 1).all()) for norm in norms)
    gguf = next((tmp_path / "o").glob("*.gguf"))
    again = load(gguf)
    assert not again.tied and again.config.tie_word_embeddings is False


def test_a_plan_counts_the_head_that_the_residual_stream_needs(tmp_path: Path) -> None:
    steps = BOTH, ps.Gptq("W4A16")
    done = ran(tmp_path, "llama", *steps, export=["gguf", "folder"], dtype="bf16")
    plans = [
        ps.plan(
            str(tmp_path / "m"), some, out=tmp_path / "p", data=data(tmp_path), console=Quiet(),
            export=["gguf", "folder"],
        )
        for some in (steps, steps[1:])
    ]  # fmt: skip
    assert {a.format: a.bytes for a in done.record.artifacts} == {e.format: e.bytes for e in plans[0].exports}
    assert plans[0].exit_code == 0 and "was calibrated" in plans[0].rehearsal
    assert [stage.name for stage in plans[0].stages][:3] == ["load", "rotate", "gptq"]
    more = [plan.exports[1].bytes for plan in plans]
    assert more[0] - more[1] > 320 * 64 * 2 - 1000  # the head, in bf16
    assert (plans[0].peak_disk_bytes or 0) > (plans[1].peak_disk_bytes or 0)


def test_a_run_that_was_cut_off_goes_on_with_the_turned_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = BOTH, ps.Rtn("W4A16", embeddings=None)
    whole = ran(tmp_path, "llama", *steps, out="whole")
    assert whole.record.timing.resumed == 0
    real, cut = ps.Rtn.apply, RuntimeError("cut off")

    def fail(*_: object) -> None:
        raise cut

    monkeypatch.setattr(ps.Rtn, "apply", fail)
    with pytest.raises(RuntimeError, match="cut off"):
        ran(tmp_path, "llama", *steps)
    monkeypatch.setattr(ps.Rtn, "apply", real)
    monkeypatch.setattr(rotating, "write_safetensors", fail)  # it is there already
    done = ran(tmp_path, "llama", *steps)
    assert done.record.timing.resumed > 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_student_of_a_turned_model_finds_its_teachers_vectors_turned_alike(tmp_path: Path) -> None:
    learns = ps.Distill(tokens=128, batch=2, length=32, rate=1e-6, hidden=1.0)
    done = ran(tmp_path, "llama", BOTH, learns)
    training = done.record.steps[1].training
    assert training is not None and training.losses[0][1] < 1e-4  # hidden states of the teacher are its own


@pytest.mark.parametrize(
    ("family", "steps", "kind", "hint"),
    [
        ("gpt2", (Rotate(),), UnsupportedError, "no matrix of values of its own"),
        ("gemma2", (BOTH,), UnsupportedError, "cannot be turned; known for llama"),
        ("llama", (ps.Prune(), Rotate()), UnsupportedError, "rotate first, then prune"),
        ("llama", (ps.Layers(keep=1), Rotate(), ps.Distill(tokens="1k")), UsageError, "put rotate first"),
        ("llama", (BOTH, ps.Distill(teacher="m", hidden=1.0)), UsageError, "hidden states of m are not"),
        ("llama", (ps.Rtn(), Rotate()), UsageError, "put rtn last"),
    ],
)
def test_what_cannot_be_turned_is_refused_before_any_work(
    family: str, steps: tuple[Any, ...], kind: type[PocketsizeError], hint: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=hint):
        Recipe("m", steps).resolved(load(write_tiny(tmp_path / "m", family)))


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="both false"):
        Rotate(values=False)
    with pytest.raises(UsageError, match="seed"):
        Rotate(seed=-1)


@pytest.mark.parametrize(
    ("word", "step"),
    [("values", Rotate()), ("residual", Rotate(values=False, residual=True)), ("both", BOTH)],
)
def test_the_command_line_says_it_in_a_word(word: str, step: Rotate) -> None:
    command = importlib.import_module("pocketsize.cli.quantize").command
    context = command.make_context("quantize", ["m", "-o", "o", "--rotate", word])
    assert parse_step(raw_steps(**context.params, arch=pytest.fail)[0]) == step
