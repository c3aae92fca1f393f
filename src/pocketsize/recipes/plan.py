"""What a run will take and give, before it starts: memory, disk, time, sizes, and what cannot be done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

from pocketsize.errors import PocketsizeError, UnsupportedError
from pocketsize.exporting.table import EXPORTERS
from pocketsize.io.console import Console
from pocketsize.measurement.machine import cpu_seconds, peak_rss_bytes
from pocketsize.models.ledger import ledger
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.recipes.beforehand import with_all_tokens
from pocketsize.recipes.disk import Export
from pocketsize.recipes.duration import Took, Whole, durations
from pocketsize.recipes.grids import Quantizer, end_scheme, layer_scheme
from pocketsize.recipes.mixes import stand_ins
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.record import Finding, SizedLoss
from pocketsize.recipes.rehearse import Nothing, rehearse
from pocketsize.recipes.room import Room, home_of, room_of, size_of
from pocketsize.recipes.run import opened, settle
from pocketsize.recipes.stretch import Stretched, stretched_time
from pocketsize.recipes.texts import Texts
from pocketsize.recipes.training import Training
from pocketsize.recipes.trial import training_time

FITS, UNSUPPORTED, NO_ROOM = 0, 4, 5
# Stages that each trial has anew.
_TRIED = ("awq", "gptq", "hqq", "oats", "prune", "rtn", "smoothquant", "measure")
# Formats that hold nothing but what a scheme with a name, or pruning, makes.
_SPECIAL = ("bitsandbytes", "sparse")


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage: memory of the run's process and of one it starts, CPU seconds, seconds by the clock.

    Times are None where nothing was rehearsed.
    """

    name: str
    ram_bytes: int
    child_ram_bytes: int
    cpu_s: float | None
    time_s: float | None


@dataclass(frozen=True, slots=True)
class Kept:
    """Tensors of one role that stay as they are, and why."""

    role: str
    tensors: int
    parameters: int
    why: str


