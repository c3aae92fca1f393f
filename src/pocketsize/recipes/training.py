"""What all recipe steps that train have: a budget, a pace, and the student that comes of it."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from pocketsize.data.text import Corpus
from pocketsize.distributed.shards import spread
from pocketsize.distributed.world import Solo
from pocketsize.errors import UsageError
from pocketsize.exporting.companions import copy_companions
from pocketsize.exporting.plain import CONFIG, as_json, config_of_plain
from pocketsize.io.checkpoint import SINGLE, TensorSpec, write_safetensors
from pocketsize.io.publish import publish_bytes
from pocketsize.measurement.classes import classes_named
from pocketsize.measurement.machine import cpu_seconds
from pocketsize.models.device import working_device
from pocketsize.models.dtype import NAMES, forward_dtype
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import SPARSITY, Model
from pocketsize.models.skeleton import materialise
from pocketsize.pruning.pattern import Pattern, said_of
from pocketsize.recipes.adapters import faster, learning
from pocketsize.recipes.course import course_report, findings_of, zeros_in
from pocketsize.recipes.judging import first_rows, held_out, judging, terms_of
from pocketsize.recipes.record import StepReport, TrainingReport, built
from pocketsize.recipes.step import Ahead, Auto, Context
from pocketsize.training.dropout import set_dropout
from pocketsize.training.examples import Batch, Examples, Order
from pocketsize.training.loop import Course, Memory, Pace, Shaping, train
from pocketsize.training.masked import zeros_held
from pocketsize.training.objective import Objective
from pocketsize.training.recompute import recompute
from pocketsize.training.texts import examples_of

COURSE = "course.json"
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
# The highest learning rates that are chosen where none is named.
RATES = {"generate": 3e-4, "embed": 1e-4, "classify": 5e-5}
# Steps between looks at what judges; a training that is shorter than four times that has four looks.
LOOK, LOOKS = 50, 4
TOKENS, EPOCHS = 2_000_000, 3.0
# What products may be made in; fp16 has too few exponents for slopes that nobody scales.
PRECISIONS = ("auto", "fp32", "bf16")
# What a busy core takes, roughly, for the energy that progress tells: an estimate, in no record.
WATTS = 10


@dataclass(frozen=True)
class Training(ABC):
    """The keys of every step that trains.

    Budget, one of: `tokens` to read (2M, 500k; each counts as often as it is read), `epochs` over the text,
    `minutes`. `batch` texts or windows of at most `length` tokens make a batch, `accumulate` batches a step.
    `rate` is the highest learning rate, `auto` one by task, reached after the share `warmup` and let down
    again; `decay` the weight decay, `clip` the largest gradient norm. `average` is the decay of a moving
    average of the weights, which then is the student; `patience` ends a training that was not better on
    held-out text for so many looks. `recompute` computes activations twice instead of keeping them.
    `precision` is what the blocks multiply in, `fp32` or `bf16`, `auto` for bf16 where the device that works
    does so in hardware; weights, logits, losses and the optimizer are float32 in all. `dropout` is the share
    of activations that is dropped where the family drops any, `auto` what the model's config says.
    `sharded`: of several processes each keeps a part of the blocks' weights, gradients and moments; alone it
    means nothing.
    """

    tokens: int | str | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch: int = 8
    length: int = 512
    accumulate: int = 1
    rate: float | Auto = "auto"
    warmup: float = 0.05
    decay: float = 0.01
    clip: float = 1.0
    average: float | None = None
    patience: int = 0
    recompute: bool = False
    precision: str = "auto"
    dropout: float | Auto = "auto"
    sharded: bool = False

    kind: ClassVar[str]
    calibrated: ClassVar[bool] = False
    # The highest learning rate where none is named, if it is no task's.
    usual: ClassVar[float | None] = None

    def rehearsal(self) -> tuple[Training, int]:
        """A training whose steps take as long as this one's, and how many trainings this is."""
        return self, 1

    @property
    def reads(self) -> bool:
        """Whether it reads the training text of the run."""
        return True

    @property
    def heeds(self) -> str:
        """What of it heeds labels where those are a set's, as messages name it; nothing if nothing does."""
        return ""

    @property
    def dtype(self) -> torch.dtype:
        """What the blocks multiply in on this machine."""
        return forward_dtype() if self.precision == "auto" else NAMES[self.precision]

    def __post_init__(self) -> None:
        check(self)

    def outline(self, model: Model) -> Model:
        """The same model: learning changes no shape."""
        return model

    def require_enough(self, model: Model, text: Examples, ahead: Ahead) -> None:
        """Refuse text that is too little for what the step holds out, or makes in steps."""
        steps_of(self, Order(held_out(text, self, ahead.seed)[0], self.batch, ahead.seed))

    @abstractmethod
    def apply(self, model: Model, ctx: Context) -> Model:
        """The model after it was trained."""


