"""Recipe step `smoothquant`, and what else knows of rounded inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.measurement.embedding import embedding_quality
from pocketsize.measurement.tokens import compare
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes.journal import Journal, open_journal
from pocketsize.recipes.quantize import Gptq, Rtn
from pocketsize.recipes.recipe import Data, parse_step
from pocketsize.recipes.smooth import SmoothQuant
from pocketsize.recipes.step import Context, Step
from pocketsize.recipes.texts import Texts, read_texts
from tiny import write_texts, write_tiny

NORMS = ("input_layernorm", "post_attention_layernorm")


def loud(folder: Path, family: str = "llama", factor: float = 40.0) -> Model:
    """A model whose norms make a few inputs much louder than the others, and weights as much quieter."""
    write_tiny(folder, family)
    held = load_file(folder / "model.safetensors")
    for name in held:
        if name.endswith(tuple(f"{norm}.weight" for norm in NORMS)):
            held[name][::20] *= factor
        if name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        ):
            held[name][:, ::20] /= factor
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


def texts(folder: Path, model: Model) -> Texts:
    calibrate, evaluate = write_texts(folder)
    data = Data((calibrate,), (evaluate,), sequences=8, length=32, tokens=512)
    return read_texts(data, folder, model)


def done(model: Model, step: Step, found: Texts, work: Path) -> tuple[Model, Context, Journal]:
    journal = open_journal(work, {})
    ctx = Context(found.calibrate.input_ids, found.calibrate.mask, journal, lambda *_: None)
    return step.resolve(model, ("folder",)).apply(model, ctx), ctx, journal


def kl(model: Model, small: Model, found: Texts) -> float:
    return float(compare(model, small, found.evaluate, torch.float32).kl.mean())


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("word", ["W8A8", "FP8"])
def test_loud_inputs_are_smoothed_away(word: str, tmp_path: Path) -> None:
    model = loud(tmp_path / "model")
    found = texts(tmp_path, model)
    small, ctx, _ = done(model, SmoothQuant(word), found, tmp_path / "work")
    plain, *_ = done(model, Gptq(word), found, tmp_path / "plain")
    smoothed, unsmoothed = kl(model, small, found), kl(model, plain, found)
    assert smoothed < (0.3 if word == "W8A8" else 1) * unsmoothed
    assert small.rounds.keys() == set(model.linears) and ctx.reports[0].kind == "smoothquant"
    changed = [name for name in small.changed if name.endswith("layernorm.weight")]
    assert changed
    for name in changed:
        share = model.original(name) / small.changed[name]
        assert torch.equal(torch.exp2(torch.log2(share).round()), share)


def test_what_is_measured_rounds_inputs(tmp_path: Path) -> None:
    model = loud(tmp_path / "model")
    found = texts(tmp_path, model)
    with_inputs, *_ = done(model, Rtn("W8A8"), found, tmp_path / "a")
    weights_alone, *_ = done(model, Rtn("W8A16", group=None), found, tmp_path / "b")
    name = model.linears[0]
    assert torch.equal(with_inputs.weight(name), weights_alone.weight(name))
    assert kl(model, with_inputs, found) > 5 * kl(model, weights_alone, found)


def test_so_are_sentences(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", "bert"))
    found = texts(tmp_path, model)
    values = []
    for i, step in enumerate((Rtn("W8A8"), Rtn("W8A16", group=None))):
        small, *_ = done(model, step, found, tmp_path / str(i))
        rows = embedding_quality(model, small, found.corpus, seed=0).measurements
        values.append(next(row.value for row in rows if row.name == "one_minus_cosine"))
    assert values[0] > 1.1 * values[1]


def test_a_run_that_goes_on_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = loud(tmp_path / "model")
    found = texts(tmp_path, model)
    whole, *_ = done(model, SmoothQuant(), found, tmp_path / "whole")
    first = (tmp_path / "whole" / "journal").read_bytes().splitlines(keepends=True)[:2]
    (tmp_path / "part" / "objects").mkdir(parents=True)
    (tmp_path / "part" / "journal").write_bytes(b"".join(first))
    for path in (tmp_path / "whole" / "objects").iterdir():
        (tmp_path / "part" / "objects" / path.name).write_bytes(path.read_bytes())
    again, _, resumed = done(model, SmoothQuant(), found, tmp_path / "part")
    assert resumed.resumed == 1
    assert all(torch.equal(again.weight(n), whole.weight(n)) for n in model.checkpoint.entries)


def test_linears_that_round_nothing_may_stand_beside(tmp_path: Path) -> None:
    model = loud(tmp_path / "model")
    found = texts(tmp_path, model)
    others = {"*.v_proj": {"scheme": "W8A16", "group": None}, "*.down_proj": None}
    small, *_ = done(model, SmoothQuant(overrides=others), found, tmp_path / "work")
    assert not any("v_proj" in name or "down_proj" in name for name in small.rounds)
    assert not any("down_proj" in name for name in small.quantized)
    assert kl(model, small, found) < 0.05


def test_few_windows_smooth_nothing_and_say_so(tmp_path: Path) -> None:
    model = loud(tmp_path / "model")
    found = texts(tmp_path, model)
    ctx = Context(
        found.calibrate.input_ids[:3],
        found.calibrate.mask[:3],
        open_journal(tmp_path / "w", {}),
        lambda *_: None,
    )
    small = SmoothQuant().resolve(model, ("folder",)).apply(model, ctx)
    assert not small.changed and "few-windows" in {f.code for f in ctx.findings}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"smoothquant": {"scheme": "W4A16"}}, "W4A16 rounds no inputs"),
        ({"smoothquant": {"exponents": 0}}, "exponents must be at least 1"),
        ({"smoothquant": {"embeddings": "same"}}, "no loader rounds the inputs of a head"),
        ({"awq": {"scheme": "W8A8"}}, "it does not know of rounded inputs (W8A8); use smoothquant"),
        ({"hqq": {"overrides": {"*": {"scheme": "FP8"}}}}, "it does not know of rounded inputs (FP8)"),
        ({"gptq": {"scheme": "W8A8", "learn": 5}}, "no gradient passes the rounding of inputs"),
        ({"gptq": {"scheme": "W8A8", "group": 32}}, "W8A8 has null"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(raw: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_step(raw)
    assert said in str(caught.value)


def test_a_family_in_which_nothing_can_be_smoothed_is_refused(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "phi3"))
    if all(group.fed_by is None for group in model.arch.groups):
        with pytest.raises(UnsupportedError, match="smoothquant: in the family"):
            SmoothQuant().resolve(model, ("folder",))
