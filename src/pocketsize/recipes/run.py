"""One recipe from start to finish: load, quantize, measure, export, read back, publish."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

import pocketsize
from pocketsize.data.written import write_windows
from pocketsize.errors import UsageError
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.compressed_tensors import require_storable
from pocketsize.exporting.manifest import NAME as MANIFEST
from pocketsize.exporting.manifest import added_files, write_manifest
from pocketsize.exporting.table import EXPORTERS, behaviours
from pocketsize.exporting.verify import require_sound, verify_folder
from pocketsize.io.publish import clear_leftovers, publish_bytes, staging
from pocketsize.io.source import resolve
from pocketsize.measurement.machine import cpu_seconds, machine, peak_rss_bytes, versions
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.size import sizes
from pocketsize.measurement.suite import latency, quality_of
from pocketsize.models.dtype import NAMES, forward_dtype
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.recipes.journal import Journal, open_journal
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.recipes.record import SCHEMA, RunRecord, SizePart, TextRecord, Timing
from pocketsize.recipes.step import Context
from pocketsize.recipes.texts import Texts, read_texts


class Console(Protocol):
    """Where a run says how far it is."""

    def phase(self, text: str) -> None:
        """A new phase begins."""
        ...

    def progress(self, done: int, total: int, what: str) -> None:
        """`done` of `total` units of this phase are finished, `what` the last."""
        ...


@dataclass(slots=True)
class Clock:
    """Seconds spent in each phase."""

    console: Console
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    phases_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and announce it."""
        self.console.phase(name)
        start = time.perf_counter()
        yield
        self.phases_s[name] = self.phases_s.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Done:
    """What the steps of a recipe left: the model before and after, and how it came about."""

    original: Model
    model: Model
    recipe: Recipe
    texts: Texts
    context: Context


Page = Callable[[RunRecord], str]


def run(
    recipe: Recipe,
    out: Path,
    *,
    console: Console,
    pages: Mapping[str, Page],
    work: Path | None = None,
    overwrite: bool = False,
) -> RunRecord:
    """Run a recipe into the folder `out`, or go on with an unfinished run of it.

    `out` must be absent or empty, or with `overwrite` an output that is finished; that stays until the
    new one is verified, and takes its place at once. The output appears complete or not at all; until
    then the work is kept in `work`, by default a hidden folder beside it. `pages` are files made from
    the record (report, model card).
    """
    check_output(out, recipe, overwrite=overwrite)
    clock = Clock(console)
    with clock.phase("load"):
        original, recipe, texts = prepare(recipe)
    journal = open_journal(work or work_folder(out), fingerprint(original, recipe, texts))
    finished = False
    try:
        done = apply_steps(original, recipe, texts, journal, clock, kept=work_folder(out))
        record = publish(done, out, journal, clock, pages, overwrite=overwrite)
        finished = True
        return record
    finally:
        journal.close(remove=finished)