def check(step: Training) -> None:
    """Refuse what no model can be trained with."""
    given = [name for name in ("tokens", "epochs", "minutes") if getattr(step, name) is not None]
    if len(given) > 1:
        raise UsageError(f"a training has one budget; keep one of {' and '.join(given)}")
    if step.tokens is not None:
        count_of(step.tokens)
    for name in ("epochs", "minutes", "batch", "length", "accumulate", "clip"):
        value = getattr(step, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} must be above 0, got {value}")
    if step.rate != "auto" and not 0 < step.rate < 1:
        raise UsageError(f"rate must be auto or lie between 0 and 1, got {step.rate}")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(step, name) < 1:
            raise UsageError(f"{name} must be from 0 to below 1, got {getattr(step, name)}")
    if step.dropout != "auto" and not 0 <= step.dropout < 1:
        raise UsageError(f"dropout must be auto or from 0 to below 1, got {step.dropout}")
    if step.average is not None and not 0 < step.average < 1:
        raise UsageError(f"average must be null or lie between 0 and 1, got {step.average}")
    if step.precision not in PRECISIONS:
        raise UsageError(f"precision is one of {', '.join(PRECISIONS)}, got {step.precision!r}")
    if step.patience < 0:
        raise UsageError(f"patience must be a whole number from 0 upwards, got {step.patience}")


def count_of(count_said: int | str, key: str = "tokens") -> int:
    """`2M` as 2,000,000; an error names the key that says it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", str(count_said).strip().lower())
    count = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise UsageError(f"{key} is a number such as 500k or 2M, got {count_said!r}")
    return count


def budgeted(step: Training, task: str) -> Training:
    """The step with a budget: 2M tokens where none was named, 3 epochs for a classifier."""
    if step.tokens is None and step.epochs is None and step.minutes is None:
        return replace(step, epochs=EPOCHS) if task == "classify" else replace(step, tokens=TOKENS)
    return step if step.tokens is None else replace(step, tokens=count_of(step.tokens))


def rate_of(step: Training, task: str) -> float:
    """The highest learning rate."""
    return (step.usual or RATES[task]) * faster(step) if step.rate == "auto" else step.rate


@dataclass(frozen=True)
class Lesson:
    """Everything a training is given, and who teaches it."""

    examples: Examples
    objective: Callable[[nn.Module, Examples], Objective]
    teachers: tuple[str, ...] = ()
    # Told before anything else which rows will be read, by their numbers.
    before: Callable[[Sequence[int]], None] | None = None
    # What the student reads instead of the batches of an order, by the number of batches; None by minutes.
    reading: Callable[[nn.Module, Order, int | None], Reading] | None = None
    begin: Callable[[], nn.Module] | None = None
    # What makes zeros in the student, by the number of steps, None by minutes; else its zeros stay.
    shaping: Callable[[nn.Module, int | None], Shaping] | None = None
    # Whether it is told where the loss has risen: not where zeros are made, or something else judges.
    judged: bool = True


@dataclass(frozen=True)
class Reading:
    """The batches of a training by their numbers, and what they depend on beside."""

    batch: Callable[[int], Batch]
    memory: Memory | None = None


def trained(step: Training, kind: str, model: Model, ctx: Context, lesson: Callable[[], Lesson]) -> Model:
    """The student that a training makes of the model, kept in the store; `lesson` is asked once it begins.

    Where the lesson says how to `begin`, the model is an outline, and its numbers come from there.
    """

    def write(folder: Path) -> None:
        given = lesson()
        module = _trainable(
            given.begin() if given.begin else materialise(model, device=working_device()), step
        )
        world = ctx.world if step.sharded else Solo()
        with learning(step, module, model, ctx.seed) as narrow, spread(module, model.blocks, world):
            held = None if given.shaping or narrow else zeros_held(module, model)
            course, examples = taught(step, kind, module, given, ctx, model.arch.task, held=held)
        facts = course_report(course, given.teachers, examples, module)
        pattern = step.outline(model).pattern
        if pattern is not None:
            facts = replace(facts, zeros=zeros_in(module, model))
            if course.pruned and not pattern.of:
                # Linears that had more zeros before raise the share of all; then each has what was asked for.
                share = round(course.pruned[-1][1], 6)
                most = 1.0 if model.pattern is None else pattern.sparsity
                pattern = replace(pattern, sparsity=min(share, most))
        publish_bytes(folder / COURSE, json.dumps(asdict(facts)).encode())
        write_student(model, module, folder, new=given.begin is not None, pattern=pattern)

    folder = ctx.made(kind, write, together=True)
    report: TrainingReport = built(TrainingReport, json.loads((folder / COURSE).read_bytes()))
    options: dict[str, object] = {name: getattr(step, name) for name in step.__dataclass_fields__}
    ctx.reports.append(StepReport(kind, options, tokens=report.tokens, training=report))
    ctx.findings += list(findings_of(report))
    return load(folder).made_from(model)


def write_student(
    model: Model, module: nn.Module, folder: Path, *, new: bool = False, pattern: Pattern | None = None
) -> None:
    """A model folder with the weights of a module, float32, and config and companions of the model.

    A `new` classifier has a config of its own, and no word on embeddings of sentences beside it. What
    `pattern` its zeros have, if it was pruned, stands in the config.
    """
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    specs = [
        TensorSpec(entry.name, torch.float32, entry.shape, lambda name=name: own[name].detach().float())
        for name, entry in model.checkpoint.entries.items()
    ]
    write_safetensors(folder / SINGLE, specs, {"format": "pt"})
    config = model.config.to_dict() if new else config_of_plain(model.folder)
    if pattern is not None:
        config |= {SPARSITY: said_of(pattern)}
    publish_bytes(folder / CONFIG, as_json(config))
    copy_companions(model.folder, folder, sentences=not new)


def training_examples(model: Model, ctx: Context, length: int) -> Examples:
    """The text of the run as examples for this model; a run without a text of its own has none."""
    assert ctx.corpus is not None
    return examples_from(ctx.corpus, model, length)


def examples_from(corpus: Corpus, model: Model, length: int) -> Examples:
    """A text as examples for this model."""
    task = model.arch.task
    classes = classes_named(model) if task == "classify" else ()
    length = min(length, model.positions)
    return examples_of(corpus, tokenizer_of(model), length=length, task=task, classes=classes)


def _trainable(module: nn.Module, step: Training) -> nn.Module:
    module.requires_grad_(True)
    return as_trained(module, step)


def as_trained(module: nn.Module, step: Training) -> nn.Module:
    """The module in the mode of training, with the step's dropout, and activations twice if it says so."""
    if step.recompute:
        recompute(module)
    if step.dropout != "auto":
        set_dropout(module, step.dropout)
    return module.train()


