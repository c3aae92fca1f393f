"""One block taken through a whole run with the real functions: calibrate, quantize, measure, save, reload.

What it took is told by stage, the part inside the block apart, so that the time of all blocks
follows. All files lie in a temporary folder that is gone afterwards, also when something fails.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pocketsize.data.calibration import Windows
from pocketsize.data.written import BATCH as WRITERS
from pocketsize.data.written import write_windows
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.companions import copy_companions
from pocketsize.exporting.probes import PROBES
from pocketsize.io.llamacpp import LlamaCpp, installed
from pocketsize.io.publish import make_folder, publish_bytes, scratch
from pocketsize.models.batches import HELD_OUT, full_windows, windows_per_batch, worth
from pocketsize.models.config import NAME
from pocketsize.models.depth import names_of_whole, shortened_config, with_blocks
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise, skeleton
from pocketsize.models.walk import walk
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import SUPER_BLOCK
from pocketsize.recipes.grids import Quantizer, embedding_scheme, layer_schemes
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Gptq, stages_of
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.record import Finding, RunRecord
from pocketsize.recipes.run import Clock, Job, apply_steps, publish
from pocketsize.recipes.smooth import SmoothQuant
from pocketsize.recipes.step import Context
from pocketsize.recipes.texts import Texts

# Batches that calibrate (more where blocks are learned), and tokens of each window that the model writes.
BATCHES, WRITTEN = 2, 64
# Findings that hold for the whole model where they do for a block.
_TOLD = ("dense-is-better", "sparse-is-better", "dense-unknown")
# Questions that llama.cpp is asked to see how long one takes.
QUESTIONS = 8


@dataclass(slots=True)
class Spent:
    """CPU seconds of a stage: all, those inside the block, those of other processes; and wall seconds.

    `units` are the seconds at which its parts were finished.
    """

    cpu_s: float = 0.0
    wall_s: float = 0.0
    block_s: float = 0.0
    child_s: float = 0.0
    units: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a run of one block took, CPU seconds where nothing else is said.

    `batch_s` is what a batch of calibration text takes in the walk of the block, `walk_s` what all batches
    took. `calls` are the block's own seconds at each token that the model wrote. `file` tells of the GGUF,
    where one was written and llama.cpp is here. `findings` are those that one block is enough for.
    """

    block: int
    batch_s: float
    walk_s: float
    batches: float
    evaluated_tokens: int
    parameters: int
    calls: tuple[float, ...]
    stages: dict[str, Spent]
    file: Asked | None
    wall_s: float
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """A GGUF in llama.cpp: its bytes, the seconds of a prompt, of a token, and of one question."""

    bytes: int
    prompt_s: float
    token_s: float
    question_s: float


@dataclass(frozen=True, slots=True)
class Nothing:
    """A step that changes nothing: what comes before and after all steps is rehearsed alone."""

    kind: ClassVar[str] = "nothing"
    calibrated: ClassVar[bool] = False

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Nothing:
        """The same."""
        return self

    def outline(self, model: Model) -> Model:
        """The same model."""
        return model

    def apply(self, model: Model, ctx: Context) -> Model:
        """The same model."""
        return model


class _Watch:
    """A console that takes the time instead of talking; a stage ends where the next begins."""

    def __init__(self) -> None:
        self.stages: dict[str, Spent] = {}
        self.block_s = 0.0
        self._open: tuple[str, float, float, float, float] | None = None

    def phase(self, text: str) -> None:
        """A stage begins."""
        self.end()
        self._open = (text, cpu_s(), child_s(), self.block_s, time.perf_counter())
        self.stages[text] = Spent()

    def progress(self, done: int, total: int, what: str) -> None:
        """A part of the stage is finished."""
        if self._open is not None:
            self.stages[self._open[0]].units.append(cpu_s() - self._open[1])

    def end(self) -> None:
        """The last stage is over."""
        if self._open is not None:
            name, own, other, block, wall = self._open
            spent = self.stages[name]
            spent.child_s = child_s() - other
            spent.cpu_s = cpu_s() - own + spent.child_s
            spent.block_s = self.block_s - block
            spent.wall_s = time.perf_counter() - wall
        self._open = None


