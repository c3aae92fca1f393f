"""Ways of teaching as a recipe has them: cached, several, written, on the student's own text, generations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketsize.data.text import Corpus, Document
from pocketsize.errors import IntegrityError, Stopped, UnsupportedError, UsageError
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes import signals as hearing
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.step import Context
from pocketsize.training import loop
from tiny import rename_token, write_texts, write_tiny, write_weights

SHORT: Mapping[str, Any] = {"batch": 4, "length": 32, "rate": 1e-3, "tokens": 2048}


def corpus(folder: Path) -> Corpus:
    text = Path(write_texts(folder)[0]).read_text()
    return Corpus("words", tuple(Document(f"{a}", text[a : a + 2000]) for a in range(0, 8000, 2000)))


def context(folder: Path, original: Model, **others: Any) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    journal = open_journal(folder / "work", {}, **others)
    return Context(ids, ids == 0, journal, lambda *_: None, original=original, corpus=corpus(folder))


def taught(folder: Path, student: Model, original: Model, **options: Any) -> tuple[Model, Context]:
    ctx = context(folder, original)
    step = Distill(**{**SHORT, **options}).resolve(student, ("folder",))
    return step.apply(student, ctx), ctx


def weights(model: Model) -> dict[str, Tensor]:
    return {name: model.weight(name) for name in model.checkpoint.entries}


def same(a: Model, b: Model) -> bool:
    x, y = weights(a), weights(b)
    return all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("tiny") / "m", "llama"))


@pytest.fixture(scope="module")
def student(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of its first block alone."""
    return Layers(keep=1).apply(model, context(tmp_path_factory.mktemp("short"), model))


def losses(ctx: Context) -> list[float]:
    report = ctx.reports[-1].training
    assert report is not None
    return [loss for _, loss in report.losses]


def test_a_teacher_that_is_kept_whole_teaches_as_a_live_one(
    model: Model, student: Model, tmp_path: Path
) -> None:
    _, live = taught(tmp_path / "a", student, model)
    _, cached = taught(tmp_path / "b", student, model, signals="top_k", kept=320)
    assert losses(cached) == pytest.approx(losses(live), abs=5e-3)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_a_second_run_reuses_what_was_kept(
    kind: str, model: Model, student: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "said")
    first, _ = taught(tmp_path / "a", student, model, signals=kind, cache=cache)
    monkeypatch.setattr(hearing, "frozen", lambda *_: pytest.fail("a teacher was loaded"))
    second, _ = taught(tmp_path / "b", student, model, signals=kind, cache=cache, average=0.9)
    third, _ = taught(tmp_path / "c", student, model, signals=kind, cache=cache)
    assert same(first, third) and not same(first, second)


def test_more_text_is_heard_as_it_is_needed(model: Model, student: Model, tmp_path: Path) -> None:
    cache = tmp_path / "said"
    taught(tmp_path / "a", student, model, signals="top_k", cache=str(cache), tokens=256)
    few = len(list((cache / "parts").iterdir()))
    longer, _ = taught(tmp_path / "b", student, model, signals="top_k", cache=str(cache), tokens=4096)
    at_once, _ = taught(tmp_path / "c", student, model, signals="top_k", tokens=4096)
    assert few >= 1 and len(list((cache / "parts").iterdir())) > few
    assert same(longer, at_once)


def test_held_out_text_is_heard_too(model: Model, student: Model, tmp_path: Path) -> None:
    _, ctx = taught(tmp_path, student, model, signals="top_k", patience=3, tokens=32_000)
    report = ctx.reports[-1].training
    assert report is not None and report.looks


def test_what_another_teacher_said_is_refused(model: Model, student: Model, tmp_path: Path) -> None:
    cache = str(tmp_path / "said")
    taught(tmp_path / "a", student, model, signals="top_k", cache=cache)
    other = load(write_tiny(tmp_path / "o", "llama", seed=5))
    with pytest.raises(IntegrityError, match="teacher 1 weights"):
        taught(tmp_path / "b", student, other, signals="top_k", cache=cache)
    with pytest.raises(IntegrityError, match="tokens of the text"):
        taught(tmp_path / "c", student, model, signals="top_k", cache=cache, length=24)


