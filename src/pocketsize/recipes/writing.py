"""Text that models write for a run: for themselves, or a student while it learns, or its teacher before."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from pocketsize.data.written import write_windows
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.measurement.machine import versions
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.recipes.kept import kept_bytes
from pocketsize.recipes.step import Context
from pocketsize.recipes.teachers import print_of
from pocketsize.recipes.training import count_of
from pocketsize.training.examples import Examples, Order, of_rows
from pocketsize.training.policy import Policy

TEACHER = "teacher"
# Windows that are written together, and what is lost of them when the writing is cut off.
TOGETHER = 16


@dataclass(frozen=True)
class Writing:
    """The keys of text that is written for the lesson.

    `on_policy` is the share of batches that the student continues itself from the first half of training
    text, `replay` the share of those that is read again from what it wrote earlier. `written: teacher` has
    teachers write all of the training text, `written_tokens` of it.
    """

    on_policy: float = 0.0
    replay: float = 0.0
    written: str | None = None
    written_tokens: int | str = 100_000


def check_writing(step: Writing) -> None:
    """Refuse shares that are none."""
    for name in ("on_policy", "replay"):
        if not 0 <= getattr(step, name) <= 1:
            raise UsageError(f"distill: {name} is a share from 0 to 1, got {getattr(step, name)}")
    if step.replay and not step.on_policy:
        raise UsageError("distill: replay: nothing was written; give on_policy a share")
    if step.written not in (None, TEACHER):
        raise UsageError(f"distill: written is null or {TEACHER}, got {step.written!r}")
    count_of(step.written_tokens, "written_tokens")


def policy(step: Writing, seed: int) -> Callable[[nn.Module, Order], Policy]:
    """Batches of which the student writes its share."""
    return lambda student, order: Policy(order, student, step.on_policy, step.replay, seed=seed)


def own_windows(model: Model, count: int, seed: int, kept: Path, *, length: int) -> Int64[Tensor, "n length"]:
    """The windows that the model writes, read from the folder `kept` if they were written before."""

    def write() -> bytes:
        module = materialise(model, forward_dtype(), working_device())
        return _as_npy(write_windows(module, tokenizer_of(model), count=count, length=length, seed=seed))

    found = kept_bytes(kept, "written", (model.origin.sha256, seed, count, length, *_here()), "npy", write)
    return torch.from_numpy(np.load(io.BytesIO(found), allow_pickle=False))


def _here() -> tuple[object, ...]:
    """What besides a seed decides what a model writes."""
    return torch.get_num_threads(), str(working_device()), *sorted(versions().items())


def _as_npy(ids: Tensor) -> bytes:
    out = io.BytesIO()
    np.save(out, ids.numpy())
    return out.getvalue()


def require_writers(step: Writing, maps: Sequence[Tensor | None]) -> None:
    """Refuse to let teachers write whose tokens have other numbers than the student's."""
    if step.written is not None and any(ids is not None for ids in maps):
        raise UnsupportedError("distill: written: a teacher with other tokens cannot write for the student")


def written_examples(
    step: Writing, teachers: Sequence[Model], maps: Sequence[Tensor | None], length: int, ctx: Context
) -> Examples:
    """The text that teachers write, in turn; what was written before the process was cut off is read."""
    require_writers(step, maps)
    place = ctx.store.place("written")
    parts = math.ceil(count_of(step.written_tokens, "written_tokens") / (length * TOGETHER))
    modules: dict[int, nn.Module] = {}
    rows: list[np.ndarray] = []
    for i in range(parts):
        who, seed = i % len(teachers), ctx.seed * 1_000_003 + i

        def write(who: int = who, seed: int = seed) -> bytes:
            if who not in modules:
                modules[who] = materialise(teachers[who], torch.float32, working_device())
            own = write_windows(
                modules[who], tokenizer_of(teachers[who]), count=TOGETHER, length=length, seed=seed
            )
            return _as_npy(own.to(torch.int32))

        what = (print_of(teachers[who]), seed, TOGETHER, length, _here())
        found = kept_bytes(place.folder, f"written-{i}", what, "npy", write)
        rows += list(np.load(io.BytesIO(found), allow_pickle=False))
        ctx.progress(i + 1, parts, f"{len(rows)} windows written")
        place.safe_point(f"after {len(rows)} written windows")
    pad = tokenizer_of(teachers[0]).eos_token_id
    names = " and ".join(teacher.origin.name for teacher in teachers)
    return of_rows(rows, pad if isinstance(pad, int) else 0, f"text written by {names}")
