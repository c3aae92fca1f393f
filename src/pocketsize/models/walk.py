"""The walk: one block in memory at a time, with statistics of what its linears read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.linalg import Gram
from pocketsize.models.batches import HELD_OUT
from pocketsize.models.calls import Call, Captured, capture, replayed, run_block
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.inputs import round_inputs
from pocketsize.models.model import Model
from pocketsize.models.sample import Sample, Sampler
from pocketsize.models.shelf import LESS, SPARE, Noted, Shelf
from pocketsize.models.skeleton import assign, fill, skeleton
from pocketsize.models.stream import hooked
from pocketsize.models.taps import asked_of, recorded
from pocketsize.quantization.drift import Drift
from pocketsize.quantization.scheme import Scheme

_NONE: Mapping[str, Scheme] = MappingProxyType({})
# What an original's site reads, or what its linear gives, and then the linear.
_Kept = tuple[Tensor, nn.Module | None]


@dataclass(frozen=True, slots=True)
class Whole:
    """A block, what it is given in the model as changed so far, and what the original's gives instead."""

    module: nn.Module
    calls: Sequence[Call]
    originals: Sequence[Call]
    shelf: Shelf

    def loss(self, number: int) -> Tensor:
        """How far the output for one batch is from the original's: squared, relative, mean over tokens.

        Norms divide by the size of a hidden state, so what matters is the error relative to it.
        """
        self.shelf.tidy()
        call = self.calls[number]
        wanted = self.originals[number].hidden[call.mask].to(torch.float32)
        errors = run_block(self.module, call)[call.mask].to(torch.float32) - wanted
        return (errors.square().sum(-1) / wanted.square().sum(-1)).mean()

    def put(self, name: str, W: Tensor) -> Tensor:
        """Give a linear a weight, by its name below the block; the parameter."""
        assign(self.module, name, W.to(forward_dtype()))
        return self.module.get_parameter(name)


