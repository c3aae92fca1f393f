"""How long a step takes that makes another model: done on few blocks and on more, the rest follows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pocketsize.io.publish import scratch
from pocketsize.measurement.machine import cpu_seconds
from pocketsize.models.depth import names_of_whole
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
class _Trial:
    """A step on so many blocks, and its work there of each kind: blocks, blocks that stay, passes, exits."""

    step: Stretched
    blocks: int
    work: tuple[float, ...]


def stretched_time(step: Stretched, model: Model, texts: Texts, *, seed: int) -> tuple[Took, int]:
    """The time of a resolved step, and on how many blocks it was tried at most."""
    trials, whole = _trials(step, model)
    most = max(trial.blocks for trial in trials)
    if len(model.blocks) <= most:
        return Took(step.kind, *_done(step, model, texts, seed)), len(model.blocks)
    taken = [_tried(trial.step, trial.blocks, model, texts, seed) for trial in trials]
    works = [trial.work for trial in trials]
    cpu, clock = (_stretched([one[i] for one in taken], works, whole) for i in (0, 1))
    return Took(step.kind, cpu, clock), most


def _stretched(taken: Sequence[float], works: Sequence[Sequence[float]], whole: Sequence[float]) -> float:
    """What the whole takes: a trial more than kinds of work says what each takes, and what does not grow.

    A kind that seems to take less than nothing, as what is over in no time may, takes nothing.
    """
    each = np.linalg.solve(np.array([[1.0, *work] for work in works]), np.array(taken))[1:]
    more = np.array(whole) - np.array(works[0])
    return float(taken[0] + np.maximum(each, 0) @ more)


Trials = tuple[list[_Trial], tuple[float, ...]]


def _trials(step: Stretched, model: Model) -> Trials:
    """What is tried, and the work of each kind on the whole model."""
    count = len(model.blocks)
    if isinstance(step, Layers):
        return _of_layers(step, model)
    if isinstance(step, Gate):
        return _of_gate(step, count)
    if isinstance(step, Student) and step.calibrated and step.importance == "kl":
        return _of_heads(step, model)
    return [_Trial(step, 1, (1,)), _Trial(step, 2, (2,))], (count,)


def _of_layers(step: Layers, model: Model) -> Trials:
    """All blocks are passed to choose and to heal; those that stay are healed; rounds measure parts."""
    count, listed = len(model.blocks), isinstance(step.keep, tuple)
    keep = len(step.keep) if isinstance(step.keep, tuple) else int(step.keep or 1)
    measured = step.pick == "kl" and not listed
    pick = "even" if measured or listed else step.pick
    sizes = ((2, 1), (4, 1), (4, 2))
    trials = [_Trial(Layers(keep=k, pick=pick, heal=step.heal), n, (n, k)) for n, k in sizes]
    if not measured:
        return trials, (count, keep)
    trials = [replace(trial, work=(*trial.work, 0.0)) for trial in trials]
    rounds = Layers(keep=2, pick="kl", heal=step.heal)
    trials.append(_Trial(rounds, 4, (4, 2, pick_work(model, 4, 2))))
    return trials, (count, keep, pick_work(model, count, keep))


def _of_heads(step: Student, model: Model) -> Trials:
    """Heads are left out one after the other in each block, and what follows is passed each time."""
    own, count = sizes_of(model), len(model.blocks)
    heads = step.heads or own.heads
    sizes = replace(own, heads=heads, kv_heads=step.kv_heads or min(heads, own.kv_heads))
    rest = replace(step, importance="taylor")
    trials = [_Trial(rest, 1, (1, 0.0)), _Trial(rest, 2, (2, 0.0))]
    if not (whole := head_work(model, sizes, count)):
        return [replace(trial, work=trial.work[:1]) for trial in trials], (count,)
    return [*trials, _Trial(step, 2, (2, head_work(model, sizes, 2)))], (count, whole)


def _of_gate(step: Gate, count: int) -> Trials:
    """How much is left out makes no difference: here as little as can be, which every few blocks allow."""
    if step.skip != "exit":
        little = replace(step, save=1e-3)
        return [_Trial(little, 1, (1,)), _Trial(little, 2, (2,))], (count,)
    assert step.exits != "auto"
    tried = ((2, (0,)), (3, (0,)), (3, (0, 1)))
    trials = [
        _Trial(replace(step, exits=exits, save=None, agree=1.0), n, (n, len(exits))) for n, exits in tried
    ]
    return trials, (count, len(step.exits))


def _tried(step: Stretched, blocks: int, model: Model, texts: Texts, seed: int) -> tuple[float, float]:
    """What a step takes on so many blocks from the middle: CPU seconds, and seconds by the clock."""
    start = (len(model.blocks) - blocks) // 2
    kept = range(start, start + blocks)
    with scratch("plan") as work, names_of_whole(model, kept):
        short = shortened(model, kept, work / "model")
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
