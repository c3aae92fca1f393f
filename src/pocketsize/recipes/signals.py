"""How a student hears its teachers: live, or from what they said once and is kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketsize.errors import UsageError, did_you_mean
from pocketsize.models.device import working_device
from pocketsize.models.dtype import NAMES
from pocketsize.models.model import Model
from pocketsize.recipes.step import Context, Place
from pocketsize.recipes.teachers import Taught, frozen, print_of
from pocketsize.training.examples import Batch, Examples
from pocketsize.training.objective import Panel
from pocketsize.training.signals import KINDS, PRECISION, Signals, open_signals, require_signals

LIVE = "live"


@dataclass(frozen=True)
class Heard:
    """The keys of what is kept of teachers.

    `signals` is `live`, or what is computed once for all text that will be read: `top_k`, the likeliest
    `kept` tokens of each position with what is left for all others, or `sampled`, as many draws. They lie in
    the folder `cache`, which another run with the same teachers and text may use, or in the work folder.
    """

    signals: str = LIVE
    kept: int = 64
    cache: str | None = None

    @property
    def cached(self) -> bool:
        """Whether teachers speak once."""
        return self.signals != LIVE


def check_signals(step: Heard) -> None:
    """Refuse kinds that are none, and a folder for nothing."""
    known = (LIVE, *KINDS)
    if step.signals not in known:
        raise UsageError(
            f"distill: signals is {', '.join(known)}, got {step.signals!r}{did_you_mean(step.signals, known)}"
        )
    if step.kept < 1:
        raise UsageError(f"distill: kept must be at least 1, got {step.kept}")
    if step.cache is not None and not step.cached:
        raise UsageError("distill: cache: live teachers leave nothing to keep; use signals: top_k or sampled")


@dataclass(frozen=True)
class Room:
    """Everybody who is in a lesson: the student, its teachers with their tokens, and all text there is."""

    student: Model
    teachers: Sequence[Model]
    maps: Sequence[Tensor | None]
    whole: Examples
    dtype: torch.dtype = torch.float32


def facts_of(step: Heard, taught: Taught, room: Room, seed: int) -> dict[str, str]:
    """All that decides what is kept of teachers."""
    facts: dict[str, str] = {}
    for i, (teacher, ids) in enumerate(zip(room.teachers, room.maps, strict=True)):
        facts[f"teacher {i + 1} weights"] = print_of(teacher)
        facts[f"teacher {i + 1} tokens"] = "the student's" if ids is None else _sha(ids)
    facts |= {"tokens of the text": room.whole.sha256, "signals": step.signals, "kept": str(step.kept)}
    facts |= {"vocabulary": str(room.student.config.vocab_size), "weigh": taught.weigh}
    facts |= {"shares": str(taught.shares), "seed": str(seed if step.signals == "sampled" else 0)}
    facts[PRECISION] = next(name for name, dtype in NAMES.items() if dtype == room.dtype)
    return facts | {"format": "1"}


def heard(step: Heard, taught: Taught, room: Room, rows: Sequence[int], ctx: Context) -> Signals:
    """What the teachers say of these rows of the text: those that nothing is kept of yet are heard now."""
    require_kept(step, room.student)
    vocabulary = int(room.student.config.vocab_size)
    place = ctx.store.place("signals")
    folder = Path(step.cache) if step.cache is not None else place.folder / "signals"
    folder = Path(ctx.world.told(str(folder)))
    facts = facts_of(step, taught, room, ctx.seed)
    if ctx.world.rank == 0:
        _hear(open_signals(folder, facts, vocabulary), taught, room, rows, (place, ctx))
    ctx.world.told(0)  # the others wait until the first has heard all
    return open_signals(folder, facts, vocabulary)


def require_kept(step: Heard, student: Model) -> None:
    """Refuse to keep more tokens of a position than there are."""
    vocabulary = int(student.config.vocab_size)
    if step.kept > vocabulary and step.signals == "top_k":
        raise UsageError(f"distill: kept: {step.kept} of a vocabulary of {vocabulary} tokens")


def require_cache(step: Heard, taught: Taught, room: Room, seed: int) -> None:
    """Refuse a cache of other teachers or another text. Nothing is made of one that is not there yet."""
    assert step.cache is not None
    require_signals(Path(step.cache), facts_of(step, taught, room, seed))


def _hear(
    found: Signals, taught: Taught, room: Room, rows: Sequence[int], where: tuple[Place, Context]
) -> None:
    place, ctx = where
    if not found.missing(rows):
        return
    vocabulary = int(room.student.config.vocab_size)
    teachers = frozen(room.teachers, room.maps, taught.shares)
    panel = Panel(teachers, vocabulary, taught.weigh == "loss", room.dtype)

    def says(batch: Batch, kept: Tensor) -> Callable[[slice], Tensor]:
        device = working_device()
        return panel.says(batch.to(device), kept.to(device))

    def told(done: int, total: int) -> None:
        ctx.progress(done, total, f"signals of {done} of {total} texts")
        place.safe_point(f"after the signals of {done} texts")

    found.hear(rows, room.whole, says, told)


def _sha(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