def taught(
    step: Training,
    kind: str,
    module: nn.Module,
    lesson: Lesson,
    ctx: Context,
    task: str,
    *,
    held: Shaping | None = None,
) -> tuple[Course, Examples]:
    """Train the module in place; how it went, and what of the examples taught it. `held` keeps its zeros."""
    examples, judges = held_out(lesson.examples, step, ctx.seed)
    order = Order(examples, step.batch, ctx.seed)
    pace = _pace(step, order, rate_of(step, task), ctx.seed)
    batches = None if pace.steps is None else pace.steps * pace.accumulate
    if lesson.before is not None:
        other = () if judges is None else judges.numbers_of(range(len(judges)))
        lesson.before(sorted({*examples.numbers_of(order.read(batches)), *other}))
    objective = lesson.objective(module, examples)
    reading = lesson.reading(module, order, batches) if lesson.reading else Reading(order.batch)
    shaping = lesson.shaping(module, pace.steps) if lesson.shaping else held
    last, begun = [0.0, 0], cpu_seconds()

    def told(course: Course, done: float) -> None:
        seconds = max(1e-9, course.elapsed_s - last[0])
        speed = (course.tokens - last[1]) / seconds
        last[:] = [course.elapsed_s, course.tokens]
        loss = course.losses[-1][1] if course.losses else math.nan
        total = pace.steps or 1000
        energy = WATTS * (cpu_seconds() - begun) / 3600
        said = f"loss {loss:.4g}, {speed:,.0f} tokens/s, about {energy:.2g} Wh"
        ctx.progress(min(total, round(done * total)), total, said)

    judge = judging(module, objective, judges or examples.part(first_rows(order, batches)), step.batch)
    before = judge() if lesson.judged else math.nan
    course = train(
        module,
        objective,
        reading.batch,
        pace,
        ctx.store.course(kind),
        told=told,
        held_out=judge if judges is not None else None,
        memory=reading.memory,
        shaping=shaping,
        world=ctx.world,
    )
    if lesson.judged:
        course.judged = before, judge()
    return course, examples


def steps_of(step: Training, order: Order) -> int | None:
    """How many steps the budget gives on these examples; None where it is minutes."""
    if step.minutes is not None:
        return None
    read = count_of(step.tokens or TOKENS) / order.examples.tokens
    epochs = read if step.epochs is None else step.epochs
    return max(1, round(epochs * order.per_epoch / step.accumulate))


def _pace(step: Training, order: Order, rate: float, seed: int) -> Pace:
    steps = steps_of(step, order)
    return Pace(
        steps=steps,
        minutes=step.minutes,
        accumulate=step.accumulate,
        peak=rate,
        warmup=step.warmup,
        decay=step.decay,
        clip=step.clip,
        average=step.average,
        patience=step.patience,
        look=LOOK if steps is None else min(LOOK, math.ceil(steps / LOOKS)),
        seed=seed,
        terms=terms_of(step),
    )
