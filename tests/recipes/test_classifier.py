"""Encoders become classifiers, classifiers get smaller, and stock transformers loads what comes of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import pocketsize as ps
from pocketsize.cli.main import command
from pocketsize.data.labels import UNKNOWN
from pocketsize.data.sources import Source
from pocketsize.errors import DataError, UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.arch import arch_of
from pocketsize.models.load import load
from pocketsize.models.skeleton import skeleton, stored
from pocketsize.recipes.body import Layers
from pocketsize.recipes.classifier import begun, with_classes
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.quantize import Rtn
from pocketsize.recipes.recipe import Data, Recipe, parse_recipe, parse_step
from pocketsize.recipes.run import prepare
from pocketsize.recipes.student import Student
from pocketsize.recipes.texts import read_texts
from pocketsize.training import loop
from pocketsize.training.texts import labelled as labelled_examples
from quiet import Quiet
from tiny import ENCODERS, write_texts, write_tiny

WORDS = {
    "animal": ("fox", "dog", "lazy", "sleeps"),
    "maths": ("weight", "grid", "error", "numbers"),
    "thing": ("pocket", "model", "answers", "dates"),
}
CUT = [name for name in ENCODERS if arch_of(name).cuts is not None]
SHORT: dict[str, Any] = {"batch": 16, "length": 32, "rate": 1e-3}


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some tests need a process that knows nothing of Pocketsize; it takes seconds to start."""
    if "stock" not in request.node.name:
        monkeypatch.setattr(table, "reload_check", lambda *_: ())


def labelled(path: Path, count: int = 240, *, label: bool = True, seed: int = 0) -> str:
    """Rows of words that tell their class, among others that do not."""
    draw, lines = random.Random(seed), []
    for i in range(count):
        name = list(WORDS)[i % 3]
        words = draw.choices(WORDS[name], k=6) + draw.choices(("the", "is", "and", "on"), k=4)
        draw.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words)} | ({"label": name} if label else {})))
    path.write_text("\n".join(lines))
    return str(path)


def data(tmp_path: Path, **options: Any) -> Data:
    train = labelled(tmp_path / "train.jsonl")
    evaluate = labelled(tmp_path / "evaluate.jsonl", 60, seed=1)
    return Data(**({"train": (train,), "evaluate": (evaluate,), "sequences": 4, "length": 32} | options))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = open_checkpoint(folder)
    return {name: found.read(name) for name in found.entries}


def made(tmp_path: Path, family: str = "bert", name: str = "clf", **options: Any) -> ps.Result:
    source = write_tiny(tmp_path / f"encoder-{family}", family)
    step = Finetune(**(SHORT | {"epochs": 6.0} | options))
    return ps.run(source, [step], out=tmp_path / name, data=data(tmp_path), console=Quiet(), dtype="fp32")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that several tests make smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "reload_check", lambda *_: ())
        return made(tmp_path_factory.mktemp("teacher")).folder


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_encoder_learns_the_classes_of_its_text_and_stock_transformers_loads_it(
    family: str, tmp_path: Path
) -> None:
    done = made(tmp_path, family)
    assert done.record.task == "classify" and done.measurements["accuracy"].value > 0.95
    assert "accuracy_ratio" not in done.measurements
    assert "same logits" in done.record.artifacts[0].checks[0]
    assert all(check.ok for check in ps.verify(done.folder))
    stock = AutoModelForSequenceClassification.from_pretrained(done.folder)
    assert stock.config.id2label == dict(enumerate(WORDS))
    assert done.record.recipe["steps"][0]["finetune"]["classes"] == tuple(WORDS)
    card = (done.folder / "README.md").read_text()
    assert (
        "pipeline_tag: text-classification" in card and 'pipeline("text-classification", model=".")' in card
    )
    classify = pipeline("text-classification", model=str(done.folder))
    assert classify("the fox and the lazy dog sleeps")[0]["label"] == "animal"
    AutoTokenizer.from_pretrained(done.folder)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_new_head_has_the_shapes_that_its_outline_says(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, family))
    outline = with_classes(model, ["x", "y", "z"])
    first, again, other = (begun(model, outline, seed, torch.device("cpu")) for seed in (0, 0, 1))
    shapes = {name: tuple(t.shape) for name, t in stored(skeleton(outline))}
    assert {name: entry.shape for name, entry in outline.checkpoint.entries.items()} == shapes
    own = dict(stored(first))
    for name, entry in outline.checkpoint.entries.items():
        if entry.file:
            assert torch.equal(own[name], model.weight(name.removeprefix(f"{model.arch.prefix}.")))
    assert all(torch.equal(t, dict(stored(again))[name]) for name, t in own.items())
    assert any(not torch.equal(t, dict(stored(other))[name]) for name, t in own.items())
    assert all(bool(t.isfinite().all()) for t in own.values())


