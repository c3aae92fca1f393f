"""Recipe step `qat`: a model teaches its quantized self, straight through the rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import nn

from pocketsize.distillation.divergence import DIVERGENCES, Divergence
from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.io.publish import publish_bytes
from pocketsize.models.arch import Arch
from pocketsize.models.device import CPU, working_device
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.quantization.learned import scales_move
from pocketsize.quantization.scheme import named
from pocketsize.recipes.adapters import learned_parameters
from pocketsize.recipes.correct import ALPHA, check_terms, refuse_experts
from pocketsize.recipes.course import course_report, findings_of
from pocketsize.recipes.distill import Distill
from pocketsize.recipes.grids import Quantizer, layer_scheme, scheme_of, words_of
from pocketsize.recipes.layers import finish
from pocketsize.recipes.mixes import base_of
from pocketsize.recipes.quantize import DAMP, EFFORTS, ENCODERS, Gptq, Rtn, check_damp
from pocketsize.recipes.record import Finding, LayerReport, Stage, TrainingReport, built
from pocketsize.recipes.stages import Best, nearest
from pocketsize.recipes.step import Ahead, Context
from pocketsize.recipes.training import (
    COURSE,
    Lesson,
    Training,
    as_trained,
    budgeted,
    check,
    count_of,
    taught,
    training_examples,
)
from pocketsize.training.examples import Examples, joined, split
from pocketsize.training.objective import Losses, NextToken, Objective, Teacher
from pocketsize.training.rounded import put_on_grids, taken_off, zeros_still

STARTS = ("gptq", "rtn")
# Windows of the training text that do not teach: they judge whether what was learned is kept.
JUDGES = 16
# At most so many windows are written for it: a few minutes of a small model.
WRITTEN = 128
# Tokens on which scales are tuned where nothing but much effort was asked for, and windows in a batch of it.
TUNED, WINDOWS = "128k", 2
# The highest learning rate of scales whose codes stay: in a step the outermost value of a group moves by a
# hundredth of a code.
SCALES_RATE = 0.1


@dataclass(frozen=True, slots=True)
class Qat(Quantizer, Training):
    """Recipe step `qat`: quantize, then learn codes and scales from what the whole original model says.

    The keys of `rtn` and those of every training, and: `start`, the step whose codes are learned further,
    `gptq` or `rtn`; `damp`, `alpha` and `learn`, as in `gptq`: its damping, drift that is made up for, and
    steps for which blocks are learned one by one; `codes` and `scales`, which of codes and scales (with free
    zeros) learn; `loss`, `temperature` and `mix` as in `distill`. `rate` is in codes: how far a place moves
    in a step at most, about; scales move by a tenth of it, of themselves (alone: the outermost value of a
    group by a tenth of it). What was learned is kept only if the KL to the original falls on windows that
    it did not read.
    """

    start: str = "gptq"
    damp: float = DAMP
    alpha: float = 0.0
    learn: int = 0
    codes: bool = True
    scales: bool = True
    loss: str = "forward_kl"
    temperature: float = 1.0
    mix: float | None = None
    decay: float = 0.0

    kind: ClassVar[str] = "qat"
    calibrated: ClassVar[bool] = True
    usual: ClassVar[float | None] = 0.02

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        check(self)
        if self.start not in STARTS:
            raise UsageError(f"qat: unknown start {self.start!r}{did_you_mean(self.start, STARTS)}")
        if self.loss not in DIVERGENCES:
            raise UsageError(f"qat: unknown loss {self.loss!r}{did_you_mean(self.loss, DIVERGENCES)}")
        if self.start == "rtn" and (self.learn or self.alpha or self.damp != DAMP):
            raise UsageError("qat: damp, alpha and learn are keys of gptq; use start: gptq")
        check_damp(self.kind, self.damp)
        check_terms(self.kind, self.alpha, 0.0, words_of(self))
        if self.learn < 0:
            raise UsageError(f"qat: learn must be a whole number from 0 upwards, got {self.learn}")
        if not self.codes and not self.scales:
            raise UsageError("qat: with codes: false and scales: false nothing learns; use step gptq")
        if self.sharded:
            raise UsageError("qat: sharded: it trains in one process; leave it out")
        if self.decay:
            raise UsageError("qat: decay: places on a grid have no zero to decay to; leave it out")
        try:
            Divergence(self.loss, self.temperature, self.mix)
        except ValueError as error:
            raise UsageError(f"qat: {error}") from error

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Qat:
        """The step with grid and budget decided; refuses models that predict no tokens."""
        if model.arch.task != "generate":
            raise UnsupportedError(
                f"qat: {model.config.model_type} is an encoder, which predicts no tokens; use gptq with learn"
            )
        refuse_experts(self.kind, self.alpha, model)
        made = cast(Qat, budgeted(cast(Qat, Quantizer.resolve(self, model, exports)), "generate"))
        if made.codes:
            return made
        used = (layer_scheme(made, name) for name in model.linears)
        if not any(scheme is not None and scales_move(scheme) for scheme in used):
            raise UnsupportedError(
                f"qat: codes: false: the scales of {made.scheme} stay as they are stored, so nothing would "
                "learn; leave codes true, or use gptq"
            )
        return replace(made, rate=SCALES_RATE) if made.rate == "auto" else made

    def rehearsal(self) -> tuple[Training, int]:
        """The original teaches the whole of itself, at the same pace; or scales alone, of rounded codes."""
        if not self.codes:
            return replace(self, start="rtn", damp=DAMP, alpha=0.0, learn=0), 1
        keys = {field.name: getattr(self, field.name) for field in fields(Training)}
        return Distill(**keys, loss=self.loss, temperature=self.temperature, mix=self.mix), 1

    @property
    def first(self) -> Gptq | Rtn:
        """The step that quantizes before anything is learned of the whole model."""
        grid = {field.name: getattr(self, field.name) for field in fields(Quantizer)}
        if self.start == "rtn":
            return Rtn(**grid)
        return Gptq(**grid, damp=self.damp, learn=self.learn, alpha=self.alpha)

    def require_enough(self, model: Model, text: Examples, ahead: Ahead) -> None:
        """Refuse text that is too little to hold out what judges; what the model writes would do as well."""
        Training.require_enough(self, model, text if ahead.own else split(text, JUDGES, ahead.seed)[0], ahead)

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model quantized by `start`, or further by learning where that is nearer to it.

        Stages of the start are judged as in `gptq`; the best of them, and what the whole model then taught
        it, by windows of the training text that this did not read. Refuses to work in several processes.
        """
        if ctx.world.size > 1:
            raise UnsupportedError("qat: it trains in one process; start it without torchrun")
        teach, judge = split(self._text(model, ctx), JUDGES, ctx.seed)
        windows = judge.batch(range(len(judge)))
        courses: list[TrainingReport] = []
        stages: list[Stage] = []
        findings: list[Finding] = []

        def start(given: Model, own: Context, _: Best | None) -> Model:
            done = self.first.apply(given, own)
            stages.extend(own.reports[-1].stages)
            findings.extend(own.findings)
            return done

        def tune(given: Model, own: Context, best: Best | None) -> Model:
            assert best is not None
            done, course = self._learn(given, (best.model, best.ctx.reports[-1].layers), own, teach)
            courses.append(course)
            return done

        begun = "start" if self.alpha or self.learn else self.start
        best = nearest(model, ctx, {begun: start, "tuned": tune}, windows.ids, windows.mask)
        (course,), report = courses, ctx.reports[-1]
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        told = (*stages, *report.stages)
        ctx.reports[-1] = replace(report, kind=self.kind, options=own, training=course, stages=told)
        ctx.findings += [one for one in findings if one not in ctx.findings]
        ctx.findings += findings_of(course)
        if not told[-1].kept:
            said = f"what {course.steps} steps taught is no nearer to the original than what they began with"
            ctx.findings.append(Finding("learning-dropped", f"{said}, which was kept; try another rate"))
        return best

    def windows_written(self, share: float, length: int) -> int:
        """How many windows of `length` the model is to write where it writes this share of the text."""
        if self.tokens is None:
            return 0
        return min(WRITTEN, math.ceil(share * (count_of(self.tokens) / length + JUDGES)))

    def _text(self, model: Model, ctx: Context) -> Examples:
        """The text that teaches: what the model wrote, and of the run's text as much as the budget leaves."""
        text = training_examples(model, ctx, self.length)
        if ctx.own is None:
            return text
        own = [row.numpy() for part in ctx.own.split(self.length, dim=1) for row in part]
        if self.tokens is None:
            return joined(text, own, len(text), ctx.seed)
        length = int(text.lengths.max())
        left = count_of(self.tokens) + JUDGES * length - ctx.own.numel()
        return joined(text, own, math.ceil(left / length), ctx.seed)

    def _learn(
        self, model: Model, start: tuple[Model, Sequence[LayerReport]], ctx: Context, examples: Examples
    ) -> tuple[Model, TrainingReport]:
        """The quantized model after it was taught, kept block by block, and how that went."""
        begun, of_start = start

        def write(folder: Path) -> None:
            module = materialise(begun, torch.float32, working_device())
            rounded = put_on_grids(module, model, begun.quantized, scales=self.scales, codes=self.codes)
            lesson = Lesson(
                examples,
                lambda student, _: self._objective(student, model),
                (model.origin.name,),
                judged=False,
            )
            held = zeros_still(module, rounded, model)
            as_trained(module, self)
            course, read = taught(self, "weights", module, lesson, ctx, "generate", held=held)
            done = taken_off(module, rounded)
            for path in model.blocks:
                own = {n: done[n].to(CPU) for n in model.linears_of(path) if n in done}
                ctx.store.keep(path, own, tuple(one for one in of_start if one.name in own))
            if ends := {
                n: done.get(n, begun.quantized[n]).to(CPU) for n in model.ends if n in begun.quantized
            }:
                ctx.store.keep("embeddings", ends, tuple(one for one in of_start if one.name in ends))
            facts = course_report(course, lesson.teachers, read, module)
            publish_bytes(folder / COURSE, json.dumps(asdict(facts)).encode())

        folder = ctx.store.made("weights", write, ctx.findings)
        report: TrainingReport = built(TrainingReport, json.loads((folder / COURSE).read_bytes()))
        units = [ctx.store.finished(path) or () for path in (*model.blocks, "embeddings")]
        reports = [one for unit in units for one in unit]
        return finish(self, model, ctx, reports, tokens=int(ctx.mask.sum())), report

    def _objective(self, module: nn.Module, model: Model) -> Objective:
        frozen = Teacher(materialise(model, torch.float32, working_device()))
        losses = Losses(Divergence(self.loss, self.temperature, self.mix))
        return NextToken(module, losses, (frozen,), dtype=self.dtype)


