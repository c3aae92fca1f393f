"""A goal in, a recipe out: the largest rung that fits, or the smallest that keeps enough."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pocketsize.errors import ResourceError, UsageError
from pocketsize.exporting.table import EXPORTERS
from pocketsize.measurement.embedding import keep_of
from pocketsize.measurement.suite import quality_of
from pocketsize.models.model import Model
from pocketsize.recipes.fingerprint import fingerprint
from pocketsize.recipes.grids import scheme_of
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.output import made_by, refuse_taken, work_folder
from pocketsize.recipes.plan import Plan
from pocketsize.recipes.plan import plan as plan_recipe
from pocketsize.recipes.quantize import Gptq, steps_learned
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.record import RunRecord
from pocketsize.recipes.room import require_room
from pocketsize.recipes.run import (
    Clock,
    Console,
    Job,
    Page,
    apply_steps,
    carry_out,
    opened,
    prepare,
    starting,
)
from pocketsize.recipes.shortage import memory_explained
from pocketsize.search.ladder import Rung, ladder

UNITS: Mapping[str, float] = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


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


def parse_share(text: str) -> float:
    """`95%` or `0.95` as 0.95."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if not found:
        raise UsageError(f"keep is a share such as 95% or 0.95, got {text!r}")
    share = float(found[1]) / (100 if found[2] else 1)
    if share > 1:
        hint = f"; did you mean {found[1]}%?" if not found[2] and share <= 100 else ""
        raise UsageError(f"keep is a share of at most 100 %, got {text!r}{hint}")
    return share


def parse_bytes(text: str) -> int:
    """`80MB`, `1.5 GiB` or plain bytes as a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): factor for name, factor in UNITS.items()} | {"": 1.0, "b": 1.0}
    if not found or found[2].lower() not in units:
        raise UsageError(f"fit is a size such as 80MB or 1.5GiB, got {text!r}")
    return int(float(found[1]) * units[found[2].lower()])


def parse_ratio(text: str) -> float:
    """`4x` or `4` as 4.0."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]?\s*", text)
    if not found:
        raise UsageError(f"ratio is a factor such as 4x, got {text!r}")
    return float(found[1])


def shrink(
    recipe: Recipe,
    goal: Goal,
    out: Path,
    *,
    console: Console,
    pages: Mapping[str, Page],
    overwrite: bool = False,
) -> RunRecord:
    """Find the rung that meets the goal and run it into `out`.

    With a size alone, the largest rung that fits is run once: sizes are known before any work.
    With `keep`, rungs are quantized and measured from the smallest upwards until one keeps
    enough. What was tried stays in the work folder until the run ends, so nothing is done twice.
    """
    with starting(recipe, out, console, overwrite=overwrite) as clock:
        with clock.phase("load"):
            model, first, texts = prepare(recipe)
        fitting = _fitting(recipe, goal, model, first)
        if goal.keep is None:
            fitting = [max(fitting, key=lambda pair: pair[1])]
        for rung, _ in fitting:
            resolved = with_rung(recipe, rung).resolved(model)
            record = made_by(out, fingerprint(model, resolved, texts))
            if record is not None and (goal.keep or 0) <= keep_of(record.measurements, record.task):
                return record
        refuse_taken(out, overwrite=overwrite)
        chosen = fitting[0][0]
        if goal.keep is not None:
            chosen = _enough(recipe, goal.keep, sorted(fitting, key=lambda pair: pair[1]), out, clock)
        console.phase(f"chosen: {chosen.name}")
        with clock.phase("load"):
            job = _job(recipe, out, chosen)
        return carry_out(job, clock, pages, overwrite=overwrite)


def _fitting(recipe: Recipe, goal: Goal, model: Model, first: Recipe) -> list[tuple[Rung, int]]:
    """The rungs within the goal's size, each with its bytes."""
    sized = [(rung, predicted_bytes(model, first, rung)) for rung in ladder(model, first.export)]
    limit = goal.limit_bytes(model)
    fitting = [(rung, size) for rung, size in sized if limit is None or size <= limit]
    if not fitting:
        rung, size = min(sized, key=lambda pair: pair[1])
        raise ResourceError(
            f"{recipe.model}: {_mb(limit or 0)} is below the smallest {first.export[0]} file possible: "
            f"{_mb(size)} ({rung.name}); ask for --fit {_mb(size, up=True)} or more"
        )
    return fitting


def _job(recipe: Recipe, out: Path, rung: Rung) -> Job:
    return Job(*prepare(with_rung(recipe, rung)), out, trial_folder(out, rung))


def plan(recipe: Recipe, goal: Goal, out: Path, *, console: Console) -> Plan:
    """The plan of what `shrink` would do. With `keep`, that of trying every rung within the size."""
    model = opened(recipe)
    fitting = _fitting(recipe, goal, model, recipe.resolved(model))
    chosen = with_rung(recipe, max(fitting, key=lambda pair: pair[1])[0])
    trials = 1 if goal.keep is None else len(fitting)
    return plan_recipe(chosen, out, console=console, model=model, trials=trials)


def trial_folder(out: Path, rung: Rung) -> Path:
    """Where the work on one rung is kept until the output is finished."""
    return work_folder(out) / re.sub(r"[^a-z0-9]+", "-", rung.name)


def with_rung(recipe: Recipe, rung: Rung) -> Recipe:
    """The recipe with this rung as its quantization."""
    learn = max(map(steps_learned, recipe.steps), default=0)
    return replace(recipe, steps=(replace(rung.step(), learn=learn),))


def predicted_bytes(model: Model, recipe: Recipe, rung: Rung) -> int:
    """Exact size of the first export at a rung, without writing it."""
    step = rung.step().resolve(model, recipe.export)
    assert isinstance(step, Gptq)
    return EXPORTERS[recipe.export[0]].predict_bytes(model, scheme_of(step, model))


def _enough(recipe: Recipe, keep: float, rungs: list[tuple[Rung, int]], out: Path, clock: Clock) -> Rung:
    """The smallest rung whose measured quality reaches `keep`."""
    tried: list[str] = []
    for rung, size in rungs:
        with clock.phase("load"):
            job = _job(recipe, out, rung)
        kept = _kept(job, clock)
        tried.append(f"{rung.name} ({_mb(size)}) keeps {kept:.1%}")
        clock.console.phase(tried[-1])
        if kept >= keep:
            return rung
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
            texts = job.texts
            quality = quality_of(
                job.original, done.model, texts.evaluate, texts.corpus, seed=job.recipe.data.seed
            )
    return keep_of(quality.measurements, job.original.arch.task)


def _mb(size: int, *, up: bool = False) -> str:
    if size < 10**6:
        return f"{-(-size // 100) / 10:.1f}kB" if up else f"{size / 1e3:.1f}kB"
    return f"{-(-size // 10**5) / 10:.1f}MB" if up else f"{size / 1e6:.1f}MB"
