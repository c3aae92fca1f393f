"""Who teaches: the models that a step names, their tokens, and what each counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketsize.distillation.vocabulary import aligned
from pocketsize.errors import PocketsizeError, UnsupportedError, UsageError
from pocketsize.measurement.classes import classes_named
from pocketsize.models.device import working_device
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.recipes.step import Context
from pocketsize.training.objective import Teacher

WEIGH = ("equal", "loss")


@dataclass(frozen=True)
class Taught:
    """The keys that name teachers.

    `teacher` is a model or a list of them, null for the one that the run began with; of several `weigh` says
    how much each counts: `equal`, or by its `loss` on each text; or `shares` gives a number for each.
    """

    teacher: str | tuple[str, ...] | None = None
    weigh: str = "equal"
    shares: tuple[float, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers that are named."""
        named = (self.teacher,) if isinstance(self.teacher, str) else self.teacher
        return tuple(named or ())


def check_teachers(step: Taught) -> None:
    """Refuse a list of nobody, and shares that are not those of the teachers."""
    if step.teacher is not None and not step.names:
        raise UsageError("distill: teacher: an empty list; name a model, or leave it out for the original")
    if step.weigh not in WEIGH:
        raise UsageError(f"distill: weigh is {' or '.join(WEIGH)}, got {step.weigh!r}")
    if step.shares is None:
        return
    count = max(1, len(step.names))
    sound = all(isinstance(x, int | float) and 0 < x < float("inf") for x in step.shares)
    if len(step.shares) != count or not sound:
        raise UsageError(
            f"distill: shares: a number above 0 for each of the {count} teachers, got {list(step.shares)}"
        )
    if step.weigh == "loss":
        raise UsageError("distill: shares are fixed and weigh: loss is not; keep one of them")


def teachers_of(step: Taught, ctx: Context) -> list[Model]:
    """The models that teach: where none is named the original, or the classifier that was made of it."""
    if not step.names:
        assert ctx.original is not None
        return [ctx.classifier or ctx.original]
    return named_teachers(step, load)


def named_teachers(step: Taught, opened: Callable[[str], Model]) -> list[Model]:
    """The teachers that a step names; errors say that it is one of those."""
    try:
        return [opened(name) for name in step.names]
    except PocketsizeError as error:
        raise type(error)(f"distill: teacher: {error}") from error


def maps_of(student: Model, teachers: Sequence[Model]) -> list[Tensor | None]:
    """Each teacher's number for each of the student's tokens; None where they are the same."""
    return [_same_tokens(student, one) for one in teachers]


def require_same_task(student: Model, teachers: Sequence[Model]) -> None:
    """Refuses teachers that do something else than the student, and two that cannot be followed at once."""
    if student.arch.task == "embed" and len(teachers) > 1:
        raise UnsupportedError("distill: teachers of an embedder point in unrelated directions; name one")
    if student.arch.task == "classify":
        _require_same_classes(student, teachers)
    elif others := [one for one in teachers if one.arch.task != student.arch.task]:
        raise UnsupportedError(
            f"distill: teacher {others[0].origin.name} is to {others[0].arch.task}, the student to "
            f"{student.arch.task}; name a teacher of the same task"
        )


def _require_same_classes(student: Model, teachers: Sequence[Model]) -> None:
    """Refuses teachers of a classifier that are none, or have other classes."""
    for teacher in teachers:
        name = teacher.origin.name
        if teacher.arch.task != "classify":
            raise UnsupportedError(
                f"distill: teacher {name}: is no classifier; fine-tune one first (`pocketsize finetune`) and "
                "name its folder as teacher"
            )
        both = zip(classes_named(student), classes_named(teacher), strict=False)
        odd = next((f"{b!r} where the student has {a!r}" for a, b in both if a != b), None)
        counts = [len(classes_named(model)) for model in (teacher, student)]
        if odd is not None or counts[0] != counts[1]:
            told = odd or f"{counts[0]} of them, the student {counts[1]}"
            raise UnsupportedError(f"distill: teacher {name}: has other classes: {told}")


def frozen(
    teachers: Sequence[Model], maps: Sequence[Tensor | None], shares: Sequence[float] | None
) -> list[Teacher]:
    """The teachers in memory."""
    device = working_device()
    return [
        Teacher(materialise(one, torch.float32, device), ids if ids is None else ids.to(device), share)
        for one, ids, share in zip(teachers, maps, shares or [1.0] * len(teachers), strict=True)
    ]


def print_of(model: Model) -> str:
    """Pins the weights of a model, blocks that were left out included."""
    names = {name: (entry.name, *entry.shape) for name, entry in model.checkpoint.entries.items()}
    return hashlib.sha256(f"{model.origin.sha256} {json.dumps(names, sort_keys=True)}".encode()).hexdigest()


def _same_tokens(student: Model, teacher: Model) -> Tensor | None:
    if teacher.folder == student.folder:
        return None
    known = [dict(tokenizer_of(model).get_vocab()) for model in (student, teacher)]
    rows = [int(model.config.vocab_size) for model in (student, teacher)]
    try:
        found = aligned(known[0], known[1], rows[0], rows[1])
    except ValueError as error:
        raise UnsupportedError(f"distill: teacher {teacher.origin.name}: {error}") from error
    return None if found is None else torch.tensor(found)