def test_a_student_is_cut_out_of_a_classifier_and_taught(teacher: Path, tmp_path: Path) -> None:
    for options in ({"hard": 0.5, "hidden": 0.1}, {"relations": 1.0, "temperature": 2.0}):
        out = tmp_path / "-".join(options)
        steps = [Layers(keep=1), Distill(epochs=6.0, **SHORT, **options)]
        done = ps.run(teacher, steps, out=out, data=data(tmp_path), console=Quiet())
        assert done.measurements["accuracy_ratio"].value > 0.9
        assert {m.subject for m in done.record.measurements if m.name == "accuracy"} == {
            "original",
            "compressed",
        }
        assert AutoModelForSequenceClassification.from_pretrained(out).config.num_hidden_layers == 1


def test_text_that_nobody_labelled_teaches_beside_labelled_text(tmp_path: Path) -> None:
    """One recipe: labels make the classifier, and it teaches what is cut from it by all there is to read."""
    few = labelled(tmp_path / "few.jsonl", 60)
    many = tmp_path / "many.txt"
    rows = Path(labelled(tmp_path / "many.jsonl", 240, label=False, seed=3)).read_text().splitlines()
    many.write_text("\n\n".join(json.loads(row)["text"] for row in rows))
    source = write_tiny(tmp_path / "m", "bert")
    steps = [
        Finetune(epochs=20.0, **SHORT),
        Layers(keep=1, heal=False),
        Distill(epochs=4.0, hard=0.5, **SHORT),
    ]
    texts = data(tmp_path, train=(few, str(many)))
    done = ps.run(source, steps, out=tmp_path / "o", data=texts, console=Quiet())
    assert done.measurements["accuracy"].value > 0.9
    reports = {one.kind: one.training for one in done.record.steps}
    framed = 12  # ten words and two ends, each of them a token or more
    assert reports["finetune"].tokens >= 20 * 60 * framed
    assert reports["finetune"].epochs == pytest.approx(20, rel=0.02)
    of_all = reports["distill"].tokens / reports["distill"].epochs
    assert of_all == pytest.approx(5 * reports["finetune"].tokens / 20, rel=0.05)
    (found,) = (f for f in done.record.findings if f.code == "unlabelled-text")
    assert found.message.startswith(f"{many}: no labels, unlike other files that train")
    with pytest.raises(DataError, match="weigh: loss: some of its files have no labels"):
        step = Distill(epochs=1.0, weigh="loss", teacher=(str(done.folder),) * 2, **SHORT)
        ps.run(done.folder, [step], out=tmp_path / "p", data=texts, console=Quiet())
    assert not (tmp_path / ".p.work").exists()


