"""Recipe step `student`: what it makes, what stock transformers loads, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import pocketsize as ps
from pocketsize.errors import PocketsizeError, UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.models.load import load
from pocketsize.models.student import FAMILIES
from pocketsize.recipes import timing
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill
from pocketsize.recipes.lookup import token_vectors
from pocketsize.recipes.quantize import Gptq, Rtn
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.recipes.student import Student
from tiny import VOCAB, write_texts, write_tiny

SHORT = {"batch": 4, "length": 32, "rate": 1e-3}


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())


class Quiet:
    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...


def data(tmp_path: Path) -> Data:
    calibrate, evaluate = write_texts(tmp_path)
    return Data((calibrate,), (evaluate,), sequences=4, length=32, tokens=256, written=0.0)


def ran(tmp_path: Path, family: str, *steps: Any, export: str = "folder") -> Any:
    source = write_tiny(tmp_path / "m", family)
    return ps.run(
        source,
        list(steps),
        out=tmp_path / "o",
        export=[export],
        data=data(tmp_path),
        console=Quiet(),
        dtype="fp32" if export == "folder" else "bf16",
    )


@pytest.mark.parametrize("family", ["llama", "mpnet", "distilbert"])
def test_a_cut_student_is_taught_and_stock_transformers_loads_it(family: str, tmp_path: Path) -> None:
    square = family != "llama"
    student = Student(hidden=32, ffn=64, heads=2, kv_heads=None if square else 1)
    done = ran(tmp_path, family, Layers(keep=1), student, Distill(tokens="2k", **SHORT))
    auto = AutoModelForCausalLM if family == "llama" else AutoModel
    stock, told = auto.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    assert (stock.config.hidden_size, stock.config.num_attention_heads) == (32, 2)
    report = done.record.steps[1]
    assert report.options["kept_hidden"] == 32
    assert report.options["parameters_after"] < report.options["parameters_before"]
    names = {m.name for m in done.record.measurements}
    assert ("one_minus_cosine" in names) is False
    assert "spearman" in names if square else "kl_mean" in names


@pytest.mark.parametrize("family", ["bert", "distilbert", "squeezebert", "mobilebert", "electra"])
def test_a_built_encoder_is_taught_and_stock_transformers_loads_it(family: str, tmp_path: Path) -> None:
    done = ran(tmp_path, "bert", Student(family=family, parameters=400_000), Distill(tokens="1k", **SHORT))
    body = done.record.steps[0].options
    odd = not 1 / 4 < body["hidden"] / body["layers"] / FAMILIES[family].ratio < 4
    assert ("odd-shape" in {one.code for one in done.record.findings}) is odd
    stock, told = AutoModel.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert stock.config.model_type == family
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    ours = load(tmp_path / "o")
    assert ours.origin.parameters <= 400_000
    ids = torch.arange(5, 25)[None]
    from pocketsize.models.skeleton import materialise

    mine = materialise(ours)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(mine, stock(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_mobilebert_that_starts_as_a_table_has_a_wide_one(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "bert"))
    shape = {"family": "mobilebert", "layers": 1, "hidden": 128}
    for more, embedding in (
        ({}, None),
        ({"start": "tokens"}, 64),
        ({"start": "tokens", "embedding": 32}, 32),
    ):
        assert Student(**shape, **more).resolve(model, ("folder",)).embedding == embedding


TABLES: list[dict[str, Any]] = [
    {"family": "bert"},
    {"family": "distilbert"},
    {"family": "squeezebert"},
    {"family": "electra", "embedding": 32},
    {"family": "mobilebert"},
    {"family": "mobilebert", "norm": "layer_norm", "embedding": 48},
    {"family": "bert", "vocabulary": 200},
    {"family": "bert", "hidden": 96},
]


@pytest.mark.parametrize("options", TABLES)
def test_a_student_that_starts_as_a_table_of_tokens_lets_them_pass(
    options: dict[str, Any], tmp_path: Path
) -> None:
    student = Student(start="tokens", **{"layers": 2, "hidden": 128, **options})
    ran(tmp_path, "bert", student)
    ours, source = load(tmp_path / "o"), load(tmp_path / "m")
    ids = torch.arange(5, 25)[None]
    stock = AutoModel.from_pretrained(tmp_path / "o").eval()
    states = stock(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], states[-1], rtol=1e-4, atol=1e-4)

    table = ours.weight(ours.arch.embedding)
    width = min(table.shape[1], int(source.config.hidden_size))
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("m", "o"))
    words = after.convert_ids_to_tokens(range(len(after)))
    known = before.convert_tokens_to_ids(words) if "vocabulary" in options else range(len(table))
    wanted, _ = token_vectors(source, known, width)
    torch.testing.assert_close(table[: len(known), :width], wanted.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "embedding"), [("bert", None), ("distilbert", None), ("electra", 32), ("mobilebert", 48)]
)
def test_a_student_as_wide_as_its_teacher_begins_in_its_channels(
    family: str, embedding: int | None, tmp_path: Path
) -> None:
    """So it gives the teacher's own vectors at once, but for their mean, as far as its embedding reaches."""
    student = Student(family=family, layers=2, hidden=64, heads=2, start="tokens", embedding=embedding)
    ran(tmp_path, "bert", student)
    ours, source = load(tmp_path / "o"), load(tmp_path / "m")
    table = ours.weight(ours.arch.embedding).double()
    if embedding is not None:
        lift = ours.weight(FAMILIES[family].lifts).double()
        of_token = lift if family == "electra" else lift[:, embedding : 2 * embedding]
        table = table @ of_token.T
    whole, directions = token_vectors(source, range(len(table)), 64)
    wanted = whole.double() @ directions.double().T
    error = (table - wanted * (table * wanted).sum() / wanted.square().sum()).norm() / table.norm()
    narrow = token_vectors(source, range(len(table)), embedding or 64)[0].shape[1]
    lost = 1 - whole[:, :narrow].square().sum() / whole.square().sum()
    assert error < 1e-3 + 2 * lost.sqrt()
    assert lost < 0.5