def of_effort(
    effort: str, tune: str | None, arch: Callable[[], Arch], scheme: str | None = None
) -> Gptq | Qat:
    """The step for so much effort, its grid left open; `arch` is asked for where the model matters.

    `scheme` is the one that was named, if any. Scales that stay as they are stored are not tuned unless that
    is asked for, which is refused; so are models that predict no tokens, and learning through rounded inputs.
    """
    if effort not in EFFORTS:
        raise UsageError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    learn, grid = EFFORTS[effort], None if scheme is None else named(base_of(scheme))
    if grid is not None and grid.activations and (learn or tune is not None):
        raise UsageError(
            f"effort: no gradient passes the rounding of inputs ({scheme}); use effort fast, without tune"
        )
    moves = grid is None or scales_move(grid)
    if tune is not None and not moves:
        raise UsageError(f"tune: the scales of {scheme} stay as they are stored; leave it out")
    if tune is not None and arch().task != "generate":
        raise UsageError("tune: the model predicts no tokens to tune by; leave it out, or use more effort")
    if learn and arch().task != "generate":
        learn = ENCODERS[effort]
    alpha = ALPHA if learn and arch().experts is None else 0.0
    if tune is None and effort == "best" and moves and arch().task == "generate":
        tune = TUNED
    if tune is None:
        return Gptq(learn=learn, alpha=alpha)
    # Kept, activations take 1.5 GB more of a model of 135 million; computed again, an eighth of the time.
    return Qat(learn=learn, alpha=alpha, codes=False, tokens=tune, batch=WINDOWS, recompute=True)


def learned_numbers(step: Training, model: Model) -> int:
    """How many numbers learn in a training: of quantized matrices with codes that stay, scales alone."""
    if not isinstance(step, Qat) or step.codes:
        return learned_parameters(step, model)
    schemes = ((name, scheme_of(step, model)(name)) for name in (*model.linears, *model.ends))
    shapes = [(*model.matrix_shape(name), scheme) for name, scheme in schemes if scheme is not None]
    return sum(
        rows * (columns // scheme.width(columns)) * (1 + scheme.float_zeros)
        for rows, columns, scheme in shapes
    )