def test_files_without_labels_are_read_as_they_are_made(tmp_path: Path) -> None:
    """Rows as a whole, with their pairs, however short; plain text by its empty lines; all of it named."""
    folder, few = (
        write_tiny(tmp_path / "m", "bert", classes=tuple(WORDS)),
        labelled(tmp_path / "few.jsonl", 30),
    )
    (tmp_path / "rows.csv").write_text("text\nok\nthe fox and the dog\n")
    (tmp_path / "pairs.jsonl").write_text('{"text": "the fox", "pair": "the dog\\n\\nsleeps"}\n')
    (tmp_path / "plain.txt").write_text("the lazy dog sleeps\n\nthe model answers dates\n\nok")
    files = (few, *(str(tmp_path / name) for name in ("rows.csv", "pairs.jsonl", "plain.txt")))
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    evaluate = labelled(tmp_path / "evaluate.jsonl", 60, seed=1)
    for given in ({"train": files}, {"calibrate": files}):
        chosen = Data(**given, evaluate=(evaluate,), sequences=2, length=16)
        texts = read_texts(chosen, tmp_path, model, trains=True)
        (found,) = (f for f in texts.findings if f.code == "unlabelled-text")
        assert "pairs.jsonl, " in found.message and "plain.txt" in found.message
        examples = labelled_examples(texts.train, tokenizer, length=32, classes=tuple(WORDS))
        own = examples.labels.tolist()
        assert len(own) == 35 and own.count(UNKNOWN) == 5 and min(own[:30]) >= 0
        rows = [examples.batch([i]).ids[0].tolist() for i in range(30, 35)]
        assert tokenizer("ok")["input_ids"] in rows
        assert tokenizer("the fox", "the dog\n\nsleeps")["input_ids"] in rows
        assert tokenizer("the lazy dog sleeps")["input_ids"] in rows
    sources = (Source((few,), label="label"), Source(files[1:]))
    texts = read_texts(Data(train=sources, evaluate=(evaluate,)), tmp_path, model, trains=True)
    assert len(texts.train.documents) == 34


def test_a_teacher_is_heard_on_text_without_labels_too(teacher: Path, tmp_path: Path) -> None:
    plain = labelled(tmp_path / "plain.jsonl", label=False, seed=2)
    texts = data(tmp_path, train=(plain,))
    steps = [Layers(keep=1), Distill(epochs=6.0, **SHORT)]
    done = ps.run(teacher, steps, out=tmp_path / "o", data=texts, console=Quiet())
    assert done.measurements["agreement"].value > 0.9


HEEDED: list[tuple[Any, str]] = [
    (Distill(epochs=1.0, hard=1.0, **SHORT), "hard"),
    (Distill(epochs=1.0, weigh="loss", teacher=("a", "b"), **SHORT), "weigh: loss"),
    (Distill(epochs=1.0, weigh="loss", soft=0.0, cosine=1.0, hard=1.0, **SHORT), "hard"),
    (Finetune(epochs=1.0, **SHORT), "finetune"),
    (Gradual(epochs=1.0, sparsity=0.5, soft=0.0, hard=1.0, **SHORT), "gradual"),
    (Gradual(epochs=1.0, sparsity=0.5, hard=1.0, **SHORT), "hard"),
]


@pytest.mark.parametrize(("step", "heeds"), HEEDED, ids=lambda one: getattr(one, "kind", one))
def test_text_without_labels_is_refused_before_any_work(
    step: Any, heeds: str, teacher: Path, tmp_path: Path
) -> None:
    """Steps before the one that would heed them do not begin either."""
    texts = data(tmp_path, train=(labelled(tmp_path / "plain.jsonl", label=False, seed=2),))
    with pytest.raises(DataError, match=f"its texts have no labels, which {heeds} needs"):
        ps.run(teacher, [Layers(keep=1), step], out=tmp_path / "p", data=texts, console=Quiet())
    assert not (tmp_path / "p").exists() and not (tmp_path / ".p.work").exists()


@pytest.mark.parametrize(("step", "heeds"), HEEDED, ids=lambda one: getattr(one, "kind", one))
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (("thing",) * 40, "all texts have the label 'thing'"),
        (("thing", "thing", "maths"), "'maths'; 2 of each"),
    ],
    ids=("one", "few"),
)
def test_labels_of_one_class_or_too_few_are_refused_before_any_work(
    rows: tuple[str, ...], said: str, step: Any, heeds: str, teacher: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(WORDS[name]), "label": name}) for name in rows))
    for texts in (
        data(tmp_path, train=(str(path),)),
        data(tmp_path, train=(), calibrate=(str(path),), length=4),
    ):
        with pytest.raises(DataError, match=said):
            ps.run(teacher, [Layers(keep=1), step], out=tmp_path / "p", data=texts, console=Quiet())
    assert not (tmp_path / "p").exists() and not (tmp_path / ".p.work").exists()
    plain = Distill(epochs=1.0, **SHORT)
    prepare(Recipe(str(teacher), (plain,), data=data(tmp_path, train=(str(path),))))  # it heeds none


