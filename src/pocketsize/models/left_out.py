"""How far a model is from itself when parts of it are left out: measured, every part in one pass."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.distillation.slices import Importance
from pocketsize.models.calls import Call, capture, replayed, run_block
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.models.skeleton import fill, skeleton
from pocketsize.models.stream import surroundings
from pocketsize.models.surgery import Sizes, readers, sizes_of

# How many blocks are looked at again in each round.
AGAIN = 4
# Bytes of hidden states of models that lack something, held at once; more of them take another pass.
STATES = 2**29


@dataclass(frozen=True, slots=True)
class Part:
    """What is left out: a whole block, or some inputs of one of its linears."""

    block: int
    linear: str | None = None
    inputs: tuple[int, int] = (0, 0)


@torch.no_grad()
def distances_without(
    model: Model,
    input_ids: Int64[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
    parts: Sequence[Part],
    *,
    gone: Collection[int] = (),
) -> list[float]:
    """For each part how far the model without it, and without the blocks `gone`, is from the whole one.

    Of a generator KL(whole || without), mean over tokens, nats; of a classifier that of its classes; of an
    encoder 1 - cosine of embeddings; windows count by their tokens. Models that lack something begin where
    they lack it: up to there they are the whole one. One block is in memory at a time, and is read once for
    many parts.
    """
    found: list[float] = []
    size = 4 * int(model.config.hidden_size) * int(mask.sum())
    many = max(1, STATES // size - 2)
    for a in range(0, len(parts), many):
        found += _Pass(model, input_ids, mask).run(parts[a : a + many], gone)
    return found


def least_missed(
    model: Model, input_ids: Int64[Tensor, "n length"], mask: Bool[Tensor, "n length"], keep: int
) -> tuple[list[int], list[float]]:
    """The blocks that stay where one after the other goes that is missed least; and what each cost alone.

    Measured by `distances_without`, all blocks in the first round; in later rounds as many as `AGAIN`, those
    missed least when they were last looked at: what a block is worth hardly falls as others go.
    """
    count = len(model.blocks)
    alone = distances_without(model, input_ids, mask, [Part(i) for i in range(count)])
    missed, gone = dict(enumerate(alone)), {min(range(count), key=lambda i: alone[i])}
    while len(gone) < count - keep:
        left = sorted((i for i in missed if i not in gone), key=lambda i: missed[i])[:AGAIN]
        found = distances_without(model, input_ids, mask, [Part(i) for i in left], gone=gone)
        missed |= dict(zip(left, found, strict=True))
        gone.add(min(left, key=lambda i: missed[i]))
    return [i for i in range(count) if i not in gone], alone


def head_losses(
    model: Model, input_ids: Int64[Tensor, "n length"], mask: Bool[Tensor, "n length"], sizes: Sizes
) -> dict[str, Importance]:
    """How much heads are missed in each block, in the form of `Importance`, for a cut to these sizes.

    Where whole groups of heads go they are left out together, and each head has its share of what that costs.
    """
    own, d = sizes_of(model), model.head_width
    if (together := _together(own, sizes)) == 0:
        return {}
    (reader,), width = readers(model, "heads"), together * d
    starts = range(0, own.heads * d, width)
    parts = [Part(b, reader, (a, a + width)) for b in range(len(model.blocks)) for a in starts]
    missed = torch.tensor(distances_without(model, input_ids, mask, parts), dtype=torch.float64)
    each = (missed.clamp_min(0) / together).view(len(model.blocks), -1).repeat_interleave(together, 1)
    return {
        f"{path}.{reader}": Importance(values.square(), d)
        for path, values in zip(model.blocks, each, strict=True)
    }


def _together(own: Sizes, sizes: Sizes) -> int:
    """How many heads are left out at once for a cut to these sizes; 0 where none goes."""
    if (own.heads, own.kv_heads) == (sizes.heads, sizes.kv_heads):
        return 0
    per = own.heads // own.kv_heads
    return per if per == sizes.heads // sizes.kv_heads else 1


def pick_work(model: Model, blocks: int, keep: int) -> float:
    """The work of `least_missed` on so many blocks of a model, in passes of the text through a block.

    Behind a block that is left out everything is passed once more, half of what there is on average.
    """
    head = _head(model)
    total = blocks + blocks * (blocks - 1) / 2 + head * (blocks + 1)
    for left in range(blocks - 1, keep, -1):
        looked = min(AGAIN, left)
        total += blocks + left + looked * (left - 1) / 2 + head * (looked + 1)
    return total


def head_work(model: Model, sizes: Sizes, blocks: int) -> float:
    """The work of `head_losses` on so many blocks, in passes through one; 0 where no head goes."""
    own = sizes_of(model)
    if (together := _together(own, sizes)) == 0:
        return 0.0
    parts = own.heads // together
    return blocks + parts * blocks * (blocks + 1) / 2 + _head(model) * (parts * blocks + 1)


def _head(model: Model) -> float:
    """The work of the head, in passes through a block: by its weights."""
    if model.arch.task != "generate":
        return 0.0
    inside = model.linear_parameters / len(model.blocks)
    return math.prod(model.checkpoint.entries[model.arch.embedding].shape) / inside


class _Pass:
    """One pass over the blocks, with several models that each lack something."""

    def __init__(self, model: Model, input_ids: Tensor, mask: Tensor) -> None:
        self.model, device = model, working_device()
        self.module = skeleton(model, device)
        self.whole = capture(self.module, model, input_ids.to(device), mask.to(device))
        self.without: dict[int, list[Call]] = {}

    def run(self, parts: Sequence[Part], gone: Collection[int]) -> list[float]:
        """The distance of each."""
        trunk = _copies(self.whole) if gone else self.whole
        for number, path in enumerate(self.model.blocks):
            block = self.module.get_submodule(path)
            fill(
                self.module, path, lambda name: self.model.weight(name).to(forward_dtype()), working_device()
            )
            running = [] if number in gone else [trunk, *self.without.values()]
            for i, part in enumerate(parts):
                if part.block == number:
                    self.without[i] = _lacking(block, part, trunk)
            if trunk is not self.whole:
                _through(block, self.whole)
            for calls in running:
                _through(block, calls)
            block.to("meta")
        return self._apart(len(parts))

    def _apart(self, count: int) -> list[float]:
        """The distance of each, from its last hidden states."""
        for name in surroundings(self.module, self.model):
            fill(
                self.module, name, lambda full: self.model.weight(full).to(forward_dtype()), working_device()
            )
        totals, items, task = [0.0] * count, 0, self.model.arch.task
        places = [(n, row, real) for n, call in enumerate(self.whole) for row, real in enumerate(call.mask)]
        with replayed(self.module, self.model, self.whole) as replay:
            for number, row, real in places:
                wanted = self._said(replay, self.whole[number].hidden[row], real)
                worth = 1 if task == "generate" else int(real.sum())  # a window counts as many as it has
                items += worth * len(wanted)
                for i in range(count):
                    own = self._said(replay, self.without[i][number].hidden[row], real)
                    totals[i] += worth * float(_distance(wanted, own, task))
        return [total / items for total in totals]

    def _said(
        self, replay: nn.Module, hidden: Float[Tensor, "s width"], real: Bool[Tensor, "s"]
    ) -> Float[Tensor, "rows columns"]:
        """What the model says of a window whose last hidden states are known: logits, or its embedding."""
        if self.model.arch.task == "embed":
            return hidden[real].float().mean(0, keepdim=True)
        replay.hidden = hidden[None]
        width = self.model.checkpoint.entries[self.model.arch.embedding].shape[1]
        empty, extra = hidden.new_zeros(1, len(hidden), width), {}
        if self.model.arch.task == "generate":
            extra = {"use_cache": False}
        logits = self.module(inputs_embeds=empty, attention_mask=real[None].long(), **extra).logits[0]
        return (logits[real] if self.model.arch.task == "generate" else logits[None]).float()


def _distance(wanted: Float[Tensor, "n c"], own: Float[Tensor, "n c"], task: str) -> Float[Tensor, ""]:
    """The sum over rows."""
    if task == "embed":
        return (1 - torch.cosine_similarity(wanted.double(), own.double(), dim=-1)).sum()
    p, q = wanted.log_softmax(-1), own.log_softmax(-1)
    return (p.exp() * (p - q)).sum(dtype=torch.float64)


def _lacking(block: nn.Module, part: Part, calls: Sequence[Call]) -> list[Call]:
    """These batches behind a block of which a part is left out."""
    found = _copies(calls)
    if part.linear is not None:
        with _blind(block.get_submodule(part.linear), part.inputs):
            _through(block, found)
    return found


def _copies(calls: Sequence[Call]) -> list[Call]:
    return [replace(call, hidden=call.hidden.clone()) for call in calls]


def _through(block: nn.Module, calls: Sequence[Call]) -> None:
    for call in calls:
        call.hidden = run_block(block, call)


@contextmanager
def _blind(linear: nn.Module, inputs: tuple[int, int]) -> Iterator[None]:
    """While it is entered, a linear reads zeros for these inputs."""

    def hide(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        X = args[0].clone()
        X[..., inputs[0] : inputs[1]] = 0
        return (X, *args[1:])

    handle = linear.register_forward_pre_hook(hide)
    try:
        yield
    finally:
        handle.remove()
