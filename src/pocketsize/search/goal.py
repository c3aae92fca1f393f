"""A goal in, a recipe out: the finest rung that fits, or the smallest that keeps enough."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pocketsize.errors import ResourceError, UnsupportedError, UsageError
from pocketsize.exporting.table import EXPORTERS
from pocketsize.io.publish import scratch
from pocketsize.measurement.embedding import keep_of
from pocketsize.measurement.suite import quality_of
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.fingerprint import fingerprint
from pocketsize.recipes.grids import Quantizer, block_scheme, embedding_scheme, scheme_of
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.output import made_by, refuse_taken, work_folder
from pocketsize.recipes.plan import Plan
from pocketsize.recipes.plan import plan as plan_recipe
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.record import Finding, Mixture, RunRecord, SizedLoss
from pocketsize.recipes.room import require_room
from pocketsize.recipes.rotate import Rotate
from pocketsize.recipes.run import (
    Clock,
    Console,
    Job,
    Page,
    apply_steps,
    carry_out,
    opened,
    prepare,
    settle,
    starting,
)
from pocketsize.recipes.shortage import memory_explained
from pocketsize.recipes.stored import as_written
from pocketsize.recipes.texts import Texts
from pocketsize.search.ladder import Rung, ladder
from pocketsize.search.mixed import Progress, Table, best_mixture, measured


@dataclass(frozen=True, slots=True)
class Goal:
    """What a user asks for: at most `fit_bytes`, `ratio` times smaller, at least the share `keep`.

    `ratio` is against the file that was downloaded. Sizes are those of the first export.
    """

    keep: float | None = None
    fit_bytes: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.keep is None and self.fit_bytes is None and self.ratio is None:
            raise UsageError("a goal is needed: --keep 95%, --fit 80MB or --ratio 4x")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(f"keep must lie between 0 and 100 %, got {self.keep:.0%}")
        if self.fit_bytes is not None and self.fit_bytes < 1:
            raise UsageError(f"fit must be a positive size, got {self.fit_bytes} bytes")
        if self.ratio is not None and self.ratio <= 1:
            raise UsageError(f"ratio must be above 1x, got {self.ratio:g}x")

    def limit_bytes(self, model: Model) -> int | None:
        """The most bytes the goal allows; None if it sets no limit."""
        by_ratio = None if self.ratio is None else int(model.origin.source_bytes / self.ratio)
        limits = [b for b in (self.fit_bytes, by_ratio) if b is not None]
        return min(limits) if limits else None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to meet a goal: the step, the exact bytes of its first export, and how it was chosen.

    `fineness` is its rung's, where widths are not mixed.
    """

    name: str
    step: Gptq
    bytes: int
    mixtures: tuple[Mixture, ...] = ()
    fineness: tuple[int, int, bool] = (0, 0, False)


def shrink(
    recipe: Recipe,
    goal: Goal,
    out: Path,
    *,
    console: Console,
    pages: Mapping[str, Page],
    overwrite: bool = False,
    mixed: bool = True,
) -> RunRecord:
    """Find the way that meets the goal and run it into `out`.

    With a size alone, the best way within it is run once: sizes are known before any work, and of a
    generator it is measured once what each width of each matrix costs (`mixed`; without, or for an
    encoder, it is the one with the widest blocks, of those the one with the widest embedding). With
    `keep`, ways are quantized and measured from the smallest upwards until one keeps enough. What was
    tried stays in the work folder until the run ends, so nothing is done twice.
    """
    _require_widths(recipe)
    with starting(recipe, out, console, overwrite=overwrite) as clock:
        with clock.phase("load"):
            model, first, texts = prepare(recipe)
        ways = _fitting(recipe, goal, model, first)
        if mixed and mixes(model, recipe.export):
            with clock.phase("sensitivity"):
                ways = _mixed(ways, goal, (model, first, texts), work_folder(out), console.progress)
        elif goal.keep is None:
            ways = [max(ways, key=_finest)]
        for way in ways:
            resolved = with_way(recipe, way).resolved(model)
            record = made_by(out, fingerprint(model, resolved, texts))
            if record is not None and (goal.keep or 0) <= keep_of(record.measurements, record.task):
                return record
        refuse_taken(out, overwrite=overwrite)
        chosen = ways[0]
        if goal.keep is not None:
            chosen = _enough(recipe, goal.keep, sorted(ways, key=lambda way: way.bytes), out, clock)
        console.phase(f"chosen: {chosen.name}")
        with clock.phase("load"):
            job = _job(recipe, out, chosen)
        return carry_out(job, clock, pages, overwrite=overwrite)