def test_what_a_table_of_tokens_adds_is_learned(tmp_path: Path) -> None:
    steps = [Student(family="bert", layers=2, hidden=64, start="tokens"), Distill(tokens="1k", **SHORT)]
    ran(tmp_path, "bert", *steps)
    adds = load(tmp_path / "o").weight("encoder.layer.1.output.dense.weight")
    assert bool((adds != 0).any(1).all())


def test_a_built_generator_is_quantized_after_it_was_taught(tmp_path: Path) -> None:
    student = Student(family="mistral", layers=1, hidden=64, heads=2, kv_heads=1, window=16)
    done = ran(tmp_path, "llama", student, Distill(tokens="1k", **SHORT), Rtn())
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["model_type"] == "mistral" and config["sliding_window"] == 16
    assert config["num_key_value_heads"] == 1 and config["architectures"] == ["MistralForCausalLM"]
    assert done.record.steps[-1].layers


@pytest.mark.parametrize("tokens", ["corpus", 290])
def test_a_trimmed_student_says_what_its_teacher_says(tokens: Any, tmp_path: Path) -> None:
    """On text of kept tokens nothing changes: same tokens, and a divergence of zero over them."""
    done = ran(tmp_path, "llama", Student(vocabulary=tokens))
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / where) for where in ("m", "o")]
    sentence = "Bobi caka dene."
    texts = [t.convert_ids_to_tokens(t(sentence)["input_ids"]) for t in tokenizers]
    assert texts[0] == texts[1]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / where).eval() for where in ("m", "o")]
    large, small = (
        m(**t(sentence, return_tensors="pt")).logits for m, t in zip(models, tokenizers, strict=True)
    )
    vocabulary = tokenizers[1].get_vocab()
    rows = [tokenizers[0].get_vocab()[token] for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    torch.testing.assert_close(small, large[..., rows], rtol=1e-5, atol=1e-5)
    found = {m.name: m.value for m in done.record.measurements}
    assert abs(found["kl_mean"]) < 1e-9 and found["top1"] == 1
    assert any("are kept" in f.message for f in done.record.findings)
    assert any("tokens of the compressed one" in said for said in done.record.protocol)
    if tokens == 290:
        assert models[1].config.vocab_size == 290


def test_a_file_for_llama_cpp_of_a_trimmed_student_is_nearly_as_large_as_told(tmp_path: Path) -> None:
    """Which tokens stay is known later than how many; the weights are as told to the byte."""
    steps = (Student(vocabulary=290), Rtn("Q8_0"))
    done = ran(tmp_path, "llama", *steps, export="gguf")
    (artifact,) = done.record.artifacts
    told = ps.plan(
        tmp_path / "m", list(steps), out=tmp_path / "p", export=["gguf"], data=data(tmp_path), console=Quiet()
    )
    (export,) = told.exports
    assert export.bytes == pytest.approx(artifact.bytes, rel=0.02)
    assert export.path == artifact.path


@pytest.mark.parametrize("family", [None, "qwen2"])
def test_a_trimmed_student_that_is_taught_can_be_planned(family: str | None, tmp_path: Path) -> None:
    body = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1} if family else {}
    steps = [Student(vocabulary=290, family=family, **body), Distill(tokens="1k", **SHORT), Gptq()]
    source = write_tiny(tmp_path / "m", "llama")
    found = ps.plan(
        source, steps, out=tmp_path / "p", export=["folder"], data=data(tmp_path), console=Quiet()
    )
    times = {stage.name: stage.time_s for stage in found.stages}
    assert times["distill"] and times["gptq"]
    ran(tmp_path, "llama", *steps)
    assert load(tmp_path / "o").config.vocab_size == 290


