"""Quantized weights that their original teaches: in every family of generators, kept only if they gain."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketsize.data.text import Corpus, Document
from pocketsize.distributed.world import Processes
from pocketsize.errors import DataError, Stopped, UnsupportedError, UsageError
from pocketsize.measurement.suite import divergence
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.qat import JUDGES, WRITTEN, Qat, learned_numbers, of_effort
from pocketsize.recipes.quantize import Gptq, Rtn
from pocketsize.recipes.step import Context
from pocketsize.training.rounded import put_on_grids, taken_off
from tiny import GENERATORS, VOCAB, write_texts, write_tiny

TRAINED: dict[str, Any] = {"batch": 4, "length": 32, "tokens": 4096}
SCHEMES: dict[str, dict[str, Any]] = {
    "W2A16": {"scheme": "W2A16", "group": 32, "symmetric": False},
    "W2A16, one scale a row": {"scheme": "W2A16", "group": None, "symmetric": True},
    "W4A16": {"scheme": "W4A16", "group": 32},
    "W4A16, float zeros": {"scheme": "W4A16", "group": 32, "symmetric": False, "float_zeros": True},
    "Q4_0": {"scheme": "Q4_0"},
    "NF4": {"scheme": "NF4"},
}
# In finer grids a step of the same share of a code is a smaller one of a weight, and less is left to gain.
RATES = {"W4A16": 0.005, "W4A16, float zeros": 0.005, "Q4_0": 0.005, "NF4": 0.005}

# What stores them, where transformers' own folder does not; nothing is exported here.
HOLDS = {
    "W4A16, float zeros": ("gguf",),
    "NF4": ("bitsandbytes",),
}


def context(folder: Path, **others: Any) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    text = Path(write_texts(folder)[0]).read_text()
    corpus = Corpus("words", tuple(Document(f"{a}", text[a : a + 2000]) for a in range(0, 12000, 2000)))
    ids = torch.randint(5, VOCAB - 1, (8, 40), generator=torch.Generator().manual_seed(0))
    journal = open_journal(folder / "work", {}, **others)
    return Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None, corpus=corpus)


def quantized(model: Model, ctx: Context, **options: Any) -> Model:
    given = {"scheme": "W2A16", "group": 32, "symmetric": True, **TRAINED, **options}
    return Qat(**given).resolve(model, ("folder",)).apply(model, ctx)


def solved(model: Model, ctx: Context) -> Model:
    """The same grid by GPTQ alone."""
    return Gptq("W2A16", group=32, symmetric=True).resolve(model, ("folder",)).apply(model, ctx)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("tiny") / "m", "llama"))


def same(a: Model, b: Model) -> bool:
    return all(
        torch.equal(a.quantized[n].codes, b.quantized[n].codes)
        and torch.equal(a.quantized[n].scale, b.quantized[n].scale)
        for n in a.linears
    )


@pytest.mark.parametrize("family", [f for f in GENERATORS if f not in ("mixtral", "qwen3_moe")])
def test_learns_in_every_family(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    if model.arch.refuses:
        pytest.skip(model.arch.refuses)
    ctx = context(tmp_path)
    done = quantized(model, ctx, rate=0.02)
    (report,) = ctx.reports
    assert report.kind == "qat" and {one.name for one in report.layers} >= {*model.linears}
    assert report.training is not None and report.training.steps == 32 and not report.training.skipped
    start, learned = report.stages
    assert start.name == "gptq" and start.kept and learned.kept == (learned.divergence < start.divergence)
    first, *_, last = [loss for _, loss in report.training.losses]
    assert first > 0 and math.isfinite(last)
    assert {*done.quantized} >= {*model.linears}


@pytest.mark.parametrize("grid", SCHEMES)
def test_every_grid_learns(grid: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    ctx = context(tmp_path)
    step = Qat(**{**TRAINED, **SCHEMES[grid], "embeddings": None, "rate": RATES.get(grid, 0.02)})
    done = step.resolve(model, HOLDS.get(grid, ("folder",))).apply(model, ctx)
    start, learned = ctx.reports[0].stages
    assert learned.divergence < start.divergence
    assert all(int(q.codes.max()) <= q.scheme.top for q in done.quantized.values())


@pytest.mark.parametrize("scales", [True, False])
def test_the_module_starts_from_what_was_quantized(scales: bool, model: Model, tmp_path: Path) -> None:
    begun = Gptq("W2A16", group=32).resolve(model, ("folder",)).apply(model, context(tmp_path))
    module = materialise(begun)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = module(input_ids=ids).logits
        rounded = put_on_grids(module, model, begun.quantized, scales=scales)
        assert torch.allclose(module(input_ids=ids).logits, before, atol=1e-5)
    for name, weight in taken_off(module, rounded).items():
        assert torch.equal(weight.codes, begun.quantized[name].codes)
        assert torch.equal(weight.scale, begun.quantized[name].scale)
    learn = [p.numel() for p in module.parameters() if p.requires_grad]
    groups = sum(q.scale.numel() for q in begun.quantized.values()) * scales
    assert sum(learn) == sum(model.original(name).numel() for name in model.linears) + groups


def test_ternary_weights_stay_ternary(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "qwen3", wide=True))
    ctx = context(tmp_path)
    step = Qat(**{**TRAINED, "scheme": "TQ2_0", "embeddings": None, "tokens": 1024, "rate": 0.02})
    done = step.resolve(model, ("gguf",)).apply(model, ctx)
    start, learned = ctx.reports[0].stages
    assert learned.kept == (learned.divergence < start.divergence)
    assert all(int(done.quantized[name].codes.max()) == 2 for name in model.linears)


def test_what_gains_nothing_is_dropped_and_told(model: Model, tmp_path: Path) -> None:
    ctx = context(tmp_path / "a")
    done = quantized(model, ctx, rate=0.9, tokens=512)
    plain = solved(model, context(tmp_path / "b"))
    assert same(done, plain)
    assert [stage.kept for stage in ctx.reports[0].stages] == [True, False]
    assert "learning-dropped" in [finding.code for finding in ctx.findings]


def test_what_is_kept_is_as_near_as_was_said(model: Model, tmp_path: Path) -> None:
    """KL of windows of other text falls as well, and the record says what was judged."""
    ctx = context(tmp_path / "a")
    done = quantized(model, ctx, rate=0.02)
    plain = solved(model, context(tmp_path / "b"))
    text = Path(write_texts(tmp_path)[1]).read_text()
    tokens = tokenizer_of(model)(text, add_special_tokens=False)["input_ids"][: 8 * 32]
    ids = torch.tensor(tokens).view(8, 32)
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert divergence(model, done, ids, mask) < divergence(model, plain, ids, mask)
    assert not same(done, plain)


@pytest.mark.parametrize("options", [{"rate": 0.02}, {"codes": False}], ids=["codes", "scales alone"])
def test_a_break_changes_nothing(options: dict[str, Any], model: Model, tmp_path: Path) -> None:
    whole = quantized(model, context(tmp_path / "a"), **options)
    asked = list[int]()

    def stopping() -> bool:
        asked.append(1)
        return len(asked) == 11

    def stop(where: str) -> None:
        if len(asked) == 11:
            asked.append(1)
            raise Stopped(where)

    with pytest.raises(Stopped):
        quantized(model, context(tmp_path / "b", safe_point=stop, stopping=stopping), **options)
    again = context(tmp_path / "b")
    assert same(quantized(model, again, **options), whole)
    once_more = context(tmp_path / "b")
    assert same(quantized(model, once_more, **options), whole)  # all of it is read
    assert once_more.reports == again.reports


def test_round_to_nearest_as_a_start_and_scales_that_stay(model: Model, tmp_path: Path) -> None:
    ctx = context(tmp_path / "a")
    done = quantized(model, ctx, start="rtn", scales=False, rate=0.05)
    start, tuned = ctx.reports[0].stages
    assert start.name == "rtn" and tuned.divergence < start.divergence
    grid = {"scheme": "W2A16", "group": 32, "symmetric": True}
    plain = Rtn(**grid).resolve(model, ("folder",)).apply(model, context(tmp_path / "b"))
    pairs = [(done.quantized[name], plain.quantized[name]) for name in model.linears]
    assert all(torch.equal(a.scale, b.scale) for a, b in pairs)
    assert not any(torch.equal(a.codes, b.codes) for a, b in pairs)


@pytest.mark.parametrize("grid", [g for g in SCHEMES if g != "Q4_0"])
def test_scales_are_tuned_alone(grid: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    ctx, other = context(tmp_path / "a"), context(tmp_path / "b")
    given = {**TRAINED, **SCHEMES[grid], "embeddings": None}
    step = Qat(**{**given, "codes": False, "rate": 0.1}).resolve(model, HOLDS.get(grid, ("folder",)))
    done, plain = step.apply(model, ctx), step.first.apply(model, other)
    start, tuned = ctx.reports[0].stages
    assert tuned.name == "tuned" and tuned.divergence < start.divergence
    assert all(torch.equal(q.codes, plain.quantized[name].codes) for name, q in done.quantized.items())
    assert any(not torch.equal(q.scale, plain.quantized[name].scale) for name, q in done.quantized.items())


def wide(folder: Path, **others: Any) -> Context:
    """As `context`, with text enough for windows that judge."""
    ctx = context(folder, **others)
    ids = torch.randint(5, VOCAB - 1, (16, 512), generator=torch.Generator().manual_seed(0))
    ctx.input_ids, ctx.mask = ids, torch.ones_like(ids, dtype=torch.bool)
    return ctx


def test_blocks_are_corrected_and_learned_before_the_whole(model: Model, tmp_path: Path) -> None:
    ctx = wide(tmp_path)
    quantized(model, ctx, alpha=0.25, learn=3, codes=False, tokens=512)
    stages = ctx.reports[0].stages
    assert [stage.name for stage in stages] == ["gptq", "corrected", "learned", "start", "tuned"]
    alone = wide(tmp_path / "alone")
    Gptq("W2A16", group=32, symmetric=True, alpha=0.25, learn=3).resolve(model, ("folder",)).apply(
        model, alone
    )
    assert stages[:3] == alone.reports[0].stages  # judged by the same windows
    few = context(tmp_path / "few")
    quantized(model, few, learn=3, codes=False, tokens=512)
    assert [stage.name for stage in few.reports[0].stages] == ["start", "tuned"]
    assert "few-windows" in [finding.code for finding in few.findings]


@pytest.mark.parametrize("symmetric", [True, False])
def test_of_a_pruned_model_zeros_stay(symmetric: bool, model: Model, tmp_path: Path) -> None:
    pruned = Prune(score="magnitude").resolve(model, ("folder",)).apply(model, context(tmp_path / "p"))
    assert pruned.pattern is not None
    step = Qat(
        **TRAINED, scheme="W4A16", group=32, symmetric=symmetric, codes=False, embeddings=None, rate=0.9
    )
    ctx = context(tmp_path / "q")
    step.resolve(pruned, ("folder",)).apply(pruned, ctx)
    tuned = ctx.store.beside("tuned").weights()
    for name in pruned.linears:
        assert not tuned[name].dequantize()[pruned.matrix(name) == 0].any()


def test_experts_are_tuned_too(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "mixtral"))
    ctx = context(tmp_path)
    done = quantized(model, ctx, codes=False, tokens=1024)
    start, tuned = ctx.reports[0].stages
    assert tuned.kept == (tuned.divergence < start.divergence)
    assert {*done.quantized} >= {*model.linears}


def test_several_processes_are_refused(model: Model, tmp_path: Path) -> None:
    ctx = context(tmp_path)
    ctx.world = Processes(0, 2)
    with pytest.raises(UnsupportedError, match="without torchrun"):
        quantized(model, ctx)


@pytest.mark.parametrize(
    ("effort", "tune", "scheme", "kind", "said"),
    [
        ("best", None, None, "llama", Qat),
        ("best", None, "Q4_K_M", "llama", Gptq),
        ("best", None, "MXFP4", "llama", Gptq),
        ("best", None, None, "bert", Gptq),
        ("fast", "1k", "NF4", "llama", Qat),
        ("fast", "1k", "Q4_K", "llama", "scales of Q4_K stay"),
        ("fast", "1k", None, "bert", "predicts no tokens"),
        ("balanced", None, "W8A8", "llama", "use effort fast"),
        ("most", None, None, "llama", "effort must be one of"),
    ],
)
def test_what_an_effort_stands_for(
    effort: str, tune: str | None, scheme: str | None, kind: str, said: Any, tmp_path: Path
) -> None:
    arch = load(write_tiny(tmp_path / "m", kind)).arch
    if isinstance(said, str):
        with pytest.raises(UsageError, match=said):
            of_effort(effort, tune, lambda: arch, scheme)
    else:
        assert isinstance(of_effort(effort, tune, lambda: arch, scheme), said)


@pytest.mark.parametrize(("kind", "steps"), [("llama", [0, 20, 100]), ("bert", [0, 80, 200])])
def test_encoders_learn_for_longer(kind: str, steps: list[int], tmp_path: Path) -> None:
    arch = load(write_tiny(tmp_path / "m", kind)).arch
    assert [of_effort(effort, None, lambda: arch).learn for effort in ("fast", "balanced", "best")] == steps


def test_what_much_effort_tunes_keeps_no_activations(tmp_path: Path) -> None:
    arch = load(write_tiny(tmp_path / "m", "llama")).arch
    best = of_effort("best", None, lambda: arch)
    assert isinstance(best, Qat) and best.recompute and not best.codes


def test_how_many_numbers_learn(model: Model) -> None:
    scales = Qat(scheme="W2A16", group=32, symmetric=True, codes=False).resolve(model, ("folder",))
    groups = sum(rows * columns // 32 for rows, columns in map(model.matrix_shape, model.linears))
    assert learned_numbers(scales, model) == groups
    assert learned_numbers(replace(scales, codes=True), model) == model.origin.parameters
    assert scales.rate == 0.1 and replace(scales, codes=True, rate=0.5).resolve(model, ()).rate == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"codes": False, "scales": False}, "nothing learns"),
        ({"start": "rtn", "learn": 3}, "use start: gptq"),
        ({"start": "rtn", "alpha": 0.25}, "use start: gptq"),
        ({"start": "rtn", "damp": 0.25}, "use start: gptq"),
        ({"alpha": 5.0}, "qat: alpha must lie between 0 and 1"),
        ({"learn": -3}, "learn must be a whole number"),
        ({"damp": 1.0}, "qat: damp must lie between 0 and 1"),
        ({"start": "awq"}, "unknown start"),
        ({"loss": "kl"}, "unknown loss"),
        ({"decay": 0.1}, "no zero to decay to"),
        ({"sharded": True}, "trains in one process"),
        ({"scheme": "W8A8"}, "does not know of rounded inputs"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"tokens": 5, "minutes": 5}, "one budget"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Qat(**options)


@pytest.mark.parametrize(("scheme", "export"), [("Q4_K", "gguf"), ("MXFP4", "folder")])
def test_scales_that_stay_have_nothing_to_learn_alone(scheme: str, export: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "qwen3", wide=True))
    with pytest.raises(UnsupportedError, match="stay as they are stored"):
        Qat(scheme=scheme, codes=False, embeddings=None).resolve(model, (export,))


def test_encoders_and_too_little_text_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="predicts no tokens"):
        Qat().resolve(load(write_tiny(tmp_path / "e", "bert")), ("folder",))
    with pytest.raises(DataError, match="too few to hold some out"):
        ctx = context(tmp_path)
        ctx.corpus = Corpus("words", (Document("a", "A few words."),))
        quantized(model, ctx)


@pytest.mark.parametrize("tied", [True, False], ids=["one matrix", "a head of its own"])
def test_scales_of_embedding_and_head_are_tuned(tied: bool, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", tied=tied))
    assert model.tied is tied
    ctx, other = context(tmp_path / "a"), context(tmp_path / "b")
    given = {**TRAINED, "scheme": "W4A16", "group": 32, "embeddings": "same", "codes": False, "rate": 0.1}
    step = Qat(**given).resolve(model, ("folder",))
    done, plain = step.apply(model, ctx), step.first.apply(model, other)
    start, tuned = ctx.reports[0].stages
    assert tuned.divergence < start.divergence
    for name in model.ends:
        assert torch.equal(done.quantized[name].codes, plain.quantized[name].codes)
        assert not torch.equal(done.quantized[name].scale, plain.quantized[name].scale)
    assert learned_numbers(step, model) == sum(q.scale.numel() for q in done.quantized.values())


def test_a_tied_head_gives_its_part_of_the_gradient(tmp_path: Path) -> None:
    """Scales of a matrix that embeds and predicts follow the gradients of both, as autograd has them."""
    model = load(write_tiny(tmp_path / "m", "llama"))
    name = model.arch.embedding
    begun = Gptq("W4A16", group=32, symmetric=True, embeddings="same").resolve(model, ("folder",))
    done = begun.apply(model, context(tmp_path))
    ids = torch.arange(5, 25)[None]
    module = materialise(done)
    E = module.get_parameter(name)
    E.requires_grad_(True)
    module(input_ids=ids, labels=ids).loss.backward()
    q = done.quantized[name]
    slope = (
        E.grad.view(*q.scale.shape, -1)
        * (q.dequantize() / q.scale.repeat_interleave(32, 1)).view(*q.scale.shape, -1)
    ).sum(-1)
    other = materialise(model)
    rounded = put_on_grids(other, model, done.quantized, scales=True, codes=False)
    other(input_ids=ids, labels=ids).loss.backward()
    (moved,) = rounded[name].moved
    assert torch.allclose(moved.grad, slope * q.scale * 0.1 / q.scheme.top, rtol=1e-3, atol=1e-9)
    assert (
        other.get_output_embeddings().weight is not E
        and len([p for p in other.parameters() if p is moved]) == 1
    )


def test_what_the_model_wrote_teaches_as_well(model: Model, tmp_path: Path) -> None:
    """All of it, and of the text of the run what the budget leaves room for."""
    step = Qat(**{**TRAINED, "tokens": 16 * 32}).resolve(model, ("folder",))
    ctx = context(tmp_path)
    alone = step._text(model, ctx)
    ctx.own = torch.full((6, 64), 7)
    text = step._text(model, ctx)
    rows = [text.flat[a:b] for a, b in itertools.pairwise(text.starts)]
    own = [row for row in rows if (row == 7).all()]
    assert len(own) == 12 and all(len(row) == 32 for row in own)
    assert len(rows) == 16 + JUDGES and len(alone) > len(rows) - len(own)
    of_text = {row.tobytes() for row in (alone.flat[a:b] for a, b in itertools.pairwise(alone.starts))}
    assert all(row.tobytes() in of_text for row in rows if not (row == 7).all())


def test_how_much_the_model_writes() -> None:
    assert Qat(tokens="64k").windows_written(0.5, 512) == 71  # half of 125 windows and of those that judge
    assert Qat(tokens="2M").windows_written(0.5, 512) == WRITTEN
    assert Qat(minutes=5).windows_written(0.5, 512) == 0