def _require_widths(recipe: Recipe) -> None:
    """Refuse exports that hold one scheme alone: between widths of it there is nothing to choose."""
    if bare := [name for name in recipe.export if not EXPORTERS[name].bits]:
        raise UnsupportedError(
            f"a goal chooses among widths, and {bare[0]} holds none; use `quantize --scheme NF4 --target "
            f"{bare[0]}`, or another target"
        )


def mixes(model: Model, exports: Sequence[str]) -> bool:
    """Whether widths can be chosen matrix by matrix: KL is of generators; experts see too little text.

    Not where an export has one scheme alone.
    """
    return model.arch.task == "generate" and model.arch.experts is None and _can_mix(model, exports)


def _can_mix(model: Model, exports: Sequence[str]) -> bool:
    """Whether the exports hold linears of more than one scheme."""
    two = Scheme(8, None, symmetric=True), Scheme(4, None, symmetric=True)
    return all(EXPORTERS[name].mixes(two, model.arch) is None for name in exports)


def _mixed(
    ways: list[Way], goal: Goal, prepared: tuple[Model, Recipe, Texts], kept: Path, progress: Progress
) -> list[Way]:
    """The best way within the goal's size; with `keep`, the best within the size of each way."""
    model, first, texts = prepared
    steps = [way.step.resolve(model, first.export) for way in ways]
    table = measured(model, texts, steps, first.export, kept, progress)
    predicted = [(way, table.of_step(model, step)) for way, step in zip(ways, steps, strict=True)]
    limit = goal.limit_bytes(model) or max(way.bytes for way in ways)
    budgets = [limit] if goal.keep is None else sorted({way.bytes for way in ways})
    found = [_best(budget, (model, first, table), predicted) for budget in budgets]
    return list({way.name: way for way in found}.values())


def _best(
    budget: int,
    prepared: tuple[Model, Recipe, Table],
    alike: Sequence[tuple[Way, float]],
) -> Way:
    """The way with the least predicted KL within a size: widths by matrix, or all linears alike."""
    model, first, table = prepared
    within = [(way, kl) for way, kl in alike if way.bytes <= budget]
    best, kl = min(within, key=lambda pair: (pair[1], -pair[0].bytes))
    try:
        step, found = best_mixture(model, table, first.export, budget)
    except ResourceError:  # what all of them mixed take at least is more than some alike do
        return best
    curve = tuple(SizedLoss("", size, loss) for size, loss in found.curve)
    known = tuple(SizedLoss(way.name, way.bytes, loss) for way, loss in alike)
    if kl <= found.loss:
        return replace(best, mixtures=(Mixture(SizedLoss(best.name, best.bytes, kl), curve, known),))
    bytes_ = predicted_step_bytes(model, first, step)
    name = f"{step.scheme[1]}-bit blocks, {len(step.overrides)} linears of other widths, {_mb(bytes_)}"
    mixture = Mixture(SizedLoss(name, bytes_, found.loss), curve, known)
    return Way(name, step, bytes_, (mixture,))


def _fitting(recipe: Recipe, goal: Goal, model: Model, first: Recipe) -> list[Way]:
    """The rungs within the goal's size, as ways."""
    ways = [
        Way(rung.name, rung.step(), predicted_bytes(model, first, rung), fineness=rung.fineness)
        for rung in ladder(model, first.export)
    ]
    limit = goal.limit_bytes(model)
    fitting = [way for way in ways if limit is None or way.bytes <= limit]
    if not fitting:
        least = min(ways, key=lambda way: way.bytes)
        raise ResourceError(
            f"{recipe.model}: {_mb(limit or 0)}{_hint(limit or 0)} is below the smallest {first.export[0]} "
            f"file possible: {_mb(least.bytes)} ({least.name}); ask for --fit {_mb(least.bytes, up=True)} or "
            "more"
        )
    return fitting