@dataclass(slots=True)
class Site:
    """Linears of a block that read the same tensor.

    Their parameter names, their weights (float32) and the Gram matrix of what they read; where
    they feed attention also that of each window's first position alone, and where text is held out
    that of every fourth window, which `gram` counts too. `fed_by` is the path of the norm or linear that
    feeds them (see `Linears`). What is put into `replaced` is what the rest of the walk sees. `last` says
    that the block is done after this site; `block` is the block's path, or `head`. `whole` is the block
    itself, at its last site and only where the walk runs the original beside it: what is then put into
    `replaced` may be any of its linears. `drift` and `first_drift` are what the linears lack beside the
    original's, where that is asked for; where batches judge, of the others. Where linears round their inputs,
    `gram` and `sample` are of those before they do, and `divisor` may be set to what inputs are divided by
    while they are rounded.
    """

    block: str
    names: tuple[str, ...]
    weights: tuple[Float[Tensor, "out in"], ...]
    gram: Gram
    last: bool
    first: Gram | None = None
    held: Gram | None = None
    drift: Drift | None = None
    first_drift: Drift | None = None
    fed_by: str | None = None
    whole: Whole | None = None
    sample: Sample | None = None
    divisor: Float[Tensor, "in"] | None = None
    replaced: dict[str, Float[Tensor, "out in"]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a walk gathers beside Gram matrices, and what inputs are divided by while they are rounded.

    `whole`: last sites have the whole block. `judged`: no drift counts every fourth batch.
    """

    hold_out: bool
    sampled: int
    whole: bool
    judged: bool
    divisors: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def walk(
    model: Model,
    input_ids: Int64[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
    *,
    finished: Callable[[str], Mapping[str, Tensor] | None] = lambda block: None,
    head: bool = False,
    hold_out: bool = False,
    beside: bool = False,
    drift: bool = False,
    judged: bool = False,
    sampled: int = 0,
    rounds: Mapping[str, Scheme] = _NONE,
) -> Iterator[Site]:
    """Visit the linears in running order, each calibrated on the model as changed so far.

    Every block is materialised once and run once: each batch runs up to the first linears that read one
    tensor and waits there; when the Gram matrix holds all batches the site is handed to the caller, and the
    batches go on with the weights the caller put into `replaced`. So every linear is calibrated on what it
    will really read. A block for which `finished` returns weights is run with those, unvisited. With `head`,
    a last site gives the input of the head (the embedding's name stands for a tied one). With `hold_out`,
    sites have a Gram matrix of every fourth window alone too, with `sampled` about so many tokens of either
    kind. With `beside`, the original runs beside the changed model, and the last site of each block has both;
    so it does with `drift`, and each site has what its linears lack, of three in four batches if the fourth
    is `judged` by. Linears in `rounds` round what they read, as the model will; never beside an original.
    Forward passes run in bfloat16 where the CPU has it, sums are float32; padding counts nowhere.
    """
    device = working_device()
    module = skeleton(model, device)  # tables such as rotary frequencies stay float32, as stock loaders do
    calls = capture(module, model, input_ids.to(device), mask.to(device))
    shelf = shelf_for(model, calls, LESS if beside or drift else SPARE)
    originals = _copied(calls) if beside or drift else []
    wanted = _Wanted(hold_out, sampled, beside, judged or hold_out)
    round_inputs(module, rounds, wanted.divisors)
    for path in model.blocks:
        block = module.get_submodule(path)
        done = finished(path)
        if done is None or originals:
            fill(module, path, lambda name: model.weight(name).to(forward_dtype()), device)
        rooms = _asked(block, path, model, originals, shelf, read=drift and done is None)
        if done is None:
            yield from _visit(block, path, model, (calls, originals, rooms), shelf, wanted=wanted)
        elif head or path != model.blocks[-1]:
            fill(module, path, lambda name, new=done: _either(new, model, name).to(forward_dtype()), device)
            through(block, calls, shelf, path)
        for number, call in enumerate(calls):
            require_finite(call.hidden, path, number)
        block.to("meta")
    if head and model.arch.head is not None:
        yield _head(module, model, calls)


def _either(new: Mapping[str, Tensor], model: Model, name: str) -> Tensor:
    return model.as_stored(name, new[name]) if name in new else model.weight(name)


def _copied(calls: Sequence[Call]) -> list[Call]:
    """The same calls with hidden states of their own, in one piece of memory."""
    rows = [call.hidden.flatten(0, 1) for call in calls]
    states = torch.cat(rows).split([len(own) for own in rows])
    return [
        Call(own.view(call.hidden.shape), call.arguments, call.mask)
        for own, call in zip(states, calls, strict=True)
    ]


def _firsts(block: nn.Module, model: Model) -> list[nn.Module]:
    """Of the linears of a block that read the same tensor, the first each."""
    return [block.get_submodule(group.names[0]) for group in model.groups]


def _asked(
    block: nn.Module, path: str, model: Model, calls: Sequence[Call], shelf: Shelf, *, read: bool
) -> list[_Kept]:
    """Run a block of the original on all batches; what is asked of its sites, of all tokens, if it is."""
    if not read:
        through(block, calls, shelf, path)
        return []
    hidden, tokens, told = calls[0].hidden, sum(call.mask.numel() for call in calls), asked_of(model, path)
    rooms = [hidden.new_empty(tokens, width) for width, _ in told]
    firsts, given = _firsts(block, model), [outputs for _, outputs in told]
    with recorded(firsts, rooms, given):
        through(block, calls, shelf, path)
    linears = [first if outputs else None for first, outputs in zip(firsts, given, strict=True)]
    return list(zip(rooms, linears, strict=True))


def _visit(
    block: nn.Module,
    path: str,
    model: Model,
    batches: tuple[list[Call], list[Call], list[_Kept]],
    shelf: Shelf,
    *,
    wanted: _Wanted,
) -> Iterator[Site]:
    """The sites of a block in running order; afterwards the calls hold the block's outputs.

    Where the original runs beside for the sake of the whole block, the batches begin anew once all linears
    are settled. The third of `batches` is what was asked of its sites, if anything; it is used up.
    """
    groups, (calls, originals, rooms) = model.groups, batches
    firsts = _firsts(block, model)
    driver, device = getcurrent(), calls[0].hidden.device

    def wait(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        driver.switch((linear, args))

    runs = [Batch(block, call, shelf) for call in calls]
    with hooked(firsts, wait):
        for number, (group, first) in enumerate(zip(groups, firsts, strict=True)):
            stops = (reached(run.go_on(), first, path, group.names) for run in runs)
            names = tuple(f"{path}.{name}.weight" for name in group.names)
            gram = Gram.zeros(model.matrix_shape(names[0])[1], device)
            site = Site(path, names, (), gram, last=number == len(groups) - 1)
            site.fed_by = group.fed_by and f"{path}.{group.fed_by}"
            asked = rooms.pop(0) if rooms else None
            _gather(site, stops, calls, attends=group.attends, wanted=wanted, asked=asked)
            del asked
            site.weights = tuple(model.as_stored(n, model.weight(n)).to(device) for n in names)
            if wanted.whole and site.last:
                runs.clear()  # they begin anew
                shelf.give_back()
                site.whole = Whole(block, calls, originals, shelf)
            shelf.tidy(4 * gram.total.nbytes)  # factors of a matrix take about so much
            yield site
            if site.divisor is not None:
                wanted.divisors.update(dict.fromkeys(names, site.divisor))
            for name, new in site.replaced.items():
                assign(block, name.removeprefix(f"{path}."), model.as_stored(name, new).to(forward_dtype()))
            del site, gram
        if not wanted.whole:
            for run, call in zip(runs, calls, strict=True):
                keep(run.go_on(), call, path)
    if wanted.whole:
        through(block, calls, shelf, path)


def _gather(
    site: Site,
    stops: Iterable[tuple[Tensor, ...]],
    calls: Sequence[Call],
    *,
    attends: bool,
    wanted: _Wanted,
    asked: _Kept | None = None,
) -> None:
    """Sum into the matrices of a site what all batches bring to it, and what was `asked` of the original."""
    like, window = site.gram.total, 0
    site.first = Gram.zeros(len(like), like.device) if attends else None
    wanting, linear = list[Tensor | None]([None] * len(calls)), None
    if asked is not None:
        room, linear = asked
        wanting[:] = room.split([call.mask.numel() for call in calls])
        outputs = None if linear is None else room.shape[1]
        site.drift = Drift.zeros(len(like), like.device, outputs=outputs)
        site.first_drift = Drift.zeros(len(like), like.device, outputs=outputs) if attends else None
    site.held = Gram.zeros(len(like), like.device) if wanted.hold_out else None
    sampler = Sampler(-(-wanted.sampled // len(calls))) if wanted.sampled else None
    with torch.inference_mode():  # as the batches run
        for number, ((X, *rows), call, there) in enumerate(zip(stops, calls, wanting, strict=True)):
            mask = call.mask.flatten()[rows[0]] if rows else call.mask  # an expert reads some tokens
            X = X.reshape(*mask.shape, X.shape[-1])  # OPT joins batch and sequence
            if site.first is not None:
                site.first.update(X[:, 0])
            if there is not None and not (wanted.judged and number % HELD_OUT == HELD_OUT - 1):
                _differ(site, X, there.view(*mask.shape, -1), mask, linear)
                continue
            if site.held is None:
                site.gram.update(X, mask)
                continue
            held = (torch.arange(len(call.mask), device=mask.device) + window) % HELD_OUT == HELD_OUT - 1
            window += len(call.mask)
            held = held[:, None].expand_as(call.mask)
            held = held.flatten()[rows[0]] if rows else held
            for gram, part in ((site.gram, mask & ~held), (site.held, mask & held)):
                gram.update(X, part)
            if sampler is not None:
                sampler.take(X, mask & ~held, mask & held)
        for part in (site.held, site.drift and site.drift.read):
            if part is not None:
                site.gram.add(part)
        site.sample = sampler.sample() if sampler is not None else None


def _differ(site: Site, Y: Tensor, X: Tensor, mask: Tensor, linear: nn.Module | None) -> None:
    """Count a batch in what the linears of a site lack; of a `linear` in what it gives."""
    own = None if linear is None else linear.forward(Y)  # called, it would wait here
    if site.drift is not None:
        site.drift.update(Y, X, mask, own=own)
    if site.first_drift is not None:
        site.first_drift.update(Y[:, 0], X[:, 0], own=None if own is None else own[:, 0])


def shelf_for(model: Model, calls: Sequence[Call], spare: int = SPARE) -> Shelf:
    """Room for what the widest linears of a block read, and beside it for hidden states."""
    first = model.blocks[0]
    widths = [model.matrix_shape(f"{first}.{group.names[0]}.weight")[1] for group in model.groups]
    hidden = calls[0].hidden
    tokens = sum(call.mask.numel() for call in calls)
    return Shelf(tokens * (max(widths) + 4 * hidden.shape[-1]) * hidden.element_size(), spare)


class Batch:
    """A batch on its way through a block; wherever it waits, all that it holds is put on the shelf."""

    def __init__(self, block: nn.Module, call: Call, shelf: Shelf) -> None:
        known = call.hidden, call.arguments[block]
        self._run, self._noted, self._shelf = greenlet(lambda: run_block(block, call)), Noted(known), shelf

    def go_on(self) -> Any:
        """Run on to where it waits next, or to the end of its block.

        In inference mode a view does not hold on to what it is a view of, so what is moved away is gone.
        """
        with torch.inference_mode():
            with self._noted:
                stop = self._run.switch()
            if not self._run.dead:
                self._shelf.move(self._noted.alive())
        self._shelf.tidy()
        return stop


def through(block: nn.Module, calls: Sequence[Call], shelf: Shelf, path: str) -> None:
    """Run a block on all batches, one after the other."""
    for call in calls:
        keep(Batch(block, call, shelf).go_on(), call, path)


def keep(out: Tensor, call: Call, path: str) -> None:
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


def reached(stop: object, first: nn.Module, path: str, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """What the linears read that a batch waits at, provided they are the ones expected."""
    if not isinstance(stop, tuple) or stop[0] is not first:
        raise UnsupportedError(
            f"{path}: does not run its linears in the order of its family; expected {names[0]}"
        )
    return stop[1]


def require_finite(hidden: Tensor, path: str, batch: int) -> None:
    """NaN and infinity are found where they arise, not at the end."""
    # A sum is finite only if all its terms are; in float32 it cannot overflow where bfloat16 states do not.
    if not bool(torch.isfinite(hidden.sum(dtype=torch.float32))):
        raise NumericalError(
            f"{path}: NaN or infinity in the hidden states of calibration batch {batch}; "
            "look at this block's weights with `pocketsize inspect`"
        )


def _head(module: nn.Module, model: Model, calls: list[Call]) -> Site:
    """The site of the head: what is left of the model is run on the last hidden states.

    The embedding is gone by then, and nothing that it would give is read.
    """
    assert model.arch.head is not None
    name = model.arch.embedding if model.tied else model.arch.head
    device, width = calls[0].hidden.device, model.checkpoint.entries[model.arch.embedding].shape[1]
    linear = module.get_submodule(model.arch.head.rpartition(".")[0])
    gram = Gram.zeros(model.checkpoint.entries[name].shape[1], device)

    def update(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.update(args[0], mask)
        raise Captured

    with replayed(module, model, calls) as replay, hooked([linear], update):
        for call in calls:
            replay.hidden, mask = call.hidden, call.mask
            try:
                module(inputs_embeds=call.hidden.new_zeros(*call.mask.shape, width), use_cache=False)
            except Captured:
                continue
    return Site("head", (name,), (model.weight(name).to(device),), gram, last=True)
