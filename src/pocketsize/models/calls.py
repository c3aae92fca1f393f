"""Batches in front of a model's blocks: their hidden states, and all else that each block is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pocketsize.errors import UnsupportedError
from pocketsize.models.batches import in_batches
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.models.skeleton import fill
from pocketsize.models.stream import surroundings

Arguments = tuple[tuple[object, ...], dict[str, object]]


@dataclass(slots=True)
class Call:
    """What one batch brings: hidden states, the other arguments of each block, the mask of real tokens.

    Arguments differ by block where windows of attention do, or rotary tables. `tuples` says that blocks give
    a tuple, of which the first is the hidden states; it is known once one was run.
    """

    hidden: Float[Tensor, "batch seq hidden"]
    arguments: dict[nn.Module, Arguments]
    mask: Bool[Tensor, "batch seq"]
    tuples: bool = False


class Captured(Exception):
    """Ends a forward pass once its purpose is served."""


class Indexed(Exception):
    """Ends a forward pass that reads the output of a block as a tuple."""


def capture(module: nn.Module, model: Model, input_ids: Tensor, mask: Tensor) -> list[Call]:
    """Run everything around the blocks; keep the real arguments that each block is called with."""
    for name in surroundings(module, model):
        if name != model.arch.head:
            fill(module, name, lambda full: model.original(full).to(forward_dtype()), input_ids.device)
    blocks = [module.get_submodule(path) for path in model.blocks]
    calls: list[Call] = []
    batches = list(in_batches(input_ids, mask))
    states, begin, tokens = torch.empty(0), 0, sum(ids.numel() for ids, _ in batches)
    firsts: dict[int, Call] = {}  # by width: tables differ where widths do
    extra = {"use_cache": False} if model.arch.causal else {}
    for ids, batch_mask in batches:
        attend = None if bool(batch_mask.all()) else batch_mask.long()
        call = _arguments(module, blocks, {"input_ids": ids, "attention_mask": attend} | extra)
        call.mask = batch_mask
        if (first := firsts.setdefault(ids.shape[1], call)) is not call:
            _share(first, call)
        if not calls:
            states = call.hidden.new_empty(tokens, call.hidden.shape[-1])
        end = begin + ids.numel()
        call.hidden = states[begin:end].view(call.hidden.shape).copy_(call.hidden)
        begin = end
        calls.append(call)
    for end in (model.arch.embedding, model.arch.head):
        if end is not None:
            module.get_submodule(end.rpartition(".")[0]).to("meta")
    return calls


def _arguments(module: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, object]) -> Call:
    """What each block is called with: the module is run with blocks that hand on what they are given.

    The last one ends the run. Some families read a block's output as a tuple, of which the first is the
    hidden states: hidden states that have lost a dimension tell.
    """
    call = Call(torch.empty(0), {}, torch.empty(0))

    def standing_in(block: nn.Module, tuples: bool) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            hidden, *rest = args or (kwargs.pop("hidden_states"),)
            assert isinstance(hidden, Tensor)
            if block is blocks[0]:
                call.hidden = hidden
            elif hidden.ndim < call.hidden.ndim:
                raise Indexed
            call.arguments[block] = (tuple(rest), kwargs)
            if block is blocks[-1]:
                raise Captured
            return (hidden,) if tuples else hidden

        return forward

    for tuples in (False, True):
        try:
            for block in blocks:
                block.forward = standing_in(block, tuples)
            module(**inputs)
        except Captured:
            return call
        except Indexed:
            continue
        finally:
            for block in blocks:
                del block.forward
    raise UnsupportedError(
        f"{type(module).__name__}: its blocks do not hand hidden states from one to the next"
    )


def _share(first: Call, later: Call) -> None:
    """Position tables are the same for every batch: hold one copy of them."""
    known: dict[tuple[int, int], object] = {}  # blocks of a batch share their tables already: compare once

    def shared(ours: object, theirs: object) -> object:
        if isinstance(ours, tuple) and isinstance(theirs, tuple):
            return tuple(shared(a, b) for a, b in zip(ours, theirs, strict=True))
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
            return theirs
        pair = (id(ours), id(theirs))
        if pair not in known:
            known[pair] = ours if torch.equal(ours, theirs) else theirs
        return known[pair]

    taken: dict[nn.Module, Arguments] = {}
    for block, (args, kwargs) in later.arguments.items():
        before, named = first.arguments[block]
        taken[block] = (
            tuple(shared(a, b) for a, b in zip(before, args, strict=True)),
            {key: shared(named.get(key), value) for key, value in kwargs.items()},
        )
    later.arguments = taken


def run_block(block: nn.Module, call: Call) -> Float[Tensor, "batch seq hidden"]:
    """The block's output hidden states."""
    args, kwargs = call.arguments[block]
    out = block(call.hidden, *args, **kwargs)
    call.tuples = isinstance(out, tuple)
    return out[0] if isinstance(out, tuple) else out


class Replay(nn.Module):
    """Stands for all blocks: gives hidden states that are known, as the blocks of a family do."""

    hidden: Tensor

    def __init__(self, *, tuples: bool) -> None:
        super().__init__()
        self.tuples = tuples

    def forward(self, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        """The hidden states."""
        return (self.hidden,) if self.tuples else self.hidden


@contextmanager
def replayed(module: nn.Module, model: Model, calls: Sequence[Call]) -> Iterator[Replay]:
    """While it is entered, known hidden states stand for the blocks, which ran on `calls` before."""
    parent, _, attribute = model.arch.blocks.rpartition(".")
    owner, blocks, replay = (
        module.get_submodule(parent),
        module.get_submodule(model.arch.blocks),
        Replay(tuples=calls[0].tuples),
    )
    setattr(owner, attribute, nn.ModuleList([replay]))
    try:
        yield replay
    finally:
        setattr(owner, attribute, blocks)