def _job(recipe: Recipe, out: Path, way: Way) -> Job:
    return Job(*prepare(with_way(recipe, way)), out, trial_folder(out, way), way.mixtures)


_ALIKE = Finding(
    "planned-alike",
    "all linears are planned alike; shrink measures and mixes their widths, and so does plan --curve",
)


@quick_products()
def plan(recipe: Recipe, goal: Goal, out: Path, *, console: Console, curve: bool = False) -> Plan:
    """The plan of what `shrink` would do; without `curve` with all linears alike.

    With `keep`, that of trying every way within the size.
    """
    _require_widths(recipe)
    model = opened(recipe)
    ways = _fitting(recipe, goal, model, recipe.resolved(model))
    mixing = curve and mixes(model, recipe.export)
    if curve:
        _require_costs(model, recipe)
    if mixing:
        console.phase("sensitivity")
        with scratch("curve") as kept:
            ways = _mixed(ways, goal, settle(model, recipe), kept, console.progress)
    chosen = max(ways, key=_finest if goal.keep is None else lambda way: way.bytes)
    trials = 1 if goal.keep is None else len(ways)
    found = plan_recipe(with_way(recipe, chosen), out, console=console, model=model, trials=trials)
    if not curve and mixes(model, recipe.export):
        found = replace(found, findings=(*found.findings, _ALIKE))
    for mixture in chosen.mixtures:
        others = (way for way in mixture.alike if way.name != mixture.chosen.name)
        found = replace(found, curve=mixture.curve, ways=(mixture.chosen, *others))
    if curve and not mixing:
        return _with_costs(found, model, with_way(recipe, chosen), console)
    return found


@quick_products()
def plan_with_curve(recipe: Recipe, out: Path, *, console: Console) -> Plan:
    """The plan of a recipe, and what each width of each matrix would cost."""
    model = opened(recipe)
    _require_costs(model, recipe)
    found = plan_recipe(recipe, out, console=console, model=model)
    if found.exit_code:
        return found
    return _with_costs(found, model, recipe, console)


def _with_costs(found: Plan, model: Model, recipe: Recipe, console: Console) -> Plan:
    """The plan of a recipe with what its sizes cost."""
    console.phase("sensitivity")
    with scratch("curve") as kept:
        curve, ways = _curve(*settle(model, recipe), kept, console.progress)
    return replace(found, curve=curve, ways=ways)


Sized = tuple[SizedLoss, ...]


def _curve(model: Model, first: Recipe, texts: Texts, kept: Path, progress: Progress) -> tuple[Sized, Sized]:
    """The least KL within each size that the exports can have; what the recipe does, and linears alike."""
    *before, own = first.steps
    for step in before:
        model = step.outline(model)
    assert isinstance(own, Quantizer)
    everything = Goal(keep=1.0)
    ways = _fitting(replace(first, steps=(own,)), everything, model, first)
    steps = [*(way.step.resolve(model, first.export) for way in ways), *([own] if _is_plain(own) else [])]
    table = measured(model, texts, steps, first.export, kept, progress)
    alike = [SizedLoss(w.name, w.bytes, table.of_step(model, s)) for w, s in zip(ways, steps, strict=False)]
    bytes_ = EXPORTERS[first.export[0]].predict_bytes(model, scheme_of(own, model))
    told = [SizedLoss(f"as planned: {own.kind} {own.scheme}", bytes_, table.of_step(model, own))] * (
        len(steps) > len(ways)
    )
    if not _can_mix(model, first.export):
        return (), (*told, *alike)
    found = best_mixture(model, table, first.export, max(way.bytes for way in ways))[1]
    return tuple(SizedLoss("", size, loss) for size, loss in found.curve), (*told, *alike)


