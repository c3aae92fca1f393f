"""What a training would refuse once it is its turn is refused before any work, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pocketsize as ps
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import DataError, IntegrityError, PocketsizeError, UnsupportedError, UsageError
from pocketsize.models.load import described, load
from pocketsize.recipes import beforehand, training
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.recipes.run import prepare
from pocketsize.recipes.step import Ahead, Step
from pocketsize.recipes.student import Student
from quiet import Quiet
from tiny import rename_token, write_texts, write_tiny

SHORT: dict[str, Any] = {"batch": 4, "length": 32, "rate": 1e-3, "tokens": 1024}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that teach, or cannot; and texts."""
    folder = tmp_path_factory.mktemp("beforehand")
    write_tiny(folder / "model", "llama", blocks=3)
    write_tiny(folder / "seeds", "llama", blocks=3, seed=5)
    write_tiny(folder / "shallow", "llama", blocks=1)
    write_tiny(folder / "encoder", "bert")
    rename_token(write_tiny(folder / "other", "llama"), 150)
    write_texts(folder)
    (folder / "short.txt").write_text("one two")
    return folder


def data(place: Path, text: str = "calibrate.txt") -> Data:
    return Data(
        calibrate=(str(place / "calibrate.txt"),),
        evaluate=(str(place / "evaluate.txt"),),
        train=(str(place / text),),
        sequences=4,
        length=32,
        tokens=256,
    )


def recipe(place: Path, *steps: Step, text: str = "calibrate.txt") -> Recipe:
    return Recipe(str(place / "model"), steps, data=data(place, text))


def distill(place: Path, **options: Any) -> Distill:
    if "teacher" in options:
        options["teacher"] = str(place / options["teacher"])
    return Distill(**(SHORT | options))


REFUSED: list[tuple[dict[str, Any], type[PocketsizeError], str]] = [
    ({"teacher": "nosuch"}, UsageError, "distill: teacher: .*nosuch: no such folder"),
    ({"teacher": "other"}, UnsupportedError, "teacher other: token 150 of the student"),
    ({"teacher": "other", "written": "teacher"}, UnsupportedError, "token 150"),
    ({"teacher": "encoder"}, UnsupportedError, "teacher encoder is to embed, the student to generate"),
    ({"attention": 1.0}, UnsupportedError, "grouped queries"),
    ({"relations": 1.0, "heads": 7}, UsageError, "heads: 7 do not divide"),
    ({"teacher": "shallow", "hidden": 1.0}, UnsupportedError, "2 blocks cannot follow a teacher of 1"),
    ({"teacher": "shallow", "progressive": 0.5}, UnsupportedError, "2 blocks cannot follow a teacher of 1"),
    ({"progressive": 0.1}, UsageError, "too few for 2 blocks"),
    ({"signals": "top_k", "kept": 5000}, UsageError, "kept: 5000 of a vocabulary"),
]


@pytest.mark.parametrize(("options", "kind", "said"), REFUSED, ids=str)
def test_a_wrong_teacher_is_found_before_the_first_step_and_leaves_no_work(
    options: dict[str, Any],
    kind: type[PocketsizeError],
    said: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Layers, "apply", lambda *_: pytest.fail("a step began"))
    steps = [Layers(keep=2), distill(place, **options)]
    with pytest.raises(kind, match=said):
        ps.run(place / "model", steps, out=tmp_path / "o", data=data(place), console=Quiet())
    assert not list(tmp_path.iterdir())
    with pytest.raises(kind, match=said):
        ps.plan(Recipe(str(place / "model"), tuple(steps), data=data(place)), console=Quiet())


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Distill(**SHORT, generations=2), "too few to hold some out"),
        (Distill(**SHORT, patience=1), "too few to hold some out; use patience: 0"),
        (Finetune(**SHORT, patience=1), "too few to hold some out; use patience: 0"),
        (Qat(**SHORT), "too few to hold some out"),
        (Gradual(**SHORT | {"tokens": 1}, sparsity=0.5), "give it a larger budget"),
    ],
    ids=str,
)
def test_text_that_is_too_short_is_found_before_the_first_step(step: Step, said: str, place: Path) -> None:
    with pytest.raises((DataError, UsageError), match=said):
        prepare(recipe(place, Layers(keep=2), step, text="short.txt"))


def test_a_cache_of_another_teacher_is_found_before_the_first_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "said")
    first = [Layers(keep=2), distill(place, signals="top_k", cache=cache)]
    ps.run(place / "model", first, out=tmp_path / "o", data=data(place), console=Quiet(), dtype="fp32")
    prepare(recipe(place, *first))
    prepare(recipe(place, Layers(keep=1), first[1]))
    prepare(recipe(place, distill(place, signals="top_k", cache=cache, teacher="model")))
    for options, said in (
        ({"teacher": "seeds"}, "teacher 1 weights"),
        ({"kept": 8}, "kept"),
        ({"length": 24}, "tokens of the text"),
    ):
        wrong = distill(place, **({"signals": "top_k", "cache": cache} | options))
        with pytest.raises(IntegrityError, match=said):
            prepare(recipe(place, Layers(keep=2), wrong))
    with pytest.raises(IntegrityError, match="holds other things"):
        prepare(recipe(place, distill(place, signals="top_k", cache=str(place))))
    prepare(recipe(place, distill(place, signals="top_k", cache=str(tmp_path / "new"))))
    assert not (tmp_path / "new").exists()


def test_what_only_the_work_of_a_step_tells_is_left_to_the_training(place: Path) -> None:
    """Of tokens that a student keeps a teacher may have all, even where it lacks others."""
    prepare(recipe(place, Student(vocabulary=280), distill(place, teacher="other")))
    prepare(recipe(place, Student(vocabulary="corpus"), distill(place, teacher="other")))
    built = Student(family="qwen2", layers=1, hidden=32, heads=2, ffn=64, vocabulary=280)
    prepare(recipe(place, built, distill(place)))


def test_a_described_model_has_shapes_and_no_hash(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(place / "model")
    monkeypatch.setattr("pocketsize.models.load.is_finite", lambda *_: pytest.fail("a number was looked at"))
    found = described(place / "model")
    assert found.checkpoint.entries == whole.checkpoint.entries and found.origin.name == whole.origin.name
    assert not found.origin.sha256


def test_no_more_text_is_read_than_tells_that_there_is_enough(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = load(place / "model"), list[int]()
    corpus = Corpus("words", tuple(Document(str(i), "one two three four five " * 50) for i in range(40)))
    real = training.examples_of

    def counted(given: Corpus, *args: Any, **keys: Any) -> Any:
        read.append(sum(len(one.text) for one in given.documents))
        return real(given, *args, **keys)

    monkeypatch.setattr(training, "examples_of", counted)
    monkeypatch.setattr(beforehand, "BEGINNING", 3000)
    ahead = Ahead(model, corpus, 0)
    beforehand._require_text(Distill(**SHORT), model, ahead)
    assert read == [3000]
    with pytest.raises(UsageError, match="too few for 3 blocks"):
        beforehand._require_text(Distill(**SHORT | {"tokens": 512}, progressive=0.1), model, ahead)
    assert read == [3000, 3000, 40 * 24 * 50]