@dataclass(frozen=True, slots=True)
class Impossible:
    """An export that cannot be written. `asked` says that the recipe names it."""

    format: str
    reason: str
    asked: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run takes and gives.

    `peak_ram_bytes` is that of its largest process, `needed_ram_bytes` counts a process and its child
    together. Disk is that of the finished output and the most while the run goes on. `trials` is how
    many schemes may have to be tried; times are then those of all of them. `way_out` says what would
    fit where the run does not. Where it was asked for, `curve` is the least KL that was predicted within each
    size, widths chosen matrix by matrix, and `ways` are what is planned and all linears stored alike.
    """

    model: str
    recipe: dict[str, object]
    exports: tuple[Export, ...]
    impossible: tuple[Impossible, ...]
    unquantized: tuple[Kept, ...]
    findings: tuple[Finding, ...]
    stages: tuple[PlannedStage, ...] = ()
    trials: int = 1
    peak_ram_bytes: int | None = None
    needed_ram_bytes: int | None = None
    available_ram_bytes: int | None = None
    output_disk_bytes: int | None = None
    peak_disk_bytes: int | None = None
    free_disk_bytes: int | None = None
    disk_folder: str = ""
    cpu_s: float | None = None
    time_s: float | None = None
    rehearsal: str = ""
    rehearsal_time_s: float | None = None
    way_out: str = ""
    curve: tuple[SizedLoss, ...] = ()
    ways: tuple[SizedLoss, ...] = ()

    @property
    def exit_code(self) -> int:
        """0: it fits; 4: something it asks for cannot be done; 5: there is no room for it."""
        if any(one.asked for one in self.impossible):
            return UNSUPPORTED
        return NO_ROOM if self.way_out else FITS

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self) | {"exit_code": self.exit_code})


@quick_products()
def plan(
    recipe: Recipe,
    out: Path,
    *,
    console: Console,
    model: Model | None = None,
    trials: int = 1,
    rehearsed: bool = True,
) -> Plan:
    """The plan of a recipe into `out`, which may be absent; nothing is written there.

    What fits is rehearsed, unless `rehearsed` is False: one block, a few for steps that make another model,
    and a second of a training; times come from that. `model` saves loading it again.
    """
    home_of(out)  # refused before anything is loaded
    console.phase("load")
    start, cpu, before = perf_counter(), cpu_seconds(), peak_rss_bytes()
    original = model or opened(recipe)
    found = Plan(recipe.model, recipe.to_dict(), (), _impossible(original, recipe), (), ())
    if found.exit_code == UNSUPPORTED:
        return found
    original, recipe, texts = settle(original, recipe)
    shape, room = recipe.outline(original), room_of(original, recipe, texts, out)
    load = Took("load", cpu_seconds() - cpu, perf_counter() - start)
    peak = peak_rss_bytes()
    loaded = PlannedStage("load", peak if peak > before else room.base_bytes, 0, load.cpu_s, load.time_s)
    found = replace(
        found,
        recipe=recipe.to_dict(),
        exports=room.disk.exports,
        unquantized=tuple(_unquantized(shape, recipe)),
        findings=(*texts.findings, *_stand_ins(shape, recipe)),
        trials=trials,
        **_room(room, trials, loaded),
    )
    if not room.fits or not rehearsed:
        return found
    return _with_times(found, (original, recipe, texts), room, console)


def _room(room: Room, trials: int, load: PlannedStage) -> dict[str, object]:
    """The fields of a plan that tell of memory and disk."""
    stages = [PlannedStage(s.name, s.ram_bytes, s.child_bytes, None, None) for s in room.stages]
    return {
        "stages": (load, *stages),
        "peak_ram_bytes": max(max(s.ram_bytes, s.child_ram_bytes) for s in (load, *stages)),
        "needed_ram_bytes": max(room.needed_ram_bytes, load.ram_bytes),
        "available_ram_bytes": room.available_ram_bytes,
        "output_disk_bytes": room.disk.output_bytes,
        "peak_disk_bytes": room.disk.output_bytes + trials * room.disk.work_bytes,
        "free_disk_bytes": room.free_disk_bytes,
        "disk_folder": str(room.disk_folder),
        "way_out": room.way_out,
    }


def _with_times(found: Plan, prepared: tuple[Model, Recipe, Texts], room: Room, console: Console) -> Plan:
    """The plan with the times that a rehearsal tells."""
    original, recipe, texts = prepared
    took: dict[str, Took] = {}
    model = bare = teacher = original  # `bare`: without the zeros that are made as it is rehearsed
    said: list[str] = []
    start = perf_counter()
    for step in recipe.steps:
        if isinstance(step, Training):
            console.phase(f"rehearse {step.kind}")
            took[step.kind], made = training_time(step, model, teacher, texts, seed=recipe.data.seed)
            said.append(f"{step.kind} was tried for {made} step{'' if made == 1 else 's'}")
        elif isinstance(step, Stretched):
            console.phase(f"rehearse {step.kind}")
            took[step.kind], most = stretched_time(step, model, texts, seed=recipe.data.seed)
            said.append(f"{step.kind} was done on {most} of {len(model.blocks)} blocks")
        outline = with_all_tokens(step).outline
        model, bare = outline(model), bare if isinstance(step, Prune | Oats) else outline(bare)
        if model.arch.task != teacher.arch.task:  # a classifier was made, which is who teaches from now on
            teacher = model
    walks = tuple(
        step.first if isinstance(step, Qat) else step
        for step in recipe.steps
        if isinstance(step, Quantizer | Prune | Oats)
    )
    path = model.blocks[len(model.blocks) // 2]
    console.phase(f"rehearse {path}")
    rest = replace(recipe, steps=walks or (Nothing(),))
    try:
        one = rehearse(bare, rest, texts, written=recipe.windows_written)
    except PocketsizeError as error:
        raise type(error)(f"rehearsal of {path}: {error}") from error
    for t in durations(Whole(model, rest, size_of(recipe, texts), room.disk, original), one):
        own = "qat" if "qat" in took and t.name == walks[-1].kind else t.name
        before = took.get(own, Took(own, 0.0, 0.0))
        took[own] = Took(own, before.cpu_s + t.cpu_s, before.time_s + t.time_s)
    done = ["pruned" if isinstance(step, Prune | Oats) else "quantized" for step in walks]
    if any(step.calibrated for step in walks):
        done.insert(0, "calibrated")
    said.append(f"{path} was {', '.join((*done, 'measured'))}, saved and read back: {_formats(found)}")
    found = replace(found, findings=(*found.findings, *one.findings))
    stages = tuple(_timed(stage, took.get(stage.name), found.trials) for stage in found.stages)
    return replace(
        found,
        stages=stages,
        cpu_s=sum(stage.cpu_s or 0.0 for stage in stages),
        time_s=sum(stage.time_s or 0.0 for stage in stages),
        rehearsal="; ".join(said),
        rehearsal_time_s=perf_counter() - start,
    )


def _timed(stage: PlannedStage, took: Took | None, trials: int) -> PlannedStage:
    if took is None:
        return stage
    times = trials if stage.name in _TRIED else 1
    return replace(stage, cpu_s=times * took.cpu_s, time_s=times * took.time_s)


def _formats(found: Plan) -> str:
    return ", ".join(export.format for export in found.exports)


def _impossible(model: Model, recipe: Recipe) -> tuple[Impossible, ...]:
    """The exports that this model cannot have with these steps, those that were asked for first.

    Those that few models have are told only where they were asked for.
    """
    found: list[Impossible] = []
    for name in sorted(EXPORTERS, key=lambda name: name not in recipe.export):
        asked = name in recipe.export
        if not asked and name in _SPECIAL:
            continue
        try:
            replace(recipe, export=(name,)).resolved(model)
        except UnsupportedError as error:
            found.append(Impossible(name, str(error).removeprefix(f"export {name}: "), asked))
    if not any(one.asked for one in found):
        try:
            recipe.resolved(model)
        except UnsupportedError as error:  # each is possible, but not all at once
            found += [Impossible(name, str(error), True) for name in recipe.export]
    return tuple(found)


def _stand_ins(model: Model, recipe: Recipe) -> Iterator[Finding]:
    for step in recipe.steps:
        if isinstance(step, Quantizer):
            yield from stand_ins(step.overrides, model)


def _unquantized(model: Model, recipe: Recipe) -> Iterator[Kept]:
    """What no step of a resolved recipe touches, by role."""
    quantizes = any(isinstance(step, Quantizer) for step in recipe.steps)
    ends = any(isinstance(step, Quantizer) and step.embeddings is not None for step in recipe.steps)
    same = any(isinstance(step, Quantizer) and step.embeddings == "same" for step in recipe.steps)
    for total in ledger(model).totals:
        if total.role == "compressible" and not quantizes:
            why = "no step of the recipe quantizes it"
        elif total.role == "compressible" or (total.role in ("embedding", "head") and ends):
            folders = [name for name in recipe.export if EXPORTERS[name].is_folder]
            if total.role == "compressible" or not folders or same:
                continue
            why = f"in {' and '.join(folders)} only: its loaders take quantized linears of blocks alone"
        else:
            why = _WHY[total.role]
        yield Kept(total.role, total.tensors, total.parameters, why)
    steps = [step for step in recipe.steps if isinstance(step, Quantizer)]
    left = [name for name in model.linears if any(layer_scheme(step, name) is None for step in steps)]
    if left:
        count = sum(math.prod(model.matrix_shape(name)) for name in left)
        yield Kept("compressible", len(left), count, "an override leaves it")
    for name in model.ends if ends else ():
        if all(end_scheme(step, name) is None for step in steps):
            role = "embedding" if name == model.arch.embedding else "head"
            yield Kept(role, 1, math.prod(model.checkpoint.entries[name].shape), "an override leaves it")


_WHY = {
    "embedding": "the recipe leaves it (embeddings: null)",
    "head": "the recipe leaves it (embeddings: null)",
    "norm": "vectors that scale what passes: next to no bytes",
    "bias": "vectors: next to no bytes",
    "other": "not a linear of a block: position tables, routers, poolers",
}