def test_a_trimmed_student_is_taught_and_then_calibrated_in_its_own_tokens(tmp_path: Path) -> None:
    steps = (Student(vocabulary="corpus", ffn=64), Distill(tokens="1k", **SHORT), Gptq())
    done = ran(tmp_path, "llama", *steps)
    assert done.record.steps[1].training.teachers == ("m",)
    assert load(tmp_path / "o").config.vocab_size < 320


def test_a_trimmed_encoder_frames_texts_as_before(tmp_path: Path) -> None:
    ran(tmp_path, "mpnet", Student(vocabulary="corpus"))
    large, small = (AutoTokenizer.from_pretrained(tmp_path / where) for where in ("m", "o"))
    text = "bobi caka dene"
    assert small.convert_ids_to_tokens(small(text)["input_ids"]) == large.convert_ids_to_tokens(
        large(text)["input_ids"]
    )
    assert small.pad_token_id == large.pad_token_id == 1  # positions are counted from it
    models = [AutoModel.from_pretrained(tmp_path / where).eval() for where in ("m", "o")]
    a, b = (m(**t(text, return_tensors="pt"))[0] for m, t in zip(models, (large, small), strict=True))
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "step",
    [
        Student(hidden=32, ffn=64, heads=2, kv_heads=1),
        Student(vocabulary=290),
        Student(family="llama", parameters=300_000),
        Student(family="qwen2", megabytes=1.0),
    ],
)
def test_the_outline_is_what_comes_of_it(step: Student, tmp_path: Path) -> None:
    model = replace(load(write_tiny(tmp_path / "m", "llama")), dtype=torch.float32)
    settled = step.resolve(model, ("folder",))
    assert settled.resolve(model, ("folder",)) == settled
    promised = settled.outline(model)
    ran(tmp_path, "llama", step)
    made = load(tmp_path / "o")
    assert {n: e.shape for n, e in made.checkpoint.entries.items()} == {
        n: e.shape for n, e in promised.checkpoint.entries.items()
    }
    assert made.origin.parameters == promised.origin.parameters


def test_plan_tells_a_students_bytes(tmp_path: Path) -> None:
    from pocketsize.recipes.plan import plan

    source = write_tiny(tmp_path / "m", "llama")
    step = Student(ffn=64, hidden=32, heads=2, kv_heads=1)
    recipe = Recipe(
        str(source), (step, Distill(tokens="1k", **SHORT)), ("folder",), data(tmp_path), dtype="fp32"
    )
    found = plan(recipe, tmp_path / "o", console=Quiet())
    done = ps.run(
        source,
        list(recipe.steps),
        out=tmp_path / "o",
        export=["folder"],
        data=recipe.data,
        console=Quiet(),
        dtype="fp32",
    )
    assert found.exports[0].bytes == done.record.artifacts[0].bytes
    assert any(stage.name == "student" for stage in found.stages)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "says nothing"),
    ({"hidden": 0}, "hidden must be above 0"),
    ({"parameters": "1M"}, "parameters is for a student that is built"),
    ({"layers": 2}, "use the step layers, or name its family"),
    ({"family": "bert", "vocabulary": "corpus"}, "give a number of tokens"),
    ({"family": "bert", "parameters": "1M", "megabytes": 2}, "one budget at a time"),
    ({"hidden": 32, "tied": False}, "tied: false would add a head"),
    ({"hidden": 32, "start": "tokens"}, "start is for a student that is built"),
    ({"family": "bert", "parameters": "1M", "start": "token"}, "unknown start 'token'; did you mean .tokens"),
]


