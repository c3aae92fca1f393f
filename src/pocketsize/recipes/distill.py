"""Recipe steps `distill` and `finetune`: a student learns from a teacher, or from the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from pocketsize.distillation.divergence import DIVERGENCES, Divergence
from pocketsize.distillation.vocabulary import aligned
from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.models.device import working_device
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.recipes.step import Context
from pocketsize.recipes.training import Lesson, Training, budgeted, check, trained, training_examples
from pocketsize.training.examples import Examples
from pocketsize.training.features import Features, Weights
from pocketsize.training.objective import Embedding, Losses, NextToken, Objective, Teacher

WEIGH = ("equal", "loss")


@dataclass(frozen=True, slots=True)
class Distill(Training):
    """Recipe step `distill`: the student learns to say what its teacher says.

    The keys of `finetune`, and: `teacher`, a model or a list of them, null for the one that the run began
    with; `weigh`, how much each of several counts: `equal`, or by its `loss` on each text. `loss` is
    forward_kl, reverse_kl, skew_kl, skew_reverse_kl or js, at `temperature`, with `mix` for the last three.
    `soft` is what the teacher counts, `hard` what the true tokens count. `hidden`, `cosine` and
    `attention` count the distance of hidden states and of attention, block by block, `relations` that of
    queries, keys and values of the last blocks, cut into `heads` heads. `pairs` counts how near texts are to
    each other (embedders).
    """

    teacher: str | tuple[str, ...] | None = None
    weigh: str = "equal"
    loss: str = "forward_kl"
    temperature: float = 1.0
    mix: float | None = None
    soft: float = 1.0
    hard: float = 0.0
    hidden: float = 0.0
    cosine: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    heads: int | None = None
    pairs: float = 1.0

    kind: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.teacher, list):
            object.__setattr__(self, "teacher", tuple(self.teacher))
        if self.loss not in DIVERGENCES:
            raise UsageError(f"distill: unknown loss {self.loss!r}{did_you_mean(self.loss, DIVERGENCES)}")
        if self.weigh not in WEIGH:
            raise UsageError(f"distill: weigh is {' or '.join(WEIGH)}, got {self.weigh!r}")
        try:
            self.divergence()
        except ValueError as error:
            raise UsageError(f"distill: {error}") from error
        self.features()
        for name in ("soft", "hard", "pairs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(
                    f"distill: {name} must be a number from 0 upwards, got {getattr(self, name)}"
                )
        if not self.soft and not self.features() and not self.pairs:
            raise UsageError(
                "distill: soft: 0 and no other loss leave the teacher nothing to say; use finetune"
            )

    def divergence(self) -> Divergence:
        """The divergence that the step names."""
        return Divergence(self.loss, self.temperature, self.mix)

    def features(self) -> Weights:
        """What is compared inside the models."""
        return Weights(self.hidden, self.cosine, self.attention, self.relations, self.heads)

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Distill:
        """The step with a budget; refuses losses that the family has no place for."""
        if self.hard and model.arch.task == "embed":
            raise UnsupportedError("distill: hard: an encoder of texts has no true tokens; use hard: 0")
        return cast(Distill, budgeted(self))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The student after it was taught."""
        return trained(self, self.kind, model, ctx, lambda: self._lesson(model, ctx))

    def _lesson(self, model: Model, ctx: Context) -> Lesson:
        teachers = self._teachers(ctx)
        names = tuple(one.origin.name for one in teachers)
        maps = [_same_tokens(model, one) for one in teachers]

        def objective(module: nn.Module, examples: Examples) -> Objective:
            device = working_device()
            frozen = [
                Teacher(materialise(one, torch.float32, device), ids if ids is None else ids.to(device))
                for one, ids in zip(teachers, maps, strict=True)
            ]
            losses = Losses(self.divergence(), self.soft, self.hard, self.pairs)
            features = Features(model, teachers[0], self.features()).to(device) if self.features() else None
            if model.arch.task == "generate":
                return NextToken(module, losses, frozen, extra=features, weigh_by_loss=self.weigh == "loss")
            return _embedding(module, frozen, losses, features, (model, teachers[0]))

        return Lesson(training_examples(model, ctx, self.length), objective, names)

    def _teachers(self, ctx: Context) -> list[Model]:
        """The models that teach."""
        if self.teacher is None:
            assert ctx.original is not None
            return [ctx.original]
        named: Sequence[str] = (self.teacher,) if isinstance(self.teacher, str) else self.teacher
        if not named:
            raise UsageError(
                "distill: teacher: an empty list; name a model, or leave it out for the original"
            )
        return [load(name) for name in named]


@dataclass(frozen=True, slots=True)
class Finetune(Training):
    """Recipe step `finetune`: the true tokens alone teach; the keys are those of every training."""

    kind: ClassVar[str] = "finetune"

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Finetune:
        """The step with a budget; refuses models that predict no tokens."""
        if model.arch.task != "generate":
            raise UnsupportedError(
                f"finetune: {model.config.model_type} is an encoder, which predicts no tokens; use distill"
            )
        return cast(Finetune, budgeted(self))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model after it was trained."""

        def lesson() -> Lesson:
            def objective(module: nn.Module, examples: Examples) -> Objective:
                return NextToken(module, Losses(soft=0.0, hard=1.0))

            return Lesson(training_examples(model, ctx, self.length), objective)

        return trained(self, self.kind, model, ctx, lesson)


def _embedding(
    module: nn.Module,
    frozen: Sequence[Teacher],
    losses: Losses,
    features: Features | None,
    both: tuple[Model, Model],
) -> Embedding:
    if len(frozen) > 1:
        raise UnsupportedError("distill: teachers of an embedder point in unrelated directions; name one")
    extra = nn.ModuleDict()
    widths = [int(model.config.hidden_size) for model in both]
    if widths[0] != widths[1] and losses.soft:
        layer = nn.Linear(*widths, bias=False)
        nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(0))
        extra["projection"] = layer
    if features is not None:
        extra["features"] = features
    return Embedding(module, frozen[0], losses, extra.to(working_device()))


def _same_tokens(student: Model, teacher: Model) -> torch.Tensor | None:
    """The teacher's number for each of the student's tokens; None where they are the same."""
    if teacher.folder == student.folder:
        return None
    known = [dict(tokenizer_of(model).get_vocab()) for model in (student, teacher)]
    rows = [int(model.config.vocab_size) for model in (student, teacher)]
    try:
        found = aligned(known[0], known[1], rows[0], rows[1])
    except ValueError as error:
        raise UnsupportedError(f"distill: teacher {teacher.origin.name}: {error}") from error
    return None if found is None else torch.tensor(found)