def permuted(model: Model, folder: Path) -> Model:
    """The same model with its tokens numbered otherwise: of two tokens each has the other's number."""
    for path in model.folder.iterdir():
        (folder).mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    order = torch.arange(int(model.config.vocab_size))
    by_number = {number: token for token, number in vocabulary.items()}
    # Special tokens, and the first tokens by which BPE merges, keep their places in the file alone.
    for a in range(10, 200, 2):
        order[a], order[a + 1] = a + 1, a
        vocabulary[by_number[a]], vocabulary[by_number[a + 1]] = a + 1, a
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    stored = open_checkpoint(model.folder)
    tensors = {name: stored.read(name) for name in stored.entries}
    write_weights(folder, {n: T[order] if "embed" in n else T for n, T in tensors.items()})
    return load(folder)


def test_a_teacher_that_numbers_tokens_otherwise_is_understood(model: Model, tmp_path: Path) -> None:
    """The same model under other numbers has nothing to teach at first."""
    other = permuted(model, tmp_path / "p")
    _, ctx = taught(tmp_path / "a", other, model, teacher=str(model.folder))
    assert losses(ctx)[0] < 1e-6
    _, ctx = taught(tmp_path / "b", other, model, teacher=str(model.folder), signals="top_k", kept=320)
    assert losses(ctx)[0] < 5e-3


def test_a_teacher_without_a_token_is_refused_by_it(model: Model, tmp_path: Path) -> None:
    other = permuted(model, tmp_path / "p")
    rename_token(other.folder, 150)
    with pytest.raises(UnsupportedError, match="token 150 of the student"):
        taught(tmp_path / "a", load(other.folder), model, teacher=str(model.folder))


def test_several_teachers_by_their_shares(model: Model, student: Model, tmp_path: Path) -> None:
    others = [str(write_tiny(tmp_path / f"t{seed}", "llama", seed=seed)) for seed in (3, 4)]
    alone, _ = taught(tmp_path / "a", student, model, teacher=others[0])
    nearly, _ = taught(tmp_path / "b", student, model, teacher=others, shares=[1.0, 1e-9])
    equal, _ = taught(tmp_path / "c", student, model, teacher=others)
    halves, _ = taught(tmp_path / "d", student, model, teacher=others, shares=[2, 2])
    by_loss, _ = taught(tmp_path / "e", student, model, teacher=others, weigh="loss")
    name = student.linears[0]
    assert torch.allclose(alone.weight(name), nearly.weight(name), atol=1e-4)
    assert same(equal, halves) and not same(equal, by_loss) and not same(equal, alone)


def test_what_several_teachers_say_is_kept_as_one(model: Model, student: Model, tmp_path: Path) -> None:
    both = [str(write_tiny(tmp_path / f"t{seed}", "llama", seed=seed)) for seed in (3, 4)]
    _, live = taught(tmp_path / "a", student, model, teacher=both, weigh="loss")
    _, cached = taught(tmp_path / "b", student, model, teacher=both, weigh="loss", signals="top_k", kept=320)
    assert losses(cached) == pytest.approx(losses(live), abs=5e-3)


def test_a_student_without_text_learns_what_its_teacher_writes(
    model: Model, student: Model, tmp_path: Path
) -> None:
    found, ctx = taught(tmp_path / "a", student, model, written="teacher", written_tokens=600)
    again, _ = taught(tmp_path / "b", student, model, written="teacher", written_tokens=600)
    assert same(found, again)
    report = ctx.reports[-1].training
    assert report is not None and report.epochs == pytest.approx(2048 / 1024)  # 32 windows of 32
    true, _ = taught(tmp_path / "c", student, model, written="teacher", soft=0.0, hard=1.0)
    assert not same(found, true)


@pytest.mark.parametrize("replay", [0.0, 0.7])
def test_what_the_student_writes_is_the_same_after_a_break(
    replay: float, model: Model, student: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SHORT, "on_policy": 0.8, "replay": replay}
    whole, _ = taught(tmp_path / "a", student, model, **options)
    live, _ = taught(tmp_path / "live", student, model)
    assert not same(whole, live)
    asked = list[int]()

    def stopping() -> bool:
        asked.append(1)
        return len(asked) == 9

    def stop(where: str) -> None:
        if len(asked) == 9:
            asked.append(1)
            raise Stopped(where)

    first = context(tmp_path / "b", model, safe_point=stop, stopping=stopping)
    step = Distill(**options).resolve(student, ("folder",))
    with pytest.raises(Stopped):
        step.apply(student, first)
    assert same(step.apply(student, context(tmp_path / "b", model)), whole)
    assert loop.EVERY_S == 60


