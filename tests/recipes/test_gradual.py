"""A model is pruned while it is trained, stock transformers loads it, and what follows keeps its zeros."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import pocketsize as ps
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.recipe import Data, Recipe, parse_recipe
from pocketsize.training import loop
from quiet import Quiet
from tiny import write_texts, write_tiny, write_weights

SHORT: dict[str, Any] = {"tokens": "2k", "batch": 4, "length": 32, "rate": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.8},
    "movement": {"sparsity": 0.8, "method": "movement", "scope": "model"},
    "soft": {"sparsity": 0.8, "method": "soft_movement", "scope": "model", "score_rate": 0.2},
    "rigl": {"pattern": "2:4", "method": "rigl", "begin": 0.0},
    "labels": {"sparsity": 0.8, "cycles": 2, "soft": 0.0, "hard": 1.0},
}


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one test needs a process that knows nothing of Pocketsize; it takes seconds to start."""
    if "stock" not in request.node.name:
        monkeypatch.setattr(table, "reload_check", lambda *_: ())


def data(tmp_path: Path, **options: Any) -> Data:
    calibrate, evaluate = write_texts(tmp_path)
    return Data((calibrate,), (evaluate,), sequences=4, length=32, tokens=256, written=0.0, **options)


def labelled(path: Path, count: int = 120) -> str:
    draw = random.Random(0)
    words = {"animal": ("fox", "dog", "lazy"), "maths": ("weight", "grid", "error")}
    rows = [(name, " ".join(draw.choices(words[name], k=6))) for _ in range(count // 2) for name in words]
    path.write_text("\n".join(json.dumps({"text": text, "label": name}) for name, text in rows))
    return str(path)


def ran(source: Path, steps: list[Any], out: Path, given: Data, stop: int = 0) -> ps.Result:
    return ps.run(source, steps, out=out, export=["folder"], data=given, console=Quiet(stop), dtype="fp32")


def linears(model: Model) -> dict[str, Tensor]:
    return {name: model.weight(name) for name in model.linears}


@pytest.mark.parametrize("name", METHODS)
def test_a_pruned_model_is_a_plain_one_with_zeros(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    step = Gradual(**SHORT, **METHODS[name])
    done = ran(source, [step], tmp_path / "o", data(tmp_path))
    model = load(tmp_path / "o")
    zeros = {n: int((W == 0).sum()) for n, W in linears(model).items()}
    total = sum(W.numel() for W in linears(model).values())
    share = step.goal().sparsity
    if step.scope == "model":
        assert sum(zeros.values()) == round(total * share)
    else:
        assert all(zeros[n] == round(W.numel() * share) for n, W in linears(model).items())
    assert model.pattern is not None and model.pattern.name == step.pattern
    assert model.pattern.sparsity == pytest.approx(sum(zeros.values()) / total, abs=1e-6)
    assert bool((model.weight(model.arch.embedding) != 0).all())
    report = done.record.steps[0].training
    assert report is not None and {z.name: z.zeros for z in report.zeros} == zeros
    assert report.pruned[-1] == (float(report.steps), sum(zeros.values()) / total)
    assert report.teachers == (() if name == "labels" else ("m",))
    assert ("they went from step" in (page := (tmp_path / "o" / "report.html").read_text())) == (
        name not in ("rigl", "soft")
    )
    assert "Of the weights of its linears" in page
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert found.config.sparsity["structure"] == step.pattern


def test_a_pruned_model_opens_in_stock_transformers(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "gpt2")
    ran(source, [Gradual(pattern="2:4", **SHORT)], tmp_path / "o", data(tmp_path))
    for name, W in linears(load(tmp_path / "o")).items():
        rows = W.T if load(tmp_path / "o").arch.is_transposed(name) else W
        assert bool(((rows != 0).reshape(-1, 4).sum(1) == 2).all()), name


def test_what_is_not_zero_is_all_that_is_stored(tmp_path: Path) -> None:
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    step = Gradual(**SHORT, **METHODS["movement"])
    sizes = {}
    for form in ("folder", "sparse"):
        out = tmp_path / form
        done = ps.run(source, [step], out=out, export=[form], data=given, console=Quiet(), dtype="fp32")
        sizes[form] = done.record.artifacts[0].bytes
    both = [linears(load(tmp_path / form)) for form in ("folder", "sparse")]
    assert all(torch.equal(W, both[1][name]) for name, W in both[0].items())
    saved = sum(4 * int((W == 0).sum()) - W.numel() / 8 for W in both[0].values())
    assert sizes["folder"] - sizes["sparse"] > 0.9 * saved


def test_all_that_follows_keeps_the_zeros(tmp_path: Path) -> None:
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    prune = Gradual(sparsity=0.7, method="movement", scope="model", **SHORT)
    steps = [prune, Finetune(average=0.9, **SHORT), Distill(decay=0.1, hidden=1.0, **SHORT)]
    ran(source, [prune], tmp_path / "a", given)
    zero = {name: W == 0 for name, W in linears(load(tmp_path / "a")).items()}
    ran(source, steps, tmp_path / "b", given)
    after = load(tmp_path / "b")
    assert all(torch.equal(W == 0, zero[name]) for name, W in linears(after).items())
    assert after.pattern == load(tmp_path / "a").pattern
    # With fewer blocks, too.
    ran(tmp_path / "a", [Layers(keep=(1,)), Distill(**SHORT)], tmp_path / "c", given)
    short = load(tmp_path / "c")
    for name, W in linears(short).items():
        assert torch.equal(W == 0, zero[name.replace(".0.", ".1.")])
    assert short.pattern == after.pattern


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_quantized_while_it_learns_zeros_are_exactly_zero(
    symmetric: bool, start: str, tmp_path: Path
) -> None:
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    ran(source, [Gradual(pattern="2:4", **SHORT)], tmp_path / "a", given)
    zero = {name: W == 0 for name, W in linears(load(tmp_path / "a")).items()}
    grid: dict[str, Any] = {"scheme": "W2A16", "group": 32, "symmetric": symmetric, "embeddings": None}
    # Of 2,000 tokens the last digits of a processor decided whether what was learned is nearer.
    step = Qat(start=start, **grid, **(SHORT | {"rate": 0.02, "tokens": "8k"}))
    done = ran(tmp_path / "a", [step], tmp_path / "b", given)
    assert done.record.steps[0].stages[1].kept
    after = load(tmp_path / "b")
    assert all(bool((W[zero[name]] == 0).all()) for name, W in linears(after).items())


def test_grids_without_a_zero_are_refused_for_a_pruned_model(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    prune = Gradual(pattern="2:4", **SHORT)
    for grid in ({"scheme": "Q4_1"}, {"group": 32, "symmetric": False, "float_zeros": True}):
        recipe = Recipe("m", (prune, Qat(**grid, **SHORT)), export=("gguf",))
        with pytest.raises(UnsupportedError, match="the model is pruned, and"):
            recipe.resolved(load(source))


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    steps = [Gradual(**SHORT, **METHODS["movement"]), Finetune(average=0.9, **SHORT)]
    whole = ran(source, steps, tmp_path / "a", given)
    for stop in (2, 9, 13, 5):  # the last one in what follows
        with pytest.raises(KeyboardInterrupt):
            ran(source, steps, tmp_path / "b", given, stop)
    again = ran(source, steps, tmp_path / "b", given)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert again.record.steps == whole.record.steps and again.record.findings == whole.record.findings


def test_an_encoder_becomes_a_classifier_and_is_pruned_by_it(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "bert")
    rows = labelled(tmp_path / "train.jsonl")
    given = Data(train=(rows,), evaluate=(rows,), sequences=4, length=32)
    short = {"batch": 8, "length": 32, "rate": 1e-3}
    steps = [
        Finetune(epochs=4.0, **short),
        Gradual(epochs=4.0, sparsity=0.6, method="movement", hard=0.5, **short),
    ]
    done = ran(source, steps, tmp_path / "o", given)
    model, report = load(tmp_path / "o"), done.record.steps[1].training
    assert report is not None and report.teachers == ("m",) and model.arch.task == "classify"
    assert all(int((W == 0).sum()) == round(0.6 * W.numel()) for W in linears(model).values())
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")
    assert found.config.sparsity["share"] == pytest.approx(0.6, abs=1e-3)


def test_a_pruned_encoder_keeps_its_zeros_as_a_classifier(tmp_path: Path) -> None:
    source, given = write_tiny(tmp_path / "m", "bert"), data(tmp_path)
    ran(source, [Gradual(sparsity=0.6, hidden=1.0, **SHORT)], tmp_path / "a", given)
    zero = [W == 0 for W in linears(load(tmp_path / "a")).values()]
    rows = labelled(tmp_path / "train.jsonl")
    given = Data(train=(rows,), evaluate=(rows,), sequences=4, length=32)
    ran(tmp_path / "a", [Finetune(epochs=2.0, batch=8, length=32)], tmp_path / "b", given)
    model = load(tmp_path / "b")
    assert model.arch.task == "classify" and model.pattern is not None
    assert [torch.equal(W == 0, z) for W, z in zip(linears(model).values(), zero, strict=True)] == [
        True
    ] * len(zero)


def test_more_zeros_are_made_in_a_pruned_model_and_others_in_their_place(tmp_path: Path) -> None:
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    ran(source, [Gradual(sparsity=0.5, **SHORT)], tmp_path / "a", given)
    first = load(tmp_path / "a")
    for name, options in (("b", {"method": "movement"}), ("c", {"method": "magnitude"})):
        ran(tmp_path / "a", [Gradual(sparsity=0.75, **options, **SHORT)], tmp_path / name, given)
        for n, W in linears(load(tmp_path / name)).items():
            assert bool((W[first.weight(n) == 0] == 0).all()) and int((W == 0).sum()) == round(
                0.75 * W.numel()
            )
    ran(tmp_path / "a", [Gradual(sparsity=0.5, method="rigl", begin=0.0, **SHORT)], tmp_path / "d", given)
    moved = linears(load(tmp_path / "d"))
    assert all(int((W == 0).sum()) == W.numel() // 2 for W in moved.values())
    assert any(bool((W[first.weight(n) == 0] != 0).any()) for n, W in moved.items())
    resolved = Gradual(sparsity=0.4, method="rigl")
    for step, word in (
        (Gradual(sparsity=0.5), r"0.5 are zero and stay so; ask for more, or let them change places"),
        (Gradual(sparsity=0.3, method="movement"), "ask for more"),
        (resolved, "ask for more$"),
    ):
        with pytest.raises(UsageError, match=word):
            step.resolve(first, ())


PACES = [
    ({"scores": "zero"}, 4000, 0.01),
    ({"scores": "magnitude"}, 40, 0.01),
    ({"scores": "magnitude"}, 640, 0.0025),
    ({"scores": "magnitude"}, None, 0.01),
    ({"scores": "magnitude", "score_rate": 0.2}, 640, 0.2),
]


@pytest.mark.parametrize(("options", "steps", "rate"), PACES, ids=str)
def test_scores_from_magnitudes_go_no_further_in_a_long_training(
    options: dict[str, Any], steps: int | None, rate: float, tmp_path: Path
) -> None:
    """From zero they have to; where the steps are not known it is the paper's rate."""
    model = load(write_tiny(tmp_path / "m", "llama"))
    step = Gradual(sparsity=0.9, method="movement", **options)
    assert step.thinning(model, steps).rate == pytest.approx(rate)


def test_what_soft_movement_missed_is_told(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    step = Gradual(sparsity=0.9, method="soft_movement", penalty=0.0, **SHORT)
    done = ran(source, [step], tmp_path / "o", data(tmp_path))
    (found,) = [f for f in done.record.findings if f.code == "penalty-missed"]
    assert "under the penalty 0% of the weights were zero" in found.message and "larger" in found.message


def test_matrices_that_end_up_empty_are_told(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    stored = open_checkpoint(source)
    tensors = {name: stored.read(name) for name in stored.entries}
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 1e-4
    write_weights(source, tensors)
    step = Gradual(sparsity=0.5, scope="model", **(SHORT | {"rate": 1e-6}))
    done = ran(source, [step], tmp_path / "o", data(tmp_path))
    (found,) = [f for f in done.record.findings if f.code == "matrices-emptied"]
    assert found.where == "model.layers.0.self_attn.v_proj.weight" and "1 of 14 matrices" in found.message


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "sparsity: name the share"),
        ({"sparsity": 0.0}, "above 0 and below 1; got 0"),
        ({"sparsity": 1.0}, "above 0 and below 1; got 1"),
        ({"sparsity": 1.5}, "above 0 and below 1; got 1.5"),
        ({"sparsity": 0.9, "pattern": "2:4"}, "pattern 2:4 makes 0.5 zero; leave sparsity out"),
        ({"pattern": "4:2"}, "it is kept:of, such as 2:4; of 2 weights 1 can be kept"),
        ({"pattern": "blocks"}, "pattern is unstructured or kept:of"),
        ({"sparsity": 0.9, "method": "movements"}, "did you mean 'movement'"),
        ({"sparsity": 0.9, "scope": "layer"}, "scope is matrix, model, erk"),
        ({"sparsity": 0.9, "begin": 0.5, "end": 0.5}, "0 <= begin < end <= 1; got 0.5 and 0.5"),
        ({"sparsity": 0.9, "end": 1.1}, "0 <= begin < end <= 1"),
        ({"sparsity": 0.9, "every": 0}, "every is auto or a number of steps"),
        ({"sparsity": 0.9, "penalty": 1.0}, "penalty belongs to method soft_movement; magnitude has none"),
        ({"sparsity": 0.9, "method": "rigl", "cycles": 2}, "cycles belongs to method magnitude and movement"),
        ({"sparsity": 0.9, "method": "rigl", "fraction": 1.0}, "fraction must lie between 0 and 1"),
        ({"sparsity": 0.9, "method": "movement", "scores": "ones"}, "scores is zero, magnitude"),
        ({"sparsity": 0.9, "scores": "magnitude"}, "scores belongs to method movement and soft_movement"),
        ({"sparsity": 0.9, "rewind": True}, "name how many"),
        ({"sparsity": 0.9, "rewind": True, "cycles": 2, "average": 0.9}, "average would mix weights"),
        ({"sparsity": 0.9, "cycles": -1}, "cycles is how often"),
        ({"sparsity": 0.9, "patience": 3}, "the best weights may be those before all was cut"),
        ({"sparsity": 0.9, "generations": 2}, "generations is for distill"),
        ({"sparsity": 0.9, "progressive": 0.3}, "progressive is for distill"),
        ({"sparsity": 0.9, "exits": (0,)}, "exits is for distill"),
        ({"sparsity": 0.9, "sharded": True}, "masks are made of whole matrices"),
        ({"scope": "erk", "pattern": "2:4"}, "leaves every matrix the same share"),
        ({"sparsity": 0.9, "loss": "kl"}, "^gradual: unknown loss"),
        ({"sparsity": 0.9, "tokens": 5, "minutes": 5}, "one budget"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Gradual(**options)


def test_what_a_model_cannot_have_is_refused_before_work(tmp_path: Path) -> None:
    llama, bert = (load(write_tiny(tmp_path / f, f)) for f in ("llama", "bert"))
    for step, word in (
        (
            Gradual(pattern="3:7"),
            r"3:7: 7 does not divide the 64 weights of a row of model.layers.0.self_attn.q",
        ),
        (Gradual(sparsity=0.99999), r"leaves none of the 4096 weights of model.layers.0.self_attn.q_proj"),
        (Gradual(sparsity=0.5, soft=0.0), "soft: 0 leaves nobody to learn from"),
    ):
        with pytest.raises(UsageError, match=word):
            step.resolve(llama, ())
    with pytest.raises(UnsupportedError, match="has no true tokens"):
        Gradual(sparsity=0.5, hard=1.0).resolve(bert, ())
    for options, word in (
        ({"sparsity": 0.5, "cycles": 12}, "12 cuts do not fit between begin 0.1 and end 0.75 of 16 steps"),
        ({"sparsity": 0.5, "every": 12}, "2 masks, one every 12 steps, do not fit"),
        ({"sparsity": 0.5, "begin": 0.5, "end": 0.51}, "give it a larger budget"),
    ):
        with pytest.raises(UsageError, match=word):
            ran(tmp_path / "llama", [Gradual(**options, **SHORT)], tmp_path / "o", data(tmp_path))


def test_a_recipe_names_it_and_the_plan_knows_its_time(tmp_path: Path) -> None:
    source, given = write_tiny(tmp_path / "m", "llama"), data(tmp_path)
    raw = {"model": "m", "steps": [{"gradual": {"sparsity": 0.9, "method": "movement", "every": 2, **SHORT}}]}
    recipe = parse_recipe(raw, base=tmp_path)
    assert recipe.steps == (Gradual(sparsity=0.9, method="movement", every=2, **SHORT),)
    assert parse_recipe(recipe.to_dict(), base=tmp_path) == recipe
    for options in (
        {"sparsity": 0.9, "method": "movement"},
        {"pattern": "2:4", "method": "rigl", "begin": 0.0},
    ):
        plan = ps.plan(source, [Gradual(**options, **SHORT)], out=tmp_path / "o", data=given)
        (stage,) = [s for s in plan.stages if s.name == "gradual"]
        assert stage.cpu_s and stage.ram_bytes > 0 and not (tmp_path / "o").exists()