def _is_plain(step: Quantizer) -> bool:
    """Whether a resolved step stores all linears alike, in groups that stand by themselves."""
    schemes = [scheme for scheme in (block_scheme(step), embedding_scheme(step)) if scheme is not None]
    return not step.overrides and not any(s.super_blocks or s.activations for s in schemes)


def _require_costs(model: Model, recipe: Recipe) -> None:
    """Refuse a model, or a chain of steps, of which it is not known what a width costs."""
    if model.arch.task != "generate" or model.arch.experts is not None:
        kind = "a mixture of experts" if model.arch.experts else "an encoder"
        raise UnsupportedError(f"{recipe.model}: what widths cost is known of generators, not of {kind}")
    *before, last = recipe.steps
    if other := next((step.kind for step in before if not isinstance(step, Rotate)), None):
        raise UnsupportedError(f"what widths cost is of the model as it is, which {other} changes first")
    if not isinstance(last, Quantizer):
        raise UnsupportedError(f"what widths cost is of steps that quantize; {last.kind} does not")


def trial_folder(out: Path, way: Way) -> Path:
    """Where the work on one way is kept until the output is finished."""
    return work_folder(out) / re.sub(r"[^a-z0-9]+", "-", way.name)


def with_way(recipe: Recipe, way: Way) -> Recipe:
    """The recipe with its step on the grid of this way; what is corrected, learned and tuned stays."""
    (asked,) = recipe.steps
    assert isinstance(asked, Quantizer)
    grid = {field.name: getattr(way.step, field.name) for field in fields(Quantizer)}
    return replace(recipe, steps=(replace(asked, **grid),))


def predicted_bytes(model: Model, recipe: Recipe, rung: Rung) -> int:
    """Exact size of the first export at a rung, without writing it."""
    return predicted_step_bytes(model, recipe, rung.step())


def predicted_step_bytes(model: Model, recipe: Recipe, step: Gptq) -> int:
    """Exact size of the first export with this step, without writing it."""
    resolved = step.resolve(model, recipe.export)
    return EXPORTERS[recipe.export[0]].predict_bytes(model, scheme_of(resolved, model))


def _enough(recipe: Recipe, keep: float, ways: list[Way], out: Path, clock: Clock) -> Way:
    """The smallest way whose measured quality reaches `keep`."""
    tried: list[str] = []
    for way in ways:
        with clock.phase("load"):
            job = _job(recipe, out, way)
        kept = _kept(job, clock)
        tried.append(f"{way.name} ({_mb(way.bytes)}) keeps {kept:.1%}")
        clock.console.phase(tried[-1])
        if kept >= keep:
            return way
    raise ResourceError(
        f"{recipe.model}: nothing within the size keeps {100 * keep:g}%: {'; '.join(tried)}; the work stays "
        f"in {work_folder(out)}, for a lower --keep, or to be deleted"
    )


def _kept(job: Job, clock: Clock) -> float:
    """The share of quality kept by a job, measured; its work stays for the run to take up."""
    require_room(job.original, job.recipe, job.texts, job.out, job.work)
    journal = open_journal(job.work, job.fingerprint, clock.stop.safe_point)
    with memory_explained(lambda: clock.current, job.recipe.data, job.original):
        done = apply_steps(job, journal, clock)
        with clock.phase("measure"):
            texts, written = job.texts, as_written(done.model, job.recipe.export)
            quality = quality_of(
                job.original, written, texts.evaluate, texts.corpus, seed=job.recipe.data.seed
            )
    return keep_of(quality.measurements, job.original.arch.task)


def _finest(way: Way) -> tuple[tuple[int, int, bool], int]:
    """What is largest for the way that is likely to keep most, where nothing was measured."""
    return way.fineness, way.bytes


def _hint(size: int) -> str:
    """Of fewer bytes than any model has: what else may have been meant."""
    return f" ({size} bytes; did you mean {size}MB?)" if size < 10**4 else ""


def _mb(size: int, *, up: bool = False) -> str:
    if size < 10**6:
        return f"{-(-size // 100) / 10:.1f}kB" if up else f"{size / 1e3:.1f}kB"
    return f"{-(-size // 10**5) / 10:.1f}MB" if up else f"{size / 1e6:.1f}MB"