def test_generations_are_kept_while_they_are_better(model: Model, student: Model, tmp_path: Path) -> None:
    options = {"generations": 3, "rate": 3e-3}
    found, ctx = taught(tmp_path / "a", student, model, **options)
    stages = ctx.reports[-1].stages
    kept = [stage.divergence for stage in stages if stage.kept]
    assert kept == sorted(kept, reverse=True) and len(kept) >= 1
    assert all(stage.kept for stage in stages[:-1])
    dropped = [f for f in ctx.findings if f.code == "generation-dropped"]
    assert len(dropped) == (not stages[-1].kept)
    assert ctx.reports[-1].training is not None and len(ctx.reports) == 1
    assert same(found, taught(tmp_path / "b", student, model, **options)[0])


def test_the_second_generation_is_taught_by_the_first(
    model: Model, student: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = taught(tmp_path / "a", student, model, generations=1)
    monkeypatch.setattr(
        "pocketsize.recipes.generations._loss", lambda s, j: -float(len(seen.append(s) or seen))
    )
    seen: list[Model] = []
    last, ctx = taught(tmp_path / "b", student, model, generations=2)
    by_hand, _ = taught(tmp_path / "c", student, seen[0], generations=1)
    assert [stage.kept for stage in ctx.reports[-1].stages] == [True, True]
    assert same(last, seen[1]) and not same(last, first) and not same(last, by_hand)  # 16 texts judge


def test_blocks_first_then_all_of_the_student(model: Model, student: Model, tmp_path: Path) -> None:
    _, ctx = taught(tmp_path / "a", model, load(write_tiny(tmp_path / "t", "llama", seed=3)), progressive=0.5)
    own = losses(ctx)
    assert len(own) == 16
    assert own[3] < own[0] and own[7] < own[4]  # each block in its turn
    encoder, other = write_tiny(tmp_path / "e", "bert"), write_tiny(tmp_path / "f", "bert", seed=3)
    for path in encoder.glob("*token*"):
        (other / path.name).write_bytes(path.read_bytes())
    taught(tmp_path / "b", load(encoder), load(other), progressive=0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"signals": "topk"}, "did you mean 'top_k'"),
        ({"signals": "top_k", "kept": 0}, "kept must be"),
        ({"cache": "x"}, "leave nothing to keep"),
        ({"signals": "top_k", "loss": "js"}, "forward_kl needs"),
        ({"signals": "top_k", "temperature": 2.0}, "at temperature 1"),
        ({"signals": "sampled", "hidden": 1.0}, "inside the teacher"),
        ({"signals": "sampled", "on_policy": 0.5}, "what the student writes"),
        ({"signals": "top_k", "cache": "x", "generations": 2}, "of one run alone"),
        ({"on_policy": 1.5}, "a share from 0 to 1"),
        ({"replay": 0.5}, "nothing was written"),
        ({"on_policy": 0.5, "soft": 0.0, "hard": 1.0}, "has to judge"),
        ({"on_policy": 0.5, "sharded": True}, "texts of different lengths"),
        ({"written": "student"}, "null or teacher"),
        ({"teacher": []}, "an empty list"),
        ({"teacher": ["a", "b"], "shares": [1.0]}, "for each of the 2 teachers"),
        ({"teacher": ["a", "b"], "shares": [1.0, 0.0]}, "above 0"),
        ({"teacher": ["a", "b"], "shares": [1.0, 2.0], "weigh": "loss"}, "keep one of them"),
        ({"progressive": 1.0}, "below 1"),
        ({"progressive": 0.5, "tokens": None, "minutes": 1}, "no minutes"),
        ({"progressive": 0.5, "recompute": True}, "no recompute"),
        ({"generations": 0}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Distill(**{**SHORT, **options})


def test_too_few_batches_for_all_blocks(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few for 2 blocks"):
        taught(tmp_path, model, model, progressive=0.05)


@pytest.mark.parametrize(
    "options", [{"signals": "top_k"}, {"on_policy": 0.5}, {"written": "teacher"}, {"generations": 2}]
)
def test_encoders_predict_nothing_to_be_kept_or_written(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(options))):
        Distill(**{**SHORT, **options}).resolve(load(write_tiny(tmp_path / "m", "bert")), ("folder",))
