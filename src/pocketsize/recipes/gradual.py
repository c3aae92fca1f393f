"""Recipe step `gradual`: a model is pruned while it is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar, cast

from torch import nn

from pocketsize.errors import UsageError, did_you_mean
from pocketsize.models.model import Model
from pocketsize.pruning.pattern import UNSTRUCTURED, Pattern, pattern_of, said_of
from pocketsize.pruning.schedule import ERK, MATRIX, MODEL, SCOPES
from pocketsize.recipes.distill import Distill, key_of_labels
from pocketsize.recipes.labels import require_labels
from pocketsize.recipes.record import Finding, TrainingReport
from pocketsize.recipes.step import Ahead, Auto, Context
from pocketsize.recipes.training import Lesson, Training, steps_of, trained, training_examples
from pocketsize.training.examples import Examples, Order
from pocketsize.training.loop import Shaping
from pocketsize.training.masked import (
    MAGNITUDE,
    METHODS,
    MOVEMENT,
    RIGL,
    SOFT,
    STARTS,
    ZERO,
    Thinned,
    Thinning,
)
from pocketsize.training.objective import Classes, Losses, NextToken, Objective

# The keys that only some methods have.
_OWN = {
    "cycles": (MAGNITUDE, MOVEMENT),
    "rewind": (MAGNITUDE,),
    "fraction": (RIGL,),
    "score_rate": (MOVEMENT, SOFT),
    "scores": (MOVEMENT, SOFT),
    "threshold": (SOFT,),
    "penalty": (SOFT,),
}
# Masks are renewed so many times in a training, and at most after so many steps; a ramp has two at least.
TIMES = {RIGL: (20, 100)}
USUAL, LEAST = (100, 10), 2
# The rate of scores as in the paper, and how far those that begin at magnitudes go at most in a training, in
# means of their matrix: at a fixed rate a long one would lead them all away from what they began as.
SCORED, REACH = 1e-2, 1.6
# A share of all weights that the last mask of soft movement pruning may change before it is said.
JUMP = 0.1


@dataclass(frozen=True, slots=True)
class Gradual(Distill):
    """Recipe step `gradual`: prune the blocks' linears while a teacher, or the labels, train the model.

    The keys of `distill` (with `soft: 0` and `hard: 1` labels or true tokens teach alone), and: `sparsity`,
    the share of the weights that is zero in the end, of each `matrix`, of all of the `model` together, or
    with small matrices keeping more (`erk`), as `scope` says; `pattern`, unstructured or such as 2:4.
    `method` says which weights go: `magnitude`, the smallest; `movement`, those that training moves to zero,
    by scores that begin at `zero` or at `magnitude` (`scores`) and learn at `score_rate`, where `auto` is
    0.01, and from magnitudes less the longer the training; `soft_movement`, those whose scores fall below
    `threshold` under a `penalty`; `rigl` cuts at once, then lets the share `fraction` of the weights change
    places. It goes from the share `begin` of the training to the share `end`, along a cubic, with new masks
    every so many steps (`every`); or in `cycles` of training and cutting, before each of which weights go
    back to what they were at first if `rewind`.
    """

    sparsity: float | None = None
    pattern: str = UNSTRUCTURED
    method: str = MAGNITUDE
    scope: str = MATRIX
    begin: float = 0.1
    end: float = 0.75
    every: int | Auto = "auto"
    cycles: int = 0
    rewind: bool = False
    fraction: float = 0.3
    score_rate: float | Auto = "auto"
    scores: str = ZERO
    threshold: float = 0.1
    penalty: float = 400.0

    kind: ClassVar[str] = "gradual"

    def __post_init__(self) -> None:
        try:
            Distill.__post_init__(self)
            _check_names(self)
            _check_numbers(self)
            _check_training(self)
            self.goal()
        except UsageError as error:
            said = str(error)
            named = said.startswith("distill: ")
            raise UsageError(f"gradual: {said.removeprefix('distill: ')}" if named else said) from error

    def goal(self) -> Pattern:
        """What the zeros are to look like in the end."""
        if self.pattern == UNSTRUCTURED and self.sparsity is None:
            raise UsageError("gradual: sparsity: name the share of the weights that become zero, such as 0.9")
        found = pattern_of(self.pattern, self.sparsity if self.sparsity is not None else 0.5)
        if self.sparsity is not None and not math.isclose(found.sparsity, self.sparsity, abs_tol=1e-6):
            raise UsageError(
                f"gradual: sparsity {self.sparsity:g}: pattern {self.pattern} makes {found.sparsity:g} zero; "
                "leave sparsity out"
            )
        return found

    @property
    def heeds(self) -> str:
        """The step itself where labels alone teach, else what of `distill` heeds them."""
        return self.kind if self._by_text else key_of_labels(self)

    @property
    def scored(self) -> bool:
        """Whether each weight has a score that learns."""
        return self.method in (MOVEMENT, SOFT)

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Gradual:
        """The step with a budget; refuses zeros that the model cannot have."""
        _check_model(self, model)
        if self._alone(model) and not self.hard:
            raise UsageError("gradual: soft: 0 leaves nobody to learn from; use hard: 1")
        return cast(Gradual, Distill.resolve(self, model, exports))

    def outline(self, model: Model) -> Model:
        """The same model, which says that it has zeros."""
        uneven = self.scope != MATRIX
        return model.with_sparsity(said_of(replace(self.goal(), uneven=uneven)))

    def require(self, model: Model, ahead: Ahead) -> None:
        """Refuse what `distill` refuses of teachers, if any teach."""
        if not self._alone(model):
            Distill.require(self, model, ahead)

    def require_enough(self, model: Model, text: Examples, ahead: Ahead) -> None:
        """Refuse text that is too little for zeros that are made little by little."""
        self.thinning(model, steps_of(self, Order(text, self.batch, ahead.seed)))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model after it was trained and pruned."""

        def lesson() -> Lesson:
            found = self._by_labels(model, ctx) if self._alone(model) else self._lesson(model, ctx)
            shaping = partial(self._shaping, model)
            return replace(found, shaping=shaping, judged=False)

        student = trained(self, self.kind, model, ctx, lesson)
        course = ctx.reports[-1].training
        assert course is not None
        ctx.findings += list(_told(self, course))
        return student

    def thinning(self, model: Model, steps: int | None) -> Thinning:
        """When zeros are made, in a training of so many steps; refuses one with too few for them."""
        times, most = TIMES.get(self.method, USUAL)
        every = self.every
        if every == "auto":
            every = most if steps is None else max(1, min(most, steps // times))
        if steps is not None:
            _require_steps(self, steps, every)
        return Thinning(
            self.goal(),
            self.method,
            self.scope,
            0.0 if model.pattern is None else model.pattern.sparsity,
            self.begin,
            self.end,
            every,
            self.cycles,
            self.rewind,
            self.fraction,
            self._score_rate(steps),
            self.scores,
            self.threshold,
            self.penalty,
        )

    def _score_rate(self, steps: int | None) -> float:
        """The highest rate of scores in a training of so many steps, the paper's where that is not known."""
        if self.score_rate != "auto":
            return self.score_rate
        return SCORED if self.scores == ZERO or steps is None else min(SCORED, REACH / steps)

    def _shaping(self, model: Model, module: nn.Module, steps: int | None) -> Shaping:
        return Thinned(module, model, self.thinning(model, steps))

    def _alone(self, model: Model) -> bool:
        """Whether nobody but the text teaches."""
        return self._by_text and model.arch.task != "embed"

    @property
    def _by_text(self) -> bool:
        """Whether no teacher counts."""
        return not self.soft and not self.features()

    def _by_labels(self, model: Model, ctx: Context) -> Lesson:
        make = NextToken if model.arch.task == "generate" else Classes

        def objective(module: nn.Module, examples: Examples) -> Objective:
            return make(module, Losses(soft=0.0, hard=self.hard), dtype=self.dtype)

        text = training_examples(model, ctx, self.length)
        if model.arch.task == "classify":
            text = require_labels(text, self.heeds)
        return Lesson(text, objective)


def for_zeros(step: Training, model: Model) -> tuple[float, float]:
    """Bytes that a training holds for zeros beside the weights, and those that a checkpoint has of them."""
    count = model.linear_parameters
    if not isinstance(step, Gradual):
        return (0.0 if model.pattern is None else float(count)), 0.0
    # Scores with slopes and two moments, and the matrix as it is multiplied; slopes that RigL looks at, or
    # magnitudes that compete.
    held = 5 if step.scored else step.method == RIGL or step.scope != MATRIX
    return count * (1 + 4.0 * held), count * (1 + 12.0 * step.scored)


def _check_names(step: Gradual) -> None:
    for key, known in (("method", METHODS), ("scope", SCOPES), ("scores", STARTS)):
        value = getattr(step, key)
        if value not in known:
            raise UsageError(
                f"gradual: {key} is {', '.join(known)}, got {value!r}{did_you_mean(value, known)}"
            )
    defaults = {field.name: field.default for field in fields(step)}
    for key, methods in _OWN.items():
        if getattr(step, key) != defaults[key] and step.method not in methods:
            said = " and ".join(methods)
            raise UsageError(f"gradual: {key} belongs to method {said}; {step.method} has none")


def _check_numbers(step: Gradual) -> None:
    """Refuse what is no share, no count or no rate."""
    if not 0 <= step.begin < step.end <= 1:
        raise UsageError(
            "gradual: begin and end are shares of the training, 0 <= begin < end <= 1; "
            f"got {step.begin:g} and {step.end:g}"
        )
    if step.every != "auto" and step.every < 1:
        raise UsageError(f"gradual: every is auto or a number of steps from 1 upwards, got {step.every}")
    if step.cycles < 0:
        raise UsageError(f"gradual: cycles is how often weights are cut, 0 for a ramp; got {step.cycles}")
    for key in ("fraction", "threshold", *(("score_rate",) if step.score_rate != "auto" else ())):
        if not 0 < (value := getattr(step, key)) < 1:
            raise UsageError(f"gradual: {key} must lie between 0 and 1, got {value:g}")
    if not 0 <= step.penalty < math.inf:
        raise UsageError(f"gradual: penalty must be a number from 0 upwards, got {step.penalty:g}")


def _check_training(step: Gradual) -> None:
    """Refuse keys of trainings that a model cannot have while it is pruned."""
    if step.rewind and not step.cycles:
        raise UsageError("gradual: rewind goes back after each of the cycles; name how many")
    if step.rewind and step.average is not None:
        raise UsageError("gradual: average would mix weights of several cycles; leave it or rewind out")
    if step.patience:
        raise UsageError("gradual: patience: the best weights may be those before all was cut; leave it out")
    if step.sharded:
        raise UsageError("gradual: sharded: masks are made of whole matrices; leave it out")
    for key, plain in (("progressive", 0.0), ("generations", 1), ("lora", None), ("exits", None)):
        if getattr(step, key) != plain:
            raise UsageError(f"gradual: {key} is for distill; leave it out")
    if step.scope == ERK and step.pattern != UNSTRUCTURED:
        raise UsageError(f"gradual: scope {ERK}: pattern {step.pattern} leaves every matrix the same share")


def _check_model(step: Gradual, model: Model) -> None:
    """Refuse zeros that do not fit into the matrices, or fewer than there are."""
    goal = step.goal()
    for name in model.linears:
        rows, columns = model.matrix_shape(name)
        if goal.of and columns % goal.of:
            raise UsageError(
                f"gradual: pattern {goal.name}: {goal.of} does not divide the {columns} weights of a row of "
                f"{name}"
            )
        if step.scope != MODEL and round(rows * columns * goal.sparsity) >= rows * columns:
            raise UsageError(
                f"gradual: sparsity {goal.sparsity:g} leaves none of the {rows * columns} weights of {name}"
            )
    if model.pattern is None:
        return
    has, gap = model.pattern.sparsity, goal.sparsity - model.pattern.sparsity
    if gap < -1e-6 or (gap < 1e-6 and step.method != RIGL):
        way = "ask for more" if step.method == RIGL else f"ask for more, or let them change places ({RIGL})"
        raise UsageError(
            f"gradual: sparsity {goal.sparsity:g}: of the model's weights {has:g} are zero and stay so; {way}"
        )


def _require_steps(step: Gradual, steps: int, every: int) -> None:
    """Refuse a training in which zeros cannot be made little by little."""
    inside = [s for s in range(1, steps + 1) if step.begin <= s / steps <= step.end]
    made = len(inside) if step.cycles else sum(s % every == 0 for s in inside)
    least = step.cycles or (1 if step.method == RIGL else LEAST)
    if made < least:
        what = f"{least} cuts" if step.cycles else f"{least} masks, one every {every} steps,"
        raise UsageError(
            f"gradual: {what} do not fit between begin {step.begin:g} and end {step.end:g} of {steps} steps; "
            "give it a larger budget"
        )


def _told(step: Gradual, course: TrainingReport) -> Iterator[Finding]:
    """What a user should know of the zeros."""
    empty = [one.name for one in course.zeros if one.zeros == one.weights]
    if empty:
        said = f"{len(empty)} of {len(course.zeros)} matrices have no weight left"
        yield Finding("matrices-emptied", f"{said}; use scope: {MATRIX}, or less sparsity", empty[0])
    before = [share for _, share in course.pruned[:-1]]
    last = course.pruned[-1][1]
    if step.method == SOFT and before and abs(kept := last - _threshold_share(before, last)) > JUMP:
        word = "larger" if kept > 0 else "smaller"
        yield Finding(
            "penalty-missed",
            f"under the penalty {last - kept:.0%} of the weights were zero before the last mask made them "
            f"{last:.0%}; use a {word} penalty",
        )


def _threshold_share(before: list[float], last: float) -> float:
    """The share that was zero before the last mask, which is noted once more at the end of the training."""
    others = [share for share in before if abs(share - last) > 1e-3]
    return others[-1] if others else last
