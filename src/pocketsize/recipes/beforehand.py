"""What steps that train would refuse once it is their turn, looked for before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pocketsize.data.labels import by_labels, classes_of
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import DataError, UsageError
from pocketsize.models.model import Model
from pocketsize.recipes.classifier import classes_in
from pocketsize.recipes.distill import Distill
from pocketsize.recipes.labels import require_heeded
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.record import Finding
from pocketsize.recipes.rotate import Rotate
from pocketsize.recipes.step import Ahead, Step
from pocketsize.recipes.student import Student
from pocketsize.recipes.texts import Texts
from pocketsize.recipes.training import Training, examples_from

# Letters of text in which any training finds out whether there is enough of it.
BEGINNING = 1_000_000


def require_lessons(recipe: Recipe, original: Model, texts: Texts) -> list[Finding]:
    """Refuse labels, teachers, caches and text that a training of a resolved recipe would refuse.

    Given is what there is to say of the trainings that are not refused.
    The models that earlier steps make are known by their outlines. What only their work tells (which tokens
    a student keeps, the weights of a turned teacher) is left to the training.
    """
    if require_heeded(recipe.steps, original, texts.train):
        _require_classes(recipe, texts)
    calibrated = any(step.calibrated for step in recipe.steps)
    own = bool(recipe.data.written_windows) and calibrated and not recipe.data.train
    model = teacher = original
    unknown, found = False, list[Finding]()
    for step in recipe.steps:
        if isinstance(step, Training):
            ahead = Ahead(teacher, texts.train, recipe.data.seed, unknown, own)
            if isinstance(step, Distill):
                step.require(model, ahead)
            found += _about_length(step, model)
            if step.reads:
                _require_text(step, step.outline(model), ahead)
        model = with_all_tokens(step).outline(model)
        unknown |= isinstance(step, Rotate) or (isinstance(step, Student) and step.vocabulary is not None)
        if model.arch.task != teacher.arch.task:  # a classifier was made, which is who teaches from now on
            teacher = model
    return found


def _about_length(step: Training, model: Model) -> Iterator[Finding]:
    """A finding where the model reads less than a training would have it read."""
    if step.length > model.positions:
        said = f"{step.kind}: windows of {model.positions} tokens instead of {step.length}"
        yield Finding("shorter-windows", f"{said}: the model reads no more")


def _require_classes(recipe: Recipe, texts: Texts) -> None:
    """Refuse labels of one class only, and classes of one text, as they are before any is held out."""
    if recipe.data.train:
        classes_in(recipe.data.train, recipe.base)
    else:
        classes_of(by_labels(texts.train)[0])


def with_all_tokens(step: Step) -> Step:
    """The step as it is foreseen: which tokens a student keeps is not known yet, and texts have others."""
    if not isinstance(step, Student) or not isinstance(step.vocabulary, int):
        return step
    return replace(step, vocabulary="corpus" if step.family is None else None)


def _require_text(step: Training, model: Model, ahead: Ahead) -> None:
    """Refuse text that is too little for the step. Where its beginning is enough, no more of it is read."""
    some = _beginning(ahead.corpus)
    try:
        step.require_enough(model, examples_from(some, model, step.length), ahead)
    except (DataError, UsageError):
        if some is ahead.corpus:
            raise
        step.require_enough(model, examples_from(ahead.corpus, model, step.length), ahead)


def _beginning(corpus: Corpus) -> Corpus:
    """So many letters of it, and what is left of a row; the corpus itself if it has no more."""
    left, parts = BEGINNING, list[Document]()
    for document in corpus.documents:
        if left <= 0:
            break
        text = document.text.lstrip()[:left] if document.label is None else document.text
        parts.append(replace(document, text=text))
        left -= len(text)
    return corpus if left > 0 else replace(corpus, documents=tuple(parts))