@pytest.mark.parametrize("options,why", REFUSED)
def test_options_that_make_no_sense(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Student(**options)


UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"ffn": 256}, "ffn: 256 is more than the model's 128"),
    ("llama", {"heads": 3}, "3 heads cannot share 2 keys and values evenly; give kv_heads too"),
    ("llama", {"heads": 3, "kv_heads": 2}, "3 heads cannot share 2 keys"),
    ("llama", {"hidden": 63}, "stock llama models cannot be so"),
    (
        "llama",
        {"family": "llama", "parameters": "1M", "start": "tokens"},
        "not for a llama; use random",
    ),
    ("bert", {"kv_heads": 2}, "every head has keys of its own"),
    ("bert", {"hidden": 40}, "use hidden: 48, heads: 3|use hidden: 32, heads: 2"),
    ("bert", {"hidden": 32, "heads": 4}, "do not go together"),
    ("llama", {"vocabulary": 100}, "100 is too few"),
    ("llama", {"vocabulary": 1000}, "the model has"),
    ("bert", {"tied": True}, "has no head"),
    ("bert", {"family": "bert"}, "both layers and hidden"),
    ("bert", {"family": "llama", "parameters": "1M"}, "is for generate"),
    ("llama", {"family": "llama", "parameters": 1000}, "320 tokens take"),
    ("llama", {"family": "llama", "layers": 1, "hidden": 64, "heads": 3}, "3 heads do not divide"),
    (
        "llama",
        {"family": "llama", "layers": 1, "hidden": 64, "heads": 4, "kv_heads": 3},
        "4 heads cannot share",
    ),
    ("llama", {"family": "llama", "layers": 1, "hidden": 64, "window": 4}, "window is for qwen2 and mistral"),
    ("bert", {"family": "mobilebert", "layers": 1, "hidden": 128, "norm": "batch"}, "no_norm or layer_norm"),
]


@pytest.mark.parametrize("family,options,why", UNFIT)
def test_sizes_that_the_model_cannot_have(
    family: str, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    with pytest.raises(PocketsizeError, match=why):
        Student(**options).resolve(model, ("folder",))


def test_heads_of_a_family_without_data_are_refused_but_its_tokens_are_not(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "gpt2"))
    model = replace(model, arch=replace(model.arch, cuts=None))
    with pytest.raises(UnsupportedError, match="slices of a gpt2 model go together; leave out heads"):
        Student(heads=2).resolve(model, ("folder",))
    with pytest.raises(UnsupportedError, match="heal: it is not known which linears of a gpt2"):
        Layers(keep=1, heal=True).resolve(model, ("folder",))
    assert Layers(keep=1).resolve(model, ("folder",)).heal is False
    assert Student(vocabulary=290).resolve(model, ("folder",)).outline(model).config.vocab_size == 290


def test_a_latency_gives_the_largest_that_is_quick_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_tiny(tmp_path / "m", "bert"))
    asked: list[int] = []

    def pretended(body: Any) -> float:
        asked.append(body.hidden)
        return body.hidden * body.layers / 100

    monkeypatch.setattr(timing, "milliseconds", pretended)
    step = Student(family="bert", latency_ms=3.0).resolve(model, ("folder",))
    assert step.latency_ms is None and step.layers is not None and step.hidden is not None
    assert step.hidden * step.layers <= 300 < (step.hidden + 32) * step.layers
    assert len(asked) < 10
    with pytest.raises(UsageError, match="the smallest that is asked for takes"):
        Student(family="bert", latency_ms=1e-6).resolve(model, ("folder",))


def test_a_latency_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))
    model = load(write_tiny(tmp_path / "m", "bert"))
    step = Student(family="squeezebert", layers=1, hidden=32)
    body = step._body(model)
    first = timing.milliseconds(body)
    monkeypatch.setattr(timing, "module_latency", lambda *_, **__: pytest.fail("measured again"))
    assert timing.milliseconds(body) == first > 0


def test_its_options_are_what_a_recipe_file_holds() -> None:
    assert asdict(Student(vocabulary="corpus"))["vocabulary"] == "corpus"


@pytest.mark.parametrize("tokens", [300, "corpus"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_families_with_matrices_of_their_own_kind_lose_tokens(
    family: str, tokens: Any, tmp_path: Path
) -> None:
    ran(tmp_path, family, Student(vocabulary=tokens))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert stock.config.vocab_size < VOCAB if tokens == "corpus" else stock.config.vocab_size == 300