def test_who_weighs_nobody_needs_no_labels(teacher: Path, tmp_path: Path) -> None:
    texts = data(tmp_path, train=(labelled(tmp_path / "plain.jsonl", label=False, seed=2),))
    step = Distill(epochs=1.0, weigh="loss", **SHORT)
    ps.run(teacher, [Layers(keep=1), step], out=tmp_path / "p", data=texts, console=Quiet())


def test_a_classifier_is_quantized_after_it_was_made(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "bert")
    steps = [Finetune(epochs=4.0, **SHORT), Rtn(scheme="W8A16")]
    done = ps.run(source, steps, out=tmp_path / "o", data=data(tmp_path), console=Quiet())
    assert done.measurements["accuracy"].value > 0.9
    assert all(check.ok for check in ps.verify(done.folder))


def test_shrink_keeps_accuracy(teacher: Path, tmp_path: Path) -> None:
    done = ps.shrink(teacher, out=tmp_path / "o", keep=0.95, data=data(tmp_path), console=Quiet())
    assert done.measurements["accuracy_ratio"].value >= 0.95
    assert "accuracy kept" in done.report(tmp_path / "r.html").read_text().lower()


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    whole = made(tmp_path).folder
    source = tmp_path / "encoder-bert"
    steps = [Finetune(**(SHORT | {"epochs": 6.0}))]
    with pytest.raises(KeyboardInterrupt):
        ps.run(source, steps, out=tmp_path / "o", data=data(tmp_path), console=Quiet(stop=40), dtype="fp32")
    ps.run(source, steps, out=tmp_path / "o", data=data(tmp_path), console=Quiet(), dtype="fp32")
    first, second = tensors(whole), tensors(tmp_path / "o")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_tenth_is_held_out_where_nothing_evaluates(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "bert")
    step = Finetune(epochs=1.0, **SHORT)
    texts = data(tmp_path, evaluate=())
    done = ps.run(source, [step], out=tmp_path / "o", data=texts, console=Quiet())
    (finding,) = [f for f in done.record.findings if f.code == "held-out"]
    evaluate, train = (next(t for t in done.record.texts if t.role == role) for role in ("evaluate", "train"))
    assert f"{evaluate.documents} texts" in finding.message
    assert evaluate.documents + train.documents == 240
    assert done.measurements["accuracy"].samples == evaluate.documents


