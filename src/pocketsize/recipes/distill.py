"""Recipe steps `distill` and `finetune`: a student learns from a teacher, or from the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch import nn

from pocketsize.distillation.divergence import DIVERGENCES, Divergence
from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.measurement.classes import classes_named
from pocketsize.models.device import working_device
from pocketsize.models.load import described, load
from pocketsize.models.model import Model
from pocketsize.recipes.adapters import Adapted, check_adapters, settle_adapters
from pocketsize.recipes.classifier import begun, with_classes
from pocketsize.recipes.early import Shallow, check_shallow, early_of, settle_shallow
from pocketsize.recipes.embedding import embedding
from pocketsize.recipes.generations import JUDGES, generations
from pocketsize.recipes.labels import WEIGHED, require_labels, some_unlabelled
from pocketsize.recipes.signals import Heard, Room, check_signals, heard, require_cache, require_kept
from pocketsize.recipes.step import Ahead, Auto, Context
from pocketsize.recipes.teachers import (
    Taught,
    check_teachers,
    frozen,
    maps_of,
    named_teachers,
    require_same_task,
    teachers_of,
)
from pocketsize.recipes.training import (
    Lesson,
    Reading,
    Training,
    budgeted,
    check,
    examples_from,
    steps_of,
    trained,
    training_examples,
)
from pocketsize.recipes.writing import Writing, check_writing, policy, require_writers, written_examples
from pocketsize.training.examples import Examples, Order, split
from pocketsize.training.features import Features, Weights, require_places
from pocketsize.training.objective import Classes, Losses, NextToken, Objective
from pocketsize.training.progressive import Progressive, Stages
from pocketsize.training.signals import Signals


@dataclass(frozen=True, slots=True)
class Distill(Shallow, Writing, Heard, Taught, Adapted, Training):
    """Recipe step `distill`: the student learns to say what its teacher says.

    The keys of `finetune` but `classes`; those that name teachers (`Taught`), that say what is kept of them
    (`Heard`) and who writes the text (`Writing`); and: `loss` is forward_kl, reverse_kl, skew_kl,
    skew_reverse_kl or js, at `temperature`, with `mix` for the last three. `soft` is what the teacher
    counts, `hard` what the true tokens or labels count. `hidden`, `cosine` and `attention` count the
    distance of hidden states and of attention, block by block, `relations` that of queries, keys and values
    of the last blocks, cut into `heads` heads. `pairs` counts how near texts are to each other (embedders).
    `progressive` is the share of the budget in which blocks learn one after the other what theirs give,
    before all learn together. The student of each of the `generations` is the teacher of the next, and is
    kept only if it is better on held-out text.
    """

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
    progressive: float = 0.0
    generations: int = 1

    kind: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        check(self)
        for name in ("teacher", "shares"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_adapters(self, self.kind)
        check_teachers(self)
        check_signals(self)
        check_writing(self)
        check_shallow(self, self.kind)
        if self.loss not in DIVERGENCES:
            raise UsageError(f"distill: unknown loss {self.loss!r}{did_you_mean(self.loss, DIVERGENCES)}")
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
        _check_together(self)

    @property
    def reads(self) -> bool:
        """Whether it reads the training text of the run."""
        return self.written is None

    @property
    def heeds(self) -> str:
        """The key by which labels of a set count, if they do."""
        return key_of_labels(self)

    def rehearsal(self) -> tuple[Training, int]:
        """One generation with live teachers: to hear them once takes as long as to hear them in turn."""
        plain = replace(self, signals="live", cache=None, written=None, generations=1, progressive=0.0)
        return plain, self.generations

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
        settle_adapters(self, model, self.kind)
        if model.arch.task != "generate":
            for key in ("cached", "on_policy", "written"):
                if getattr(self, key):
                    said = {"cached": "signals"}.get(key, key)
                    raise UnsupportedError(
                        f"distill: {said}: {model.config.model_type} predicts no tokens; leave it out"
                    )
            if self.generations > 1:
                raise UnsupportedError("distill: generations are judged by their tokens; leave it out")
        step = replace(self, exits=settle_shallow(self, model, self.kind))
        return cast(Distill, budgeted(step, model.arch.task))

    def require(self, model: Model, ahead: Ahead) -> None:
        """Refuse teachers, and a cache, that the lesson would refuse."""
        opened = described if self.cache is None else load  # a cache is of weights
        teachers = named_teachers(self, opened) or [ahead.teacher]
        require_same_task(model, teachers)
        maps = [None for _ in teachers] if ahead.unknown else maps_of(model, teachers)
        require_writers(self, maps)
        for weights in (self.features(), Weights(hidden=self.progressive)):
            require_places(model, teachers[0], weights)
        require_kept(self, model)
        if self.cache is not None and not ahead.unknown:
            text = examples_from(ahead.corpus, model, self.length)
            require_cache(self, self, Room(model, teachers, maps, text, self.dtype), ahead.seed)

    def require_enough(self, model: Model, text: Examples, ahead: Ahead) -> None:
        """Refuse text that is too little for what judges generations, or for one block after the other."""
        text = text if self.generations == 1 else split(text, JUDGES, ahead.seed)[0]
        Training.require_enough(self, model, text, ahead)
        if self.progressive:
            _stage_steps(self, steps_of(self, Order(text, self.batch, ahead.seed)), len(model.blocks))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The student after it was taught."""
        if self.generations == 1:
            return trained(self, self.kind, model, ctx, lambda: self._lesson(model, ctx))
        text = training_examples(model, ctx, self.length)
        teach, judge = split(text, JUDGES, ctx.seed)

        def taught(own: Context, teacher: Model | None) -> Model:
            def lesson() -> Lesson:
                found = self._lesson(model, own, teacher, text)
                return found if self.written else replace(found, examples=teach)

            return trained(self, self.kind, model, own, lesson)

        return generations(self.generations, ctx, judge, taught)

    def _lesson(
        self, model: Model, ctx: Context, teacher: Model | None = None, text: Examples | None = None
    ) -> Lesson:
        """What the student is given; `teacher` instead of those that the step names."""
        teachers = teachers_of(self, ctx) if teacher is None else [teacher]
        require_same_task(model, teachers)
        maps = maps_of(model, teachers)
        if self.written is not None:
            text = written_examples(self, teachers, maps, min(self.length, model.positions), ctx)
        whole = text or training_examples(model, ctx, self.length)
        if model.arch.task == "classify" and self.heeds:
            known = require_labels(whole, self.heeds)
            if self.heeds == WEIGHED and known is not whole:
                raise some_unlabelled(whole.name)
        room, kept = Room(model, teachers, maps, whole, self.dtype), list[Signals]()

        def hear(rows: Sequence[int]) -> None:
            kept.append(heard(self, self, room, rows, ctx))

        def objective(module: nn.Module, _: Examples) -> Objective:
            return self._objective(module, room, kept[0] if kept else None)

        def reading(module: nn.Module, order: Order, batches: int | None) -> Reading:
            return self._reading(module, order, batches, len(model.blocks), ctx.seed)

        names = tuple(one.origin.name for one in teachers)
        return Lesson(whole, objective, names, hear if self.cached else None, reading)

    def _objective(self, module: nn.Module, room: Room, signals: Signals | None) -> Objective:
        model, first = room.student, room.teachers[0]
        losses = Losses(self.divergence(), self.soft, self.hard, self.pairs)
        early = early_of(self, model, module)
        if signals is not None:
            return NextToken(module, losses, signals=signals, dtype=self.dtype, early=early)
        shares = None if len(room.teachers) == 1 else self.shares
        teachers = frozen(room.teachers, room.maps, shares)
        features = Features(model, first, self.features()).to(working_device()) if self.features() else None
        own: Any = {"extra": features, "weigh_by_loss": self.weigh == "loss", "dtype": self.dtype}
        if model.arch.task == "generate":
            found: Objective = NextToken(module, losses, teachers, **own, early=early)
        elif model.arch.task == "classify":
            found = Classes(module, losses, teachers, **own)
        else:
            found = embedding(module, teachers, losses, room, features)
        if not self.progressive:
            return found
        blocks = Features(model, first, Weights(hidden=1.0)).to(working_device())
        return Progressive(found, module, teachers[0], blocks, self.dtype)

    def _reading(
        self, module: nn.Module, order: Order, batches: int | None, blocks: int, seed: int
    ) -> Reading:
        found = Reading(order.batch)
        if self.on_policy:
            own = policy(self, seed)(module, order)
            found = Reading(own.batch, own)
        if not self.progressive:
            return found
        first = _stage_steps(self, None if batches is None else batches // self.accumulate, blocks)
        return Reading(Stages(first, blocks, self.accumulate).over(order.batch, found.batch), found.memory)


def _stage_steps(step: Distill, steps: int | None, blocks: int) -> int:
    """In how many steps blocks learn one after the other; refuses fewer than there are blocks."""
    assert steps is not None
    if (first := round(step.progressive * steps)) < blocks:
        raise UsageError(
            f"distill: progressive: {first} of {steps} steps are too few for {blocks} blocks; give it a "
            "larger share, or the training more tokens"
        )
    return first


def _check_together(step: Distill) -> None:
    """Refuse keys that say different things."""
    if not 0 <= step.progressive < 1:
        raise UsageError(f"distill: progressive is a share from 0 to below 1, got {step.progressive}")
    if step.progressive and (step.minutes is not None or step.recompute):
        other = "recompute" if step.recompute else "minutes"
        raise UsageError(f"distill: progressive goes with no {other}; use tokens or epochs")
    if step.generations < 1:
        raise UsageError(f"distill: generations must be at least 1, got {step.generations}")
    if step.generations > 1 and step.cache is not None:
        raise UsageError(
            "distill: cache: the teacher of a second generation is of one run alone; leave it out"
        )
    if step.on_policy and step.sharded:
        raise UsageError("distill: sharded: processes write texts of different lengths; use on_policy: 0")
    if step.on_policy and not step.soft:
        raise UsageError("distill: on_policy: the teacher has to judge what the student writes; use soft")
    if not step.cached:
        return
    if step.loss != "forward_kl" or step.temperature != 1 or step.mix is not None:
        raise UsageError(
            f"distill: signals: {step.signals} holds what forward_kl needs at temperature 1; for other "
            "losses use signals: live"
        )
    inside = bool(step.features()) or step.progressive > 0
    if inside or step.on_policy:
        told = "what the student writes" if step.on_policy else "what is inside the teacher"
        raise UsageError(f"distill: signals: {step.signals} holds nothing of {told}; use signals: live")


@dataclass(frozen=True, slots=True)
class Finetune(Shallow, Adapted, Training):
    """Recipe step `finetune`: the true tokens or labels alone teach.

    Of an encoder it makes a classifier of the `classes`, `auto` for those that the labels of the training
    text name. The other keys are those of every training, `lora` and `alpha` (`Adapted`), and `exits` and
    `early` (`Shallow`).
    """

    classes: tuple[str, ...] | Auto = "auto"

    kind: ClassVar[str] = "finetune"

    def __post_init__(self) -> None:
        check(self)
        check_adapters(self, self.kind)
        check_shallow(self, self.kind)
        if self.classes == "auto":
            return
        names = tuple(map(str, self.classes))
        if isinstance(self.classes, str) or len({*names}) < max(2, len(names)):
            raise UsageError(
                f"finetune: classes is auto or a list of two or more names, got {self.classes!r}"
            )
        object.__setattr__(self, "classes", names)

    @property
    def heeds(self) -> str:
        """The step itself: labels are all that it learns from."""
        return self.kind

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Finetune:
        """The step with a budget; refuses classes that the model has not, or can have none."""
        settle_adapters(self, model, self.kind)
        task = model.arch.task
        if self.classes != "auto" and task == "generate":
            raise UsageError(f"finetune: classes: {model.config.model_type} writes text; leave them out")
        if task == "classify" and self.classes not in ("auto", own := classes_named(model)):
            raise UsageError(f"finetune: classes: the model's own are {', '.join(own)}; leave them out")
        step = replace(self, exits=settle_shallow(self, model, self.kind))
        return cast(Finetune, budgeted(step, "generate" if task == "generate" else "classify"))

    def outline(self, model: Model) -> Model:
        """The same model, with a head for the classes if it is an encoder."""
        return with_classes(model, self.classes) if model.arch.task == "embed" else model

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model after it was trained."""
        student = self.outline(model)

        def lesson() -> Lesson:
            def objective(module: nn.Module, examples: Examples) -> Objective:
                losses = Losses(soft=0.0, hard=1.0)
                if student.arch.task != "generate":
                    return Classes(module, losses, dtype=self.dtype)
                return NextToken(module, losses, dtype=self.dtype, early=early_of(self, model, module))

            def begin() -> nn.Module:
                return begun(model, student, ctx.seed, working_device())

            examples = training_examples(student, ctx, self.length)
            if student.arch.task == "classify":
                examples = require_labels(examples, self.heeds)
            return Lesson(examples, objective, begin=begin if student is not model else None)

        done = trained(self, self.kind, student, ctx, lesson)
        if student is not model:
            ctx.classifier = done
        return done


def key_of_labels(step: Distill) -> str:
    """The key of a lesson by which labels count, if they do."""
    weighed = step.weigh == "loss" and step.soft and len(step.names) > 1
    return WEIGHED if weighed else "hard" if step.hard else ""