def rehearse(model: Model, recipe: Recipe, texts: Texts, *, written: int) -> Rehearsal:
    """Run the resolved recipe on the middle block alone, with a few batches of its real texts.

    The model is timed as it writes as many windows at once as it will where `written` of them are asked for.
    """
    start = time.perf_counter()
    index = len(model.blocks) // 2
    _compiled(recipe)
    with scratch("plan") as work, names_of_whole(model, [index]):
        short = shortened(model, [index], work / "model")
        long = any(stages_of(step) > 1 for step in recipe.steps) or not bool(texts.calibrate.mask.all())
        few = _few(texts, HELD_OUT if long else BATCHES)
        watch = _Watch()
        with _timed_block(short, watch) as calls:
            writing = any(step.calibrated for step in recipe.steps) and written > 0
            said = _written(short, min(written, WRITERS), recipe.data.seed, watch, calls) if writing else ()
            batch_s, walk_s = _walked(short, few, recipe)
            file, findings = _run(short, recipe, few, watch, work)
    return Rehearsal(
        block=index,
        batch_s=batch_s,
        walk_s=walk_s,
        batches=_batches(few.calibrate.mask),
        evaluated_tokens=few.evaluate.input_ids.numel(),
        parameters=short.origin.parameters,
        calls=said,
        stages=watch.stages,
        file=file,
        findings=findings,
        wall_s=time.perf_counter() - start,
    )


def cpu_s() -> float:
    """CPU seconds of this process, all its threads."""
    return time.process_time()


def child_s() -> float:
    """CPU seconds of finished child processes."""
    used = os.times()
    return used.children_user + used.children_system


def _compiled(recipe: Recipe) -> None:
    """Compile what is compiled on the first call ever, so that it is not taken for the block's time."""
    generator = torch.Generator().manual_seed(0)
    for step in recipe.steps:
        if not isinstance(step, Quantizer):
            continue
        for scheme in filter(None, (*layer_schemes(step), embedding_scheme(step))):
            columns = SUPER_BLOCK if scheme.super_blocks else 2 * (scheme.group or 32)
            W = torch.randn(8, columns, generator=generator)
            if isinstance(step, Gptq):
                gptq(W, torch.eye(columns), scheme, search=step.search, order=step.order)
            if isinstance(step, SmoothQuant):
                gptq(W, torch.eye(columns), scheme)
            if step.calibrated or scheme.table is not None:
                rtn(W, scheme, weight=torch.ones(columns))


def shortened(model: Model, kept: Sequence[int], folder: Path) -> Model:
    """The model with these blocks alone, its config and companions in a folder of their own."""
    make_folder(folder)
    raw = shortened_config(model.config, kept)
    if not raw.get("architectures"):
        original = json.loads((model.folder / NAME).read_text(encoding="utf-8"))
        raw["architectures"] = original.get("architectures")
    publish_bytes(folder / NAME, json.dumps(raw).encode())
    copy_companions(model.folder, folder)
    short = with_blocks(model, kept, folder)
    share = short.origin.parameters / max(model.origin.parameters, 1)
    taken = round(share * model.origin.source_bytes)
    return replace(short, origin=replace(short.origin, source_bytes=taken))


def _few(texts: Texts, batches: int) -> Texts:
    """A few batches of the texts; what is said about the whole is not said again."""
    mask = texts.calibrate.mask
    batch = windows_per_batch(mask.shape[1])
    return replace(
        texts,
        calibrate=_first(texts.calibrate, worth(mask, batches * batch)),
        evaluate=_first(texts.evaluate, batch),
        findings=(),
    )


