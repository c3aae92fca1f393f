"""The walk: one block in memory at a time, with statistics of what its linears read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.linalg import Gram
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.models.shelf import Noted, Shelf
from pocketsize.models.skeleton import assign, fill, skeleton
from pocketsize.models.stream import hooked, surroundings

BATCH_TOKENS = 2048
# One window in so many judges what the others suggest.
HELD_OUT = 4


@dataclass(slots=True)
class Site:
    """Linears of a block that read the same tensor.

    Their parameter names, their weights (float32) and the Gram matrix of what they read; where
    they feed attention also that of each window's first position alone, and where text is held out
    that of every fourth window, which `gram` counts too. `fed_by` is the path of the norm or linear that
    feeds them (see `Linears`). What is put into `replaced` is what the rest of the walk sees. `last` says
    that the block is done after this site; `block` is the block's path, or `head`.
    """

    block: str
    names: tuple[str, ...]
    weights: tuple[Float[Tensor, "out in"], ...]
    gram: Gram
    last: bool
    first: Gram | None = None
    held: Gram | None = None
    fed_by: str | None = None
    replaced: dict[str, Float[Tensor, "out in"]] = field(default_factory=dict)


Arguments = tuple[tuple[object, ...], dict[str, object]]


@dataclass(slots=True)
class _Call:
    """What one batch brings: hidden states, the other arguments of each block, the mask of real tokens.

    Arguments differ by block where windows of attention do, or rotary tables.
    """

    hidden: Float[Tensor, "batch seq hidden"]
    arguments: dict[nn.Module, Arguments]
    mask: Bool[Tensor, "batch seq"]


class _Captured(Exception):
    """Ends a forward pass once its purpose is served."""


class _Indexed(Exception):
    """Ends a forward pass that reads the output of a block as a tuple."""


@torch.no_grad()
def walk(
    model: Model,
    input_ids: Int64[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
    *,
    finished: Callable[[str], Mapping[str, Tensor] | None] = lambda block: None,
    head: bool = False,
    hold_out: bool = False,
) -> Iterator[Site]:
    """Visit the linears in running order, each calibrated on the model as changed so far.

    Every block is materialised once and run once: each batch runs up to the first linears that
    read one tensor and waits there; when the Gram matrix holds all batches the site is handed to
    the caller, and the batches go on with the weights the caller put into `replaced`. So every
    linear is calibrated on what it will really read. A block for which `finished` returns weights
    is run with those, unvisited. With `head`, a last site gives the input of the head (the
    embedding's name stands for a tied one). With `hold_out`, sites have a Gram matrix of every fourth
    window alone too.

    The forward pass runs in bfloat16 where the CPU has it; Gram matrices are summed in float32;
    padding counts nowhere.
    """
    device = working_device()
    module = skeleton(model, device)  # tables such as rotary frequencies stay float32, as stock loaders do
    calls = _capture(module, model, input_ids.to(device), mask.to(device))
    shelf = _shelf(model, calls)
    for path in model.blocks:
        block = module.get_submodule(path)
        done = finished(path)
        if done is None:
            fill(module, path, lambda name: model.weight(name).to(forward_dtype()), device)
            yield from _visit(block, path, model, calls, shelf, hold_out=hold_out)
        elif head or path != model.blocks[-1]:
            fill(module, path, lambda name, new=done: _either(new, model, name).to(forward_dtype()), device)
            for call in calls:
                _keep(_Batch(block, call, shelf).go_on(), call, path)
        for number, call in enumerate(calls):
            _finite(call.hidden, path, number)
        block.to("meta")
    if head and model.arch.head is not None:
        yield _head(module, model, calls)


def _either(new: Mapping[str, Tensor], model: Model, name: str) -> Tensor:
    return model.as_stored(name, new[name]) if name in new else model.weight(name)


def _visit(
    block: nn.Module, path: str, model: Model, calls: list[_Call], shelf: Shelf, *, hold_out: bool
) -> Iterator[Site]:
    """The sites of a block in running order; afterwards the calls hold the block's outputs."""
    groups = model.groups
    firsts = [block.get_submodule(group.names[0]) for group in groups]
    driver, device = getcurrent(), calls[0].hidden.device

    def wait(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        driver.switch((linear, args))

    runs = [_Batch(block, call, shelf) for call in calls]
    with hooked(firsts, wait):
        for number, (group, first) in enumerate(zip(groups, firsts, strict=True)):
            stops = (_reached(run.go_on(), first, path, group.names) for run in runs)
            names = tuple(f"{path}.{name}.weight" for name in group.names)
            gram = Gram.zeros(model.matrix_shape(names[0])[1], device)
            site = Site(path, names, (), gram, last=number == len(groups) - 1)
            site.fed_by = group.fed_by and f"{path}.{group.fed_by}"
            _gather(site, stops, calls, attends=group.attends, hold_out=hold_out)
            site.weights = tuple(model.as_stored(n, model.weight(n)).to(device) for n in names)
            yield site
            for name, new in site.replaced.items():
                _replace(block, name.removeprefix(f"{path}."), model.as_stored(name, new))
            del site, gram
        for run, call in zip(runs, calls, strict=True):
            _keep(run.go_on(), call, path)


def _gather(
    site: Site, stops: Iterable[tuple[Tensor, ...]], calls: Sequence[_Call], *, attends: bool, hold_out: bool
) -> None:
    """Sum into the Gram matrices of a site what all batches bring to it."""
    like, window = site.gram.total, 0
    site.first = Gram.zeros(len(like), like.device) if attends else None
    site.held = Gram.zeros(len(like), like.device) if hold_out else None
    with torch.inference_mode():  # as the batches run
        for (X, *rows), call in zip(stops, calls, strict=True):
            mask = call.mask.flatten()[rows[0]] if rows else call.mask  # an expert reads some tokens
            X = X.reshape(*mask.shape, X.shape[-1])  # OPT joins batch and sequence
            if site.first is not None:
                site.first.update(X[:, 0])
            if site.held is None:
                site.gram.update(X, mask)
                continue
            held = (torch.arange(len(call.mask), device=mask.device) + window) % HELD_OUT == HELD_OUT - 1
            window += len(call.mask)
            held = held[:, None].expand_as(call.mask)
            held = held.flatten()[rows[0]] if rows else held
            for gram, part in ((site.gram, mask & ~held), (site.held, mask & held)):
                gram.update(X, part)
        if site.held is not None:
            site.gram.add(site.held)


def _shelf(model: Model, calls: Sequence[_Call]) -> Shelf:
    """Room for what the widest linears of a block read, and beside it for hidden states."""
    first = model.blocks[0]
    widths = [model.matrix_shape(f"{first}.{group.names[0]}.weight")[1] for group in model.groups]
    hidden = calls[0].hidden
    tokens = sum(call.mask.numel() for call in calls)
    return Shelf(tokens * (max(widths) + 4 * hidden.shape[-1]) * hidden.element_size())


class _Batch:
    """A batch on its way through a block; wherever it waits, all that it holds is put on the shelf."""

    def __init__(self, block: nn.Module, call: _Call, shelf: Shelf) -> None:
        known = [call.hidden, *_tensors(call.arguments[block])]
        self._run, self._noted, self._shelf = greenlet(lambda: _run(block, call)), Noted(known), shelf

    def go_on(self) -> Any:
        """Run on to where it waits next, or to the end of its block.

        In inference mode a view does not hold on to what it is a view of, so what is moved away is gone.
        """
        with torch.inference_mode():
            with self._noted:
                stop = self._run.switch()
            if not self._run.dead:
                self._shelf.move(self._noted.alive())
        self._shelf.heap.tidy()
        return stop


def _tensors(arguments: object) -> Iterator[Tensor]:
    """All tensors in tuples and dictionaries of anything."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, tuple | dict):
        for one in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _tensors(one)


def _keep(out: Tensor, call: _Call, path: str) -> None:
    """Write a block's output over its input: states that outlive a block all lie in one piece of memory.

    As tensors of their own among those of each batch they would leave holes that nothing else fits:
    1.4 GB instead of 1.1 after five blocks of 128 x 512 tokens of 135M parameters.
    """
    if out.shape != call.hidden.shape or out.dtype != call.hidden.dtype:
        raise UnsupportedError(
            f"{path}: gives {out.dtype} {tuple(out.shape)}, but reads {call.hidden.dtype} "
            f"{tuple(call.hidden.shape)}; blocks that change the shape of hidden states are not known"
        )
    call.hidden.copy_(out)


def _reached(stop: object, first: nn.Module, path: str, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """What the linears read that a batch waits at, provided they are the ones expected."""
    if not isinstance(stop, tuple) or stop[0] is not first:
        raise UnsupportedError(
            f"{path}: does not run its linears in the order of its family; expected {names[0]}"
        )
    return stop[1]


def _replace(block: nn.Module, name: str, new: Tensor) -> None:
    """Give one linear of a block its new weight, in the dtype it runs in."""
    assign(block, name, new.to(forward_dtype()))


def _capture(module: nn.Module, model: Model, input_ids: Tensor, mask: Tensor) -> list[_Call]:
    """Run everything around the blocks; keep the real arguments that each block is called with."""
    for name in surroundings(module, model):
        if name != model.arch.head:
            fill(module, name, lambda full: model.original(full).to(forward_dtype()), input_ids.device)
    blocks = [module.get_submodule(path) for path in model.blocks]
    calls: list[_Call] = []
    states = torch.empty(0)
    size = max(1, BATCH_TOKENS // input_ids.shape[1])
    extra = {"use_cache": False} if model.arch.task == "generate" else {}
    for ids, batch_mask in zip(input_ids.split(size), mask.split(size), strict=True):
        attend = None if bool(batch_mask.all()) else batch_mask.long()
        call = _arguments(module, blocks, {"input_ids": ids, "attention_mask": attend} | extra)
        call.mask = batch_mask
        if calls:
            _share(calls[0], call)
        else:
            states = call.hidden.new_empty(*input_ids.shape, call.hidden.shape[-1])
        begin = size * len(calls)
        call.hidden = states[begin : begin + len(ids)].copy_(call.hidden)
        calls.append(call)
    for end in (model.arch.embedding, model.arch.head):
        if end is not None:
            module.get_submodule(end.rpartition(".")[0]).to("meta")
    return calls


def _arguments(module: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, object]) -> _Call:
    """What each block is called with: the module is run with blocks that hand on what they are given.

    The last one ends the run. Some families read a block's output as a tuple, of which the first is the
    hidden states: hidden states that have lost a dimension tell.
    """
    call = _Call(torch.empty(0), {}, torch.empty(0))

    def standing_in(block: nn.Module, tuples: bool) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            hidden, *rest = args or (kwargs.pop("hidden_states"),)
            assert isinstance(hidden, Tensor)
            if block is blocks[0]:
                call.hidden = hidden
            elif hidden.ndim < call.hidden.ndim:
                raise _Indexed
            call.arguments[block] = (tuple(rest), kwargs)
            if block is blocks[-1]:
                raise _Captured
            return (hidden,) if tuples else hidden

        return forward

    for tuples in (False, True):
        try:
            for block in blocks:
                block.forward = standing_in(block, tuples)
            module(**inputs)
        except _Captured:
            return call
        except _Indexed:
            continue
        finally:
            for block in blocks:
                del block.forward
    raise UnsupportedError(
        f"{type(module).__name__}: its blocks do not hand hidden states from one to the next"
    )


def _share(first: _Call, later: _Call) -> None:
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


def _run(block: nn.Module, call: _Call) -> Float[Tensor, "batch seq hidden"]:
    """The block's output hidden states."""
    args, kwargs = call.arguments[block]
    out = block(call.hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _finite(hidden: Tensor, path: str, batch: int) -> None:
    """NaN and infinity are found where they arise, not at the end."""
    # A sum is finite only if all its terms are; in float32 it cannot overflow where bfloat16 states do not.
    if not bool(torch.isfinite(hidden.sum(dtype=torch.float32))):
        raise NumericalError(
            f"{path}: NaN or infinity in the hidden states of calibration batch {batch}; "
            "look at this block's weights with `pocketsize inspect`"
        )


class _Replay(nn.Module):
    """Stands for all blocks: gives the hidden states that the last one left."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.hidden


def _head(module: nn.Module, model: Model, calls: list[_Call]) -> Site:
    """The site of the head: what is left of the model is run on the last hidden states.

    The embedding is gone by then, and nothing that it would give is read.
    """
    assert model.arch.head is not None
    name = model.arch.embedding if model.tied else model.arch.head
    parent, _, attribute = model.arch.blocks.rpartition(".")
    replay = _Replay()
    setattr(module.get_submodule(parent), attribute, nn.ModuleList([replay]))
    device, width = calls[0].hidden.device, model.checkpoint.entries[model.arch.embedding].shape[1]
    linear = module.get_submodule(model.arch.head.rpartition(".")[0])
    gram = Gram.zeros(model.checkpoint.entries[name].shape[1], device)

    def update(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.update(args[0], mask)
        raise _Captured

    with hooked([linear], update):
        for call in calls:
            replay.hidden, mask = call.hidden, call.mask
            try:
                module(inputs_embeds=call.hidden.new_zeros(*call.mask.shape, width), use_cache=False)
            except _Captured:
                continue
    return Site("head", (name,), (model.weight(name).to(device),), gram, last=True)
