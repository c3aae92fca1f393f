"""How long a step takes that makes another model: done on few blocks and on more, the rest follows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pocketsize.io.publish import scratch
from pocketsize.measurement.machine import cpu_seconds
from pocketsize.models.left_out import head_work, pick_work
from pocketsize.models.model import Model
from pocketsize.models.surgery import sizes_of
from pocketsize.recipes.body import Layers
from pocketsize.recipes.duration import Took
from pocketsize.recipes.gate import Gate
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.rehearse import shortened
from pocketsize.recipes.rotate import Rotate
from pocketsize.recipes.step import Context
from pocketsize.recipes.student import Student
from pocketsize.recipes.texts import Texts

Stretched = Layers | Student | Rotate | Gate
# What takes less is done once more: the first time also warms up.
QUICK_S = 2.0


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a step as it is done on two numbers of blocks, and its work on both and on the whole model.

    Work is in passes of a batch through a block, or in proportion to them.
    """

    steps: tuple[Stretched, Stretched]
    blocks: tuple[int, int]
    work: tuple[float, float, float]


def stretched_time(step: Stretched, model: Model, texts: Texts, *, seed: int) -> tuple[Took, int]:
    """The time of a resolved step, and on how many blocks it was tried at most."""
    parts = [*_parts(step, model)]
    most = max(part.blocks[1] for part in parts)
    if len(model.blocks) <= most:
        return Took(step.kind, *_done(step, model, texts, seed)), len(model.blocks)
    cpu = clock = 0.0
    for part in parts:
        few, many = (_tried(*one, model, texts, seed) for one in zip(part.steps, part.blocks, strict=True))
        times = (part.work[2] - part.work[0]) / (part.work[1] - part.work[0])
        cpu += few[0] + times * max(0.0, many[0] - few[0])
        clock += few[1] + times * max(0.0, many[1] - few[1])
    return Took(step.kind, cpu, clock), most


def _parts(step: Stretched, model: Model) -> Iterator[_Part]:
    """What of a step grows in a way of its own; what does not grow counts in each part, and is little."""
    if isinstance(step, Layers):
        yield from _of_layers(step, model)
    elif isinstance(step, Gate):
        yield _of_gate(step, len(model.blocks))
    elif isinstance(step, Student) and step.calibrated and step.importance == "kl":
        yield from _of_heads(step, model)
    else:
        yield _Part((step, step), (1, 2), (1, 2, len(model.blocks)))


def _of_layers(step: Layers, model: Model) -> Iterator[_Part]:
    """Half of the blocks stay; healing goes through those, and measuring again and again through all."""
    count = len(model.blocks)
    measured = step.pick == "kl" and isinstance(step.keep, int)
    keep = step.keep if isinstance(step.keep, int) else len(step.keep or ())
    if measured:
        few, many, whole = (pick_work(model, *sizes) for sizes in ((2, 1), (4, 2), (count, keep)))
        steps = (Layers(keep=1, pick="kl", heal=False), Layers(keep=2, pick="kl", heal=False))
        yield _Part(steps, (2, 4), (few, many, whole))
    if step.heal or not measured:
        pick = "even" if measured else step.pick
        steps = (Layers(keep=1, pick=pick, heal=step.heal), Layers(keep=2, pick=pick, heal=step.heal))
        yield _Part(steps, (2, 4), (1, 2, keep))


def _of_heads(step: Student, model: Model) -> Iterator[_Part]:
    """Heads are left out one after the other in each block, and what follows is passed each time."""
    own = sizes_of(model)
    heads = step.heads or own.heads
    sizes = replace(own, heads=heads, kv_heads=step.kv_heads or min(heads, own.kv_heads))
    few, many, whole = (head_work(model, sizes, blocks) for blocks in (1, 2, len(model.blocks)))
    alone = replace(step, heal=False)
    yield _Part((alone, alone), (1, 2), (few, many, whole))
    if step.heal:
        rest = replace(step, importance="taylor")
        yield _Part((rest, rest), (1, 2), (1, 2, len(model.blocks)))


def _of_gate(step: Gate, count: int) -> _Part:
    """How much is left out makes no difference: here as little as can be, which every few blocks allow."""
    if step.skip != "exit":
        little = replace(step, save=1e-3)
        return _Part((little, little), (1, 2), (1, 2, count))
    assert step.exits != "auto"
    few, many = (replace(step, exits=exits, save=None, agree=1.0) for exits in ((0,), (0, 1)))
    return _Part((few, many), (2, 3), (1, 2, len(step.exits)))


def _tried(step: Stretched, blocks: int, model: Model, texts: Texts, seed: int) -> tuple[float, float]:
    """What a step takes on so many blocks from the middle: CPU seconds, and seconds by the clock."""
    start = (len(model.blocks) - blocks) // 2
    with scratch("plan") as work:
        short = shortened(model, range(start, start + blocks), work / "model")
        took = _done(step, short, texts, seed)
        return _done(step, short, texts, seed) if took[1] < QUICK_S else took


def _done(step: Stretched, model: Model, texts: Texts, seed: int) -> tuple[float, float]:
    with scratch("plan") as work:
        ctx = Context(
            texts.calibrate.input_ids,
            texts.calibrate.mask,
            open_journal(work, {}),
            lambda done, total, what: None,
            original=model,
            corpus=texts.train,
            seed=seed,
        )
        cpu, start = cpu_seconds(), time.perf_counter()
        step.apply(model, ctx)
        return cpu_seconds() - cpu, time.perf_counter() - start