def _first(windows: Windows, count: int) -> Windows:
    ids, mask, sizes = (t[:count] for t in (windows.input_ids, windows.mask, windows.text_bytes))
    return replace(windows, input_ids=ids, mask=mask, text_bytes=sizes)


def _run(
    short: Model, recipe: Recipe, texts: Texts, watch: _Watch, work: Path
) -> tuple[Asked | None, tuple[Finding, ...]]:
    """The steps, and all that comes after them, into `work`; what llama.cpp took for the GGUF."""
    little = replace(recipe, data=replace(recipe.data, written=0.0))
    job, clock = Job(short, little, texts, work / "out", work / "work"), Clock(watch)
    journal = open_journal(job.work, {})
    record = publish(apply_steps(job, journal, clock), job.out, journal, clock, {}, overwrite=False)
    watch.end()
    told = tuple(finding for finding in record.findings if finding.code in _TOLD)
    return next((_asked(work / "out", a, record) for a in record.artifacts if a.format == "gguf"), None), told


def _asked(out: Path, artifact: Artifact, record: RunRecord) -> Asked | None:
    """What the latency stage told of the file, and the time of a question as reading it back asks it."""
    told = {m.name: m.value for m in record.timing.measurements if m.subject == artifact.path}
    if installed() is None or not told:
        return None
    with LlamaCpp(out / artifact.path, threads=torch.get_num_threads(), context=512, exact=True) as runtime:
        ids = runtime.tokenize(PROBES[0])
        runtime.top(ids)
        start = cpu_s()
        for count in range(QUESTIONS):
            runtime.top([*ids, *ids[: count + 1]])
        took = (cpu_s() - start) / QUESTIONS
    return Asked(artifact.bytes, 1 / told["prompt_rate"], 1 / told["decode_rate"], took)


def _walked(short: Model, texts: Texts, recipe: Recipe) -> tuple[float, float]:
    """CPU seconds of a batch in the walk of the block, and of the whole walk, nothing quantized."""
    if not any(step.calibrated for step in recipe.steps):
        return 0.0, 0.0
    ids, mask = texts.calibrate.input_ids, texts.calibrate.mask
    batch = worth(mask, windows_per_batch(ids.shape[1]))
    _walk(short, ids[:batch], mask[:batch])  # pages and kernels are there once it is timed
    one, all_ = (_walk(short, ids[:n], mask[:n]) for n in (batch, len(ids)))
    batches = _batches(mask)
    return max(all_ - one, 0.0) / (batches - 1) if batches > 1 else one, all_


def _batches(mask: Tensor) -> float:
    """How many batches of full windows these windows are worth."""
    return full_windows(mask) / windows_per_batch(mask.shape[1])


def _walk(short: Model, ids: Tensor, mask: Tensor) -> float:
    start = cpu_s()
    for site in walk(short, ids, mask):
        del site
    return cpu_s() - start


def _written(short: Model, count: int, seed: int, watch: _Watch, calls: list[float]) -> tuple[float, ...]:
    """Time the writing of text, the first tokens of so many windows at once."""
    module = materialise(short, forward_dtype(), working_device())
    tokenizer = tokenizer_of(short)
    del calls[:]
    watch.phase("write")
    write_windows(module, tokenizer, count=count, length=WRITTEN, seed=seed)
    watch.end()
    return tuple(calls)


@contextmanager
def _timed_block(short: Model, watch: _Watch) -> Iterator[list[float]]:
    """While it is entered, the seconds spent inside blocks are added up, and listed call by call.

    Blocks are timed inside their `forward`: hooks would count what a batch waits in front of one.
    """
    kind = type(skeleton(short).get_submodule(short.blocks[0]))
    forward, calls = kind.forward, list[float]()

    @wraps(forward)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = cpu_s()
        out = forward(*args, **kwargs)
        calls.append(cpu_s() - start)
        watch.block_s += calls[-1]
        return out

    kind.forward = timed
    try:
        yield calls
    finally:
        kind.forward = forward