def test_quality_without_labels_says_so(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m", "bert", classes=("a", "b"))
    calibrate, _ = write_texts(tmp_path)
    texts = Data((calibrate,), sequences=4, length=32)
    done = ps.run(model, [Rtn(scheme="W8A16")], out=tmp_path / "o", data=texts, console=Quiet())
    assert any(f.code == "no-labels" for f in done.record.findings)
    assert "accuracy" not in done.measurements and done.measurements["agreement"].value > 0.5


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"train": ()}, UsageError, "name labelled text as `train`"),
        ({"train": (Source(("plain.jsonl",)),)}, DataError, "line 1: has no label"),
        ({"evaluate": ("other.jsonl",)}, DataError, "other.jsonl: line 1: label 'else' is no class"),
        ({"evaluate": ("few.jsonl",)}, DataError, "2 labelled texts, 16 are needed"),
    ],
)
def test_labels_that_are_missing_or_unknown_are_refused_before_work(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    labelled(tmp_path / "plain.jsonl", label=False)
    (tmp_path / "other.jsonl").write_text('{"text": "the fox", "label": "else"}\n' * 20)
    labelled(tmp_path / "few.jsonl", 2)
    source = write_tiny(tmp_path / "m", "bert")
    recipe = Recipe(
        str(source), (Finetune(epochs=1.0, **SHORT),), data=data(tmp_path, **options), base=tmp_path
    )
    with pytest.raises(error, match=message):
        prepare(recipe)


def test_teachers_that_know_other_classes_or_none_are_refused(tmp_path: Path) -> None:
    student = write_tiny(tmp_path / "s", "bert", classes=tuple(WORDS))
    others = {
        "e": (write_tiny(tmp_path / "e", "bert"), "is no classifier"),
        "c": (
            write_tiny(tmp_path / "c", "bert", classes=("animal", "art", "thing")),
            "'art' where the student",
        ),
        "f": (write_tiny(tmp_path / "f", "bert", classes=("animal", "maths")), "2 of them, the student 3"),
    }
    for name, (teacher, message) in others.items():
        step = Distill(epochs=1.0, teacher=str(teacher), **SHORT)
        with pytest.raises(UnsupportedError, match=message):
            ps.run(student, [step], out=tmp_path / f"o{name}", data=data(tmp_path), console=Quiet())
    with pytest.raises(UnsupportedError, match="is to classify, the student to embed"):
        step = Distill(epochs=1.0, teacher=str(student), **SHORT)
        ps.run(tmp_path / "e", [step], out=tmp_path / "p", data=data(tmp_path), console=Quiet())


@pytest.mark.parametrize("classes", ["ab", ["a"], ["a", "a"]])
def test_classes_that_are_none_are_refused(classes: Any) -> None:
    with pytest.raises(UsageError, match="finetune: classes is auto or a list"):
        Finetune(classes=classes)


def test_classes_are_an_encoders_alone(tmp_path: Path) -> None:
    step = Finetune(classes=("a", "b"))
    assert step.resolve(load(write_tiny(tmp_path / "e", "bert")), ()).epochs == 3
    with pytest.raises(UsageError, match="llama writes text"):
        step.resolve(load(write_tiny(tmp_path / "l", "llama")), ())
    with pytest.raises(UsageError, match="the model's own are x, y"):
        step.resolve(load(write_tiny(tmp_path / "c", "bert", classes=("x", "y"))), ())


def test_the_plan_knows_the_classifier_and_the_time(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "bert")
    steps = [Finetune(epochs=2.0, **SHORT)]
    plan = ps.plan(source, steps, out=tmp_path / "o", data=data(tmp_path), console=Quiet())
    assert plan.exit_code == 0
    assert any(stage.name == "finetune" and (stage.time_s or 0) > 0 for stage in plan.stages)
    done = ps.run(source, steps, out=tmp_path / "o", data=data(tmp_path), console=Quiet())
    assert plan.exports[0].bytes == done.record.artifacts[0].bytes


def test_a_recipe_names_columns_and_finetuning_is_a_command(tmp_path: Path) -> None:
    lines = ["says,is"] + [f"the {WORDS[c][i % 4]} is {i},{c}" for i in range(70) for c in WORDS]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    raw = {
        "model": str(write_tiny(tmp_path / "m", "bert")),
        "data": {
            "train": {"files": "rows.csv", "column": "says", "label": "is"},
            "length": 32,
            "sequences": 4,
        },
        "steps": [{"finetune": {"epochs": 1, "length": 32}}],
    }
    recipe = parse_recipe(yaml.safe_load(yaml.safe_dump(raw)), base=tmp_path)
    done = ps.run(recipe, out=tmp_path / "a", console=Quiet())
    assert load(done.folder).config.id2label == dict(enumerate(WORDS))
    train = labelled(tmp_path / "train.jsonl")
    words = ["finetune", str(tmp_path / "m"), "--train", train, "--budget", "1epochs", "--set", "length=32"]
    ran = CliRunner().invoke(command, [*words, "--length", "32", "-o", str(tmp_path / "b")], obj=[])
    assert ran.exit_code == 0, ran.output
    assert "accuracy" in ran.output and "held out" in ran.output.replace("\n", " ")
    shown = CliRunner().invoke(command, ["inspect", str(tmp_path / "b")], obj=[])
    assert "to classify" in shown.output and "classes: animal, maths, thing" in shown.output
    told = CliRunner().invoke(command, ["measure", str(tmp_path / "b"), "--data", train, "--json"], obj=[])
    names = {m["name"] for m in json.loads(told.output)["measurements"]}
    assert {"accuracy", "macro_f1", "above_chance", "input_time"} <= names


WAYS = {
    "width and tokens": [{"student": {"hidden": 32, "heads": 2, "ffn": 64, "vocabulary": 200}}],
    "share": [{"student": {"remove": 0.25, "importance": "taylor"}}],
    "heads by what is missed": [{"student": {"heads": 2, "hidden": 32, "importance": "kl"}}],
}


# Of MobileBERT only channels can go; of the tiny ELECTRA 32 channels are as many as its embedding has.
WIDER = {"hidden": 48, "heads": 3}


@pytest.mark.parametrize(
    "way,family",
    [(way, family) for way in WAYS for family in CUT if way == "share" or family != "mobilebert"],
)
def test_a_classifier_becomes_narrower_and_is_taught(way: str, family: str, tmp_path: Path) -> None:
    """The head for its classes is as wide as the model, and keeps all classes."""
    source = write_tiny(tmp_path / "m", family, classes=tuple(WORDS))
    steps: list[Any] = [*map(parse_step, WAYS[way]), Distill(epochs=1.0, **SHORT)]
    if family == "electra" and way != "share":
        steps[0] = replace(steps[0], **WIDER)
    options = {"out": tmp_path / "o", "data": data(tmp_path), "console": Quiet()}
    plan = ps.plan(source, steps, **options)
    done = ps.run(source, steps, **options)
    assert plan.exit_code == 0 and plan.exports[0].bytes == done.record.artifacts[0].bytes
    stock = AutoModelForSequenceClassification.from_pretrained(done.folder)
    assert stock.config.num_labels == 3 and stock.num_parameters() < load(source).origin.parameters
    assert "class_kl" in done.measurements


def test_a_classifier_cannot_be_built_and_the_way_out_is_said(teacher: Path, tmp_path: Path) -> None:
    step = Student(family="bert", layers=1, hidden=32)
    plan = ps.plan(teacher, [step], out=tmp_path / "o", data=data(tmp_path), console=Quiet())
    assert plan.exit_code == 4 and all("is a classifier; cut it" in one.reason for one in plan.impossible)


@pytest.mark.parametrize(
    "rest",
    [
        ["gptq"],
        [{"prune": {"pattern": "2:4"}}],
        [{"prune": {"score": "taylor"}}],
        [{"layers": {"keep": 1}}, {"prune": {}}, "smoothquant"],
    ],
    ids=str,
)
def test_what_follows_a_new_head_is_rehearsed(rest: list[Any], tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "bert")
    steps = [Finetune(epochs=1.0, **SHORT), *map(parse_step, rest)]
    options = {"out": tmp_path / "o", "data": data(tmp_path), "console": Quiet(), "export": ["folder"]}
    plan = ps.plan(source, steps, **options)
    assert plan.exit_code == 0 and all(stage.time_s is not None for stage in plan.stages)
    assert plan.exports[0].bytes == ps.run(source, steps, **options).record.artifacts[0].bytes


def test_the_classifier_that_a_recipe_makes_teaches_what_is_cut_from_it(tmp_path: Path) -> None:
    """One recipe from an encoder to a small classifier: the whole one is the teacher, not what was cut."""
    source = write_tiny(tmp_path / "m", "bert")
    first, cut = Finetune(epochs=4.0, **SHORT), Layers(keep=1)
    options = {"data": data(tmp_path), "console": Quiet(), "dtype": "fp32"}
    whole = ps.run(source, [first], out=tmp_path / "whole", **options)
    apart = ps.run(whole.folder, [cut, Distill(epochs=2.0, **SHORT)], out=tmp_path / "apart", **options)
    steps = [first, cut, Distill(epochs=2.0, **SHORT)]
    assert ps.plan(source, steps, out=tmp_path / "o", **options).exit_code == 0
    done = ps.run(source, steps, out=tmp_path / "o", **options)
    wanted = tensors(apart.folder)
    assert all(torch.equal(T, wanted[name]) for name, T in tensors(done.folder).items())


def test_an_encoder_without_labels_to_judge_by_is_told(tmp_path: Path) -> None:
    plain = labelled(tmp_path / "plain.jsonl", 60, label=False, seed=1)
    source, texts = write_tiny(tmp_path / "m", "bert"), data(tmp_path, evaluate=(plain,), sequences=999)
    done = ps.run(source, [Finetune(epochs=1.0, **SHORT)], out=tmp_path / "o", data=texts, console=Quiet())
    said = {finding.code: finding.message for finding in done.record.all_findings}
    assert "nothing is told of it" in said["no-labels"] and "little-text" not in said
