"""The stages of a step: each is kept only if the model comes nearer to the original on other text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool, Int64
from torch import Tensor

from pocketsize.measurement.suite import divergence
from pocketsize.models.batches import worth
from pocketsize.models.model import Model
from pocketsize.models.shelf import Heap
from pocketsize.recipes.record import Stage
from pocketsize.recipes.step import Context

# At most so many windows judge a stage, or shorter ones of as many tokens.
JUDGES = 16


@dataclass(frozen=True, slots=True)
class Best:
    """The best of the stages so far: its name, its model, and what it reported."""

    name: str
    model: Model
    divergence: float
    ctx: Context


# A stage; it is given the best before it, which the first has none of.
Way = Callable[[Model, Context, Best | None], Model]


def staged(model: Model, ctx: Context, ways: Mapping[str, Way], judges: Sequence[int]) -> Model:
    """The model that the best of these ways gives, judged by the calibration windows with these numbers.

    Each way keeps its work in a store of its own, so all of it can be resumed. The reports and findings
    of the best become those of the step, and the report says what each stage gave.
    """
    picked = list(judges[: worth(ctx.mask[list(judges)], JUDGES)])
    return nearest(model, ctx, ways, ctx.input_ids[picked], ctx.mask[picked])


def nearest(
    model: Model, ctx: Context, ways: Mapping[str, Way], ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"]
) -> Model:
    """`staged`, judged by windows of any text."""
    best: Best | None = None
    told: list[Stage] = []
    for number, (name, way) in enumerate(ways.items()):
        own = part_of(ctx, name, number, len(ways))
        done = way(model, own, best)
        Heap().give_back()
        apart = divergence(model, done, ids, mask)
        told.append(Stage(name, apart, kept=best is None or apart < best.divergence))
        if told[-1].kept:
            best = Best(name, done, apart, own)
    assert best is not None
    *before, report = best.ctx.reports
    ctx.reports += [*before, replace(report, stages=tuple(told))]
    ctx.findings += best.ctx.findings
    return best.model


def part_of(ctx: Context, name: str, number: int, count: int) -> Context:
    """What one of several stages is given; its progress is that of all of them."""

    def progress(done: int, total: int, what: str) -> None:
        ctx.progress(number * total + done, count * total, f"{name}: {what}")

    return replace(ctx, store=ctx.store.beside(name), progress=progress, findings=[], reports=[])
