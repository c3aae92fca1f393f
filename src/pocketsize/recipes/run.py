"""One recipe from start to finish: load, quantize, measure, export, read back, publish."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pocketsize
from pocketsize.distributed.world import Solo, World, together
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.compressed_tensors import packed_schemes
from pocketsize.exporting.gguf.writer import require_range
from pocketsize.exporting.manifest import write_manifest
from pocketsize.exporting.plain import require_storable
from pocketsize.exporting.table import EXPORTERS, behaviours, write_all
from pocketsize.exporting.verify import require_sound, verify_folder
from pocketsize.io.console import Console
from pocketsize.io.publish import publish_bytes, scratch, staging
from pocketsize.measurement.machine import cpu_seconds, machine, peak_rss_bytes, versions
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.size import sizes
from pocketsize.measurement.suite import latency, quality_of
from pocketsize.models.dtype import NAMES
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.models.shelf import Heap
from pocketsize.recipes.beforehand import require_lessons
from pocketsize.recipes.fingerprint import fingerprint
from pocketsize.recipes.gate import gates_before, gates_lose, with_gates
from pocketsize.recipes.grids import Quantizer, refuse_unstored, scheme_of
from pocketsize.recipes.journal import Journal, open_journal, working
from pocketsize.recipes.output import check_output, made_by, refuse_taken, require_finished, work_folder
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.record import SCHEMA, Finding, Mixture, RunRecord, SizePart, Timing
from pocketsize.recipes.room import require_room
from pocketsize.recipes.shortage import memory_explained
from pocketsize.recipes.step import Context
from pocketsize.recipes.stop import Stop, stopping
from pocketsize.recipes.stored import as_written
from pocketsize.recipes.texts import Texts, read_texts, with_own
from pocketsize.recipes.training import Training
from pocketsize.recipes.writing import own_windows


@dataclass(slots=True)
class Clock:
    """Seconds spent in each phase, and how a phase ends when a stop is asked for.

    What it leaves in the heap is given back: of a training of 99 million parameters that was 2.4 GB.
    """

    console: Console
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    phases_s: dict[str, float] = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)
    current: str = "load"
    cpu_before: float = field(default_factory=cpu_seconds)

    @contextmanager
    def phase(self, name: str, *, layers: bool = False) -> Iterator[None]:
        """Time a phase and announce it. One that has `layers` stops between them, others at once."""
        self.console.phase(name)
        self.current, start = name, time.perf_counter()
        with nullcontext() if layers else self.stop.at_once(name):
            yield
        Heap().give_back()
        self.phases_s[name] = self.phases_s.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done: a model, its recipe with every choice made, the texts, and where it all goes."""

    original: Model
    recipe: Recipe
    texts: Texts
    out: Path
    work: Path
    mixtures: tuple[Mixture, ...] = ()
    world: World = field(default_factory=Solo)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Everything that can change a byte of the result, by name."""
        return fingerprint(self.original, self.recipe, self.texts)


@dataclass(frozen=True, slots=True)
class Done:
    """What the steps of a recipe left: the model before and after, and how it came about."""

    original: Model
    model: Model
    recipe: Recipe
    texts: Texts
    context: Context
    mixtures: tuple[Mixture, ...] = ()


Page = Callable[[RunRecord], str]


def run(
    recipe: Recipe, out: Path, *, console: Console, pages: Mapping[str, Page], overwrite: bool = False
) -> RunRecord:
    """Run a recipe into the folder `out`, or go on with an unfinished run of it.

    `out` must be absent or empty, or with `overwrite` an output that is finished; that stays until the
    new one is verified, and takes its place at once. The output appears complete or not at all; until
    then the work is kept in a hidden folder beside it. Where `out` is what this run would make, there
    is nothing to do. `pages` are files made from the record (report, model card).

    Where `torchrun` started several processes, the first one does all of this; the others take part in its
    trainings and then end.
    """
    with together() as world:
        if world.rank:
            follow(recipe, world)
            sys.exit(0)
        return _run(recipe, out, console, pages, overwrite=overwrite, world=world)


def _run(
    recipe: Recipe, out: Path, console: Console, pages: Mapping[str, Page], *, overwrite: bool, world: World
) -> RunRecord:
    with starting(recipe, out, console, overwrite=overwrite) as clock:
        with clock.phase("load"):
            original, recipe, texts = prepare(recipe)
        job = Job(original, recipe, texts, out, work_folder(out), world=world)
        return carry_out(job, clock, pages, overwrite=overwrite)


def follow(recipe: Recipe, world: World) -> None:
    """Take part in the trainings of a recipe that another process runs."""
    original, recipe, texts = prepare(recipe)
    trainings = [i for i, step in enumerate(recipe.steps) if isinstance(step, Training)]
    with scratch("follow") as work, quick_products():
        ctx = _context(original, recipe, texts, open_journal(work, {}), lambda done, total, what: None)
        ctx.world, model = world, original
        for step in recipe.steps[: max(trainings, default=-1) + 1]:
            model = step.apply(model, ctx)


@contextmanager
def starting(recipe: Recipe, out: Path, console: Console, *, overwrite: bool) -> Iterator[Clock]:
    """What holds while there is work on `out`: nobody else is at it, and a stop loses nothing."""
    with stopping(console.phase) as stop, working(work_folder(out)), quick_products():
        clock = Clock(console, stop=stop)
        check_output(out, recipe, overwrite=overwrite)
        with memory_explained(lambda: clock.current, recipe.data):
            yield clock


def carry_out(job: Job, clock: Clock, pages: Mapping[str, Page], *, overwrite: bool) -> RunRecord:
    """The steps of a job and its output, as far as they are not there yet."""
    job_print = job.fingerprint
    if (record := made_by(job.out, job_print)) is not None:
        return record
    refuse_taken(job.out, overwrite=overwrite, now=job_print)
    require_room(job.original, job.recipe, job.texts, job.out, job.work)
    journal = open_journal(job.work, job_print, clock.stop.safe_point, lambda: clock.stop.asked)
    with memory_explained(lambda: clock.current, job.recipe.data, job.original):
        return publish(apply_steps(job, journal, clock), job.out, journal, clock, pages, overwrite=overwrite)


def prepare(recipe: Recipe) -> tuple[Model, Recipe, Texts]:
    """The model, the recipe with every choice made, and the texts: all that can fail early."""
    return settle(opened(recipe), recipe)


def opened(recipe: Recipe) -> Model:
    """The model that a recipe names."""
    return replace(load(recipe.source), dtype=NAMES[recipe.dtype])


def settle(original: Model, recipe: Recipe) -> tuple[Model, Recipe, Texts]:
    """What `prepare` gives, for a model that is open already."""
    refuse_unstored(recipe.steps, recipe.export)
    recipe = recipe.resolved(original)
    if any(EXPORTERS[name].is_folder for name in recipe.export):
        require_storable(original)
    if "gguf" in recipe.export:
        require_range(original, _left(original, recipe))
    trains = any(isinstance(step, Training) and step.reads for step in recipe.steps)
    calibrates = any(step.calibrated for step in recipe.steps)
    texts = read_texts(
        recipe.data,
        recipe.base,
        original,
        calibrates=calibrates,
        trains=trains,
        outline=recipe.outline(original),
    )
    findings = require_lessons(recipe, original, texts)
    return original, recipe, replace(texts, findings=(*texts.findings, *findings))


def _left(model: Model, recipe: Recipe) -> Iterator[str]:
    """Matrices that a GGUF has as they are: those that a quantizer leaves; without one embedding and head."""
    last = recipe.steps[-1]
    of = scheme_of(last, model) if isinstance(last, Quantizer) else None
    for name in model.ends if of is None else (*model.linears, *model.ends):
        if of is None or of(name) is None:
            yield name


def apply_steps(job: Job, journal: Journal, clock: Clock) -> Done:
    """The steps of a recipe, one after the other; what the model writes for them is kept beside."""
    original, recipe, texts = job.original, job.recipe, job.texts
    own = None
    if recipe.data.written_windows and any(step.calibrated for step in recipe.steps):
        length, seed = texts.calibrate.input_ids.shape[1], recipe.data.seed
        with clock.phase("write"):
            own = own_windows(original, recipe.windows_written, seed, work_folder(job.out), length=length)
        texts = with_own(texts, own, recipe.data.written_windows)
    context = _context(original, recipe, texts, journal, clock.console.progress)
    context.world, context.own = job.world, None if recipe.data.train else own
    model = original
    for step in recipe.steps:
        with clock.phase(step.kind, layers=True):
            model = step.apply(model, context)
    return Done(original, model, recipe, texts, context, job.mixtures)


def _context(
    original: Model,
    recipe: Recipe,
    texts: Texts,
    journal: Journal,
    progress: Callable[[int, int, str], None],
) -> Context:
    return Context(
        texts.calibrate.input_ids,
        texts.calibrate.mask,
        journal,
        progress,
        [*_quantized_before(original), *gates_before(original, recipe.steps), *texts.findings],
        original=original,
        corpus=texts.train,
        seed=recipe.data.seed,
    )


def _quantized_before(model: Model) -> Iterator[Finding]:
    """A finding for a source that was quantized already."""
    if (form := model.origin.dequantized_from) is not None:
        message = f"the model was already quantized ({form}); figures are relative to its dequantized weights"
        yield Finding("already-quantized", message)


def publish(
    done: Done, out: Path, journal: Journal, clock: Clock, pages: Mapping[str, Page], *, overwrite: bool
) -> RunRecord:
    """Measure, export and read back, then let the finished folder appear under its name."""
    with clock.phase("measure"):
        written = as_written(done.model, done.recipe.export)
        quality = quality_of(
            done.original, written, done.texts.evaluate, done.texts.corpus, seed=done.recipe.data.seed
        )
        quality = with_gates(quality, written, done.context.beside, done.texts.evaluate)
    with staging(out, replace=overwrite) as folder:
        with clock.phase("export"):
            artifacts = write_all(done.model, done.recipe.export, folder)
            behaviour = behaviours(done.model, artifacts)
            for name, path in done.context.beside.items():
                publish_bytes(folder / name, path.read_bytes())
        with clock.phase("latency"):
            timed = latency(done.original, [folder / a.path for a in artifacts if a.format == "gguf"])
        untimed = () if any(row.subject == "original" for row in timed) else (_untimed(done.original),)
        done.context.findings += [
            *_apart(done),
            *_no_smaller(done.original, artifacts),
            *gates_lose(quality.measurements),
        ]
        record = _record(done, artifacts, behaviour, (quality.measurements, quality.protocol), clock)
        timing = Timing(
            clock.started,
            clock.phases_s,
            cpu_seconds() - clock.cpu_before,
            peak_rss_bytes(),
            journal.resumed,
            tuple(timed),
            untimed,
        )
        record = replace(record, timing=timing, fingerprint=journal.fingerprint)
        publish_bytes(folder / "recipe.yaml", done.recipe.seen_from(out).to_yaml().encode())
        publish_bytes(folder / "record.json", record.to_json().encode())
        for name, page in pages.items():
            publish_bytes(folder / name, page(record).encode())
        write_manifest(folder)
        if overwrite and out.exists() and any(out.iterdir()):
            with clock.phase("verify"):
                require_sound(verify_folder(folder))
            require_finished(out)  # again: hours may have passed
    return record


def _record(
    done: Done,
    artifacts: tuple[Artifact, ...],
    behaviour: dict[str, Any],
    quality: tuple[tuple[Measurement, ...], tuple[str, ...]],
    clock: Clock,
) -> RunRecord:
    origin = done.original.origin
    stored = {a.path: a.bytes for a in artifacts}
    measured = (*quality[0], *sizes(origin, stored, done.model.origin.parameters))
    return RunRecord(
        schema=SCHEMA,
        version=pocketsize.__version__,
        recipe=done.recipe.to_dict(),
        recipe_sha256=done.recipe.sha256,
        origin=origin,
        task=done.model.arch.task,
        seed=done.recipe.data.seed,
        machine=machine(),
        versions=versions(),
        texts=done.texts.records,
        protocol=quality[1],
        steps=tuple(done.context.reports),
        findings=tuple(done.context.findings),
        measurements=measured,
        sizes=breakdown(done.model, artifacts),
        artifacts=artifacts,
        behaviour=behaviour,
        timing=Timing(started=clock.started),
        mixtures=done.mixtures,
    )


def breakdown(model: Model, artifacts: tuple[Artifact, ...]) -> tuple[SizePart, ...]:
    """Where the bytes of each artefact go: embedding and head, linears, everything else."""
    parts: list[SizePart] = []
    linears, ends = set(model.linears), set(model.ends)
    entries = model.checkpoint.entries
    counts = {"embeddings": 0, "linears": 0, "rest": 0}
    for name, entry in entries.items():
        size = 1
        for n in entry.shape:
            size *= n
        counts["linears" if name in linears else "embeddings" if name in ends else "rest"] += size
    for artifact in artifacts:
        shares = EXPORTERS[artifact.format].parts(model)
        parts += [SizePart(artifact.path, part, shares[part], counts[part]) for part in counts]
        rest = artifact.bytes - sum(shares.values())
        parts.append(SizePart(artifact.path, "metadata", rest))
    return tuple(parts)


def _untimed(model: Model) -> Finding:
    need = f"{4 * model.origin.parameters / 1e9:.1f} GB in float32"
    return Finding("not-timed", f"the original was not timed in torch: there is no memory for its {need}")


def _apart(done: Done) -> Iterator[Finding]:
    """A finding for each folder that keeps what the measured model has quantized."""
    model, quantized = done.model, done.model.quantized
    schemes = model.schemes
    for export in (EXPORTERS[name] for name in done.recipe.export if EXPORTERS[name].is_folder):
        packed = packed_schemes(model, schemes.get) if export.packs_ends else {}
        ends = [name for name in model.ends if name in quantized and name not in packed]
        if ends:
            said, bits = f"the {export.name} folder".replace("folder folder", "folder"), schemes[ends[0]].bits
            yield Finding(
                "folder-differs",
                f"the figures are of the model with embedding and head at {bits} bits; {said} "
                f"keeps them in {done.recipe.dtype}",
                ends[0],
            )


def _no_smaller(model: Model, artifacts: tuple[Artifact, ...]) -> Iterator[Finding]:
    """A finding for each artefact that is no smaller than what was downloaded."""
    for artifact in artifacts:
        if artifact.bytes >= model.origin.source_bytes:
            after, before = artifact.bytes / 1e6, model.origin.source_bytes / 1e6
            told = f"{after:.1f} MB is no smaller than the {before:.1f} MB that were downloaded"
            yield Finding("no-smaller", f"{artifact.format}: {told}")