def check_output(out: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Refuse an output that holds something already; with `overwrite`, all but a finished one.

    What a killed process left beside it is cleared away, before any work needs the room.
    """
    clear_leftovers(out)
    if not out.is_symlink() and (not out.exists() or (out.is_dir() and not any(out.iterdir()))):
        return
    if not overwrite:
        raise UsageError(
            f"{out}: exists and is not an empty folder; choose another output with -o, or replace a finished "
            "one with --overwrite"
        )
    _require_finished(out)
    source = resolve(model_path(recipe)).resolve()
    if source.is_relative_to(out.resolve()):
        raise UsageError(f"{out}: holds the model itself; choose another output with -o")


def _require_finished(out: Path) -> None:
    """Refuse to replace what is not an output of ours, or holds anything that no run wrote."""
    if out.is_symlink() or not (out / MANIFEST).is_file() or not (out / "record.json").is_file():
        raise UsageError(f"{out}: is not a finished output (no {MANIFEST} and record.json); it is left alone")
    if added := added_files(out):
        raise UsageError(
            f"{out}: holds {added[0]}, which no run wrote; move it away, or choose another output"
        )


def work_folder(out: Path) -> Path:
    """Where unfinished work for `out` is kept."""
    return out.resolve().parent / f".{out.resolve().name}.work"


def prepare(recipe: Recipe) -> tuple[Model, Recipe, Texts]:
    """The model, the recipe with every choice made, and the texts: all that can fail early."""
    original = replace(load(model_path(recipe)), dtype=NAMES[recipe.dtype])
    recipe = recipe.resolved(original)
    if "folder" in recipe.export:
        require_storable(original)
    return original, recipe, read_texts(recipe.data, recipe.base, original)


def written(model: Model, data: Data, kept: Path, *, length: int) -> Int64[Tensor, "n length"]:
    """The windows that the model writes, read from the folder `kept` if they were written before."""
    count = data.written_windows
    what = (
        model.origin.sha256,
        data.seed,
        count,
        length,
        torch.get_num_threads(),
        sorted(versions().items()),
    )
    path = kept / f"written-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        module = materialise(model, forward_dtype())
        own = write_windows(module, tokenizer_of(model), count=count, length=length, seed=data.seed)
        out = io.BytesIO()
        np.save(out, own.numpy())
        publish_bytes(path, out.getvalue())
    return torch.from_numpy(np.load(path, allow_pickle=False))


def fingerprint(model: Model, recipe: Recipe, texts: Texts) -> dict[str, str]:
    """Everything that can change a byte of the result, by name."""
    ids = hashlib.sha256(texts.calibrate.input_ids.numpy().tobytes()).hexdigest()
    here = machine()
    return {
        "recipe": recipe.sha256,
        "model weights": model.origin.sha256,
        "calibration tokens": ids,
        "evaluation text": texts.evaluate.sha256,
        "threads": str(here["threads"]),
        "processor": str(here["cpu"]),
        **{f"version of {name}": version for name, version in versions().items()},
    }


def apply_steps(
    original: Model, recipe: Recipe, texts: Texts, journal: Journal, clock: Clock, *, kept: Path
) -> Done:
    """The steps of a recipe, one after the other; what the model writes for them is kept in `kept`."""
    ids, mask = texts.calibrate.input_ids, texts.calibrate.mask
    if recipe.data.written_windows and any(step.calibrated for step in recipe.steps):
        with clock.phase("write"):
            own = written(original, recipe.data, kept, length=ids.shape[1])
        ids, mask = torch.cat([ids, own]), torch.cat([mask, torch.ones_like(own, dtype=torch.bool)])
        records = (*texts.records, _written_record(own, len(own) / len(ids)))
        texts = replace(texts, records=records)
    context = Context(ids, mask, journal, clock.console.progress, list(texts.findings))
    model = original
    for step in recipe.steps:
        with clock.phase(step.kind):
            model = step.apply(model, context)
    return Done(original, model, recipe, texts, context)


def publish(
    done: Done, out: Path, journal: Journal, clock: Clock, pages: Mapping[str, Page], *, overwrite: bool
) -> RunRecord:
    """Measure, export and read back, then let the finished folder appear under its name."""
    with clock.phase("measure"):
        quality = quality_of(
            done.original, done.model, done.texts.evaluate, done.texts.corpus, seed=done.recipe.data.seed
        )
    with staging(out, replace=overwrite) as folder:
        with clock.phase("export"):
            artifacts = tuple(EXPORTERS[name].write(done.model, folder) for name in done.recipe.export)
            behaviour = behaviours(done.model, artifacts)
        with clock.phase("latency"):
            timed = latency(done.original, [folder / a.path for a in artifacts if a.format == "gguf"])
        record = _record(done, artifacts, behaviour, (quality.measurements, quality.protocol), clock)
        timing = Timing(
            clock.started, clock.phases_s, cpu_seconds(), peak_rss_bytes(), journal.resumed, tuple(timed)
        )
        record = replace(record, timing=timing)
        publish_bytes(folder / "recipe.yaml", done.recipe.to_yaml().encode())
        publish_bytes(folder / "record.json", record.to_json().encode())
        for name, page in pages.items():
            publish_bytes(folder / name, page(record).encode())
        write_manifest(folder)
        if overwrite and out.exists() and any(out.iterdir()):
            with clock.phase("verify"):
                require_sound(verify_folder(folder))
            _require_finished(out)  # again: hours may have passed
    return record


def _record(
    done: Done,
    artifacts: tuple[Artifact, ...],
    behaviour: dict[str, Any],
    quality: tuple[tuple[Measurement, ...], tuple[str, ...]],
    clock: Clock,
) -> RunRecord:
    origin = done.original.origin
    measured = (*quality[0], *sizes(origin, {a.path: a.bytes for a in artifacts}))
    return RunRecord(
        schema=SCHEMA,
        version=pocketsize.__version__,
        recipe=done.recipe.to_dict(),
        recipe_sha256=done.recipe.sha256,
        origin=origin,
        task=done.original.arch.task,
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
    )


def breakdown(model: Model, artifacts: tuple[Artifact, ...]) -> tuple[SizePart, ...]:
    """Where the bytes of each artefact go: embedding and head, linears, everything else."""
    parts: list[SizePart] = []
    linears, ends = set(model.linears), {model.arch.embedding, model.arch.head}
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


def _written_record(own: Int64[Tensor, "n length"], share: float) -> TextRecord:
    digest = hashlib.sha256(own.numpy().tobytes()).hexdigest()
    count, length = own.shape
    return TextRecord(
        "calibrate", "written by the model itself", digest, count, count, length, own.numel(), share
    )


def model_path(recipe: Recipe) -> str:
    """The recipe's model: a folder beside the recipe comes before anything else of that name."""
    beside = recipe.base / recipe.model
    return str(beside) if not recipe.model.startswith("sample:") and beside.is_dir() else recipe.model
