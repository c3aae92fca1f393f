"""The walk: one block in memory at a time, with statistics of what its linears read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.errors import NumericalError
from pocketsize.linalg import Gram
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.models.skeleton import fill, skeleton

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Site:
    """Linears that read the same tensor: their parameter names, weights (float32) and its Gram matrix."""

    names: tuple[str, ...]
    weights: tuple[Float[Tensor, "out in"], ...]
    gram: Gram


@dataclass(slots=True)
class Visit:
    """One block with its sites. What is put into `replaced` is what the rest of the walk sees."""

    block: str
    sites: tuple[Site, ...]
    replaced: dict[str, Float[Tensor, "out in"]] = field(default_factory=dict)


@dataclass(slots=True)
class _Call:
    """What one batch brings to a block: hidden states, the other arguments, the mask of real tokens."""

    hidden: Float[Tensor, "batch seq hidden"]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    mask: Bool[Tensor, "batch seq"]


class _Captured(Exception):
    """Ends a forward pass once its purpose is served."""


@torch.no_grad()
def walk(
    model: Model,
    input_ids: Int64[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
    *,
    finished: Callable[[str], Mapping[str, Tensor] | None] = lambda block: None,
    head: bool = False,
) -> Iterator[Visit]:
    """Visit the blocks in running order, each calibrated on the model as changed so far.

    A block is materialised, run once to gather the Gram matrices of all inputs of its linears
    (cut short at the last of them), handed to the caller, and run once more with the weights the
    caller put into `replaced`. A block for which `finished` returns weights is only run the second
    time. Matrix products run in bfloat16 where the CPU has it; hidden states and sums stay
    float32; padding counts nowhere. With `head`, a last visit gives the input of the head (the
    embedding's name stands for a tied one).
    """
    module = skeleton(model)
    calls = _capture(module, model, input_ids, mask)
    for index, path in enumerate(model.blocks):
        block = module.get_submodule(path)
        done = finished(path)
        if done is not None:
            replaced = dict(done)
        else:
            _load(module, block, path, model.weight)
            visit = Visit(path, _gather(block, path, model, calls))
            yield visit
            replaced = visit.replaced
            del visit
        last = index == len(model.blocks) - 1
        if not last or head:
            _load(
                module,
                block,
                path,
                lambda name, new=replaced: new[name] if name in new else model.weight(name),
            )
            for number, call in enumerate(calls):
                call.hidden = _run(block, call)
                _finite(call.hidden, path, number)
        block.to("meta")
    if head and model.arch.head is not None:
        yield _head(module, model, calls)


def _load(module: nn.Module, block: nn.Module, path: str, read: Callable[[str], Tensor]) -> None:
    """Fill a block; matrices in the dtype they are multiplied in, everything else float32."""
    dtype = forward_dtype()
    matrices = {
        f"{path}.{name}.weight" for name, child in block.named_modules() if isinstance(child, nn.Linear)
    }
    fill(
        module, path, lambda name: read(name).to(dtype) if name in matrices else read(name).to(torch.float32)
    )


def _capture(module: nn.Module, model: Model, input_ids: Tensor, mask: Tensor) -> list[_Call]:
    """Run everything before the first block; keep the real arguments that block is called with."""
    outside = [name for name, _ in module.named_parameters() if not name.startswith(f"{model.arch.blocks}.")]
    held = {name for name in outside if name != model.arch.head}
    for name in held:
        fill(module, name, lambda full: model.checkpoint.read(full).to(torch.float32))
    calls: list[_Call] = []

    def keep(block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        calls.append(_Call(hidden, tuple(rest), kwargs, batch_mask))
        if len(calls) > 1:
            _share(calls[0], calls[-1])
        raise _Captured

    first = module.get_submodule(model.blocks[0])
    hook = first.register_forward_pre_hook(keep, with_kwargs=True)
    size = max(1, BATCH_TOKENS // input_ids.shape[1])
    extra = {"use_cache": False} if model.arch.task == "generate" else {}
    try:
        for ids, batch_mask in zip(input_ids.split(size), mask.split(size), strict=True):
            attend = None if bool(batch_mask.all()) else batch_mask.long()
            try:
                module(input_ids=ids, attention_mask=attend, **extra)
            except _Captured:
                continue
    finally:
        hook.remove()
    module.get_submodule(model.arch.embedding.rpartition(".")[0]).to("meta")
    return calls


def _share(first: _Call, later: _Call) -> None:
    """Position tables are the same for every batch: hold one copy of them."""

    def shared(ours: object, theirs: object) -> object:
        if isinstance(ours, tuple) and isinstance(theirs, tuple):
            return tuple(shared(a, b) for a, b in zip(ours, theirs, strict=True))
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape == theirs.shape:
            return ours if torch.equal(ours, theirs) else theirs
        return theirs

    later.args = tuple(shared(a, b) for a, b in zip(first.args, later.args, strict=True))
    later.kwargs = {key: shared(first.kwargs.get(key), value) for key, value in later.kwargs.items()}


def _run(block: nn.Module, call: _Call) -> Float[Tensor, "batch seq hidden"]:
    """The block's output hidden states, float32."""
    dtype = forward_dtype()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = block(call.hidden, *call.args, **call.kwargs)
    return (out[0] if isinstance(out, tuple) else out).to(torch.float32)


def _gather(block: nn.Module, path: str, model: Model, calls: list[_Call]) -> tuple[Site, ...]:
    """The sites of a block, their Gram matrices summed over all batches."""
    groups = model.arch.groups
    firsts = [block.get_submodule(group.names[0]) for group in groups]
    grams = [Gram.zeros(int(first.weight.shape[1])) for first in firsts]
    mask = [calls[0].mask]

    def watch(gram: Gram, stop: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def update(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            gram.update(args[0].to(forward_dtype()), mask[0])
            if stop:
                raise _Captured  # the rest of the block feeds nobody in this pass

        return update

    with _hooked(firsts, [watch(gram, i == len(groups) - 1) for i, gram in enumerate(grams)]):
        for call in calls:
            mask[0] = call.mask
            try:
                _run(block, call)
            except _Captured:
                continue
    names = [tuple(f"{path}.{name}.weight" for name in group.names) for group in groups]
    return tuple(
        Site(full, tuple(model.weight(name) for name in full), gram)
        for full, gram in zip(names, grams, strict=True)
    )


@contextmanager
def _hooked(modules: list[nn.Module], hooks: list[Callable[..., None]]) -> Iterator[None]:
    """Pre-forward hooks that are gone when the block ends."""
    handles = [m.register_forward_pre_hook(h) for m, h in zip(modules, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(hidden: Tensor, path: str, batch: int) -> None:
    """NaN and infinity are found where they arise, not at the end."""
    if not bool(torch.isfinite(hidden).all()):
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


def _head(module: nn.Module, model: Model, calls: list[_Call]) -> Visit:
    """The visit of the head: what is left of the model is run on the last hidden states."""
    assert model.arch.head is not None
    name = model.arch.embedding if model.tied else model.arch.head
    parent, _, attribute = model.arch.blocks.rpartition(".")
    replay = _Replay()
    setattr(module.get_submodule(parent), attribute, nn.ModuleList([replay]))
    owner = model.arch.embedding.rpartition(".")[0]
    fill(module, model.arch.embedding, lambda full: model.checkpoint.read(full).to(torch.float32))
    linear = module.get_submodule(model.arch.head.rpartition(".")[0])
    gram = Gram.zeros(int(module.get_submodule(owner).weight.shape[1]))

    def update(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.update(args[0], mask)
        raise _Captured

    with _hooked([linear], [update]):
        for call in calls:
            replay.hidden, mask = call.hidden, call.mask
            try:
                module(input_ids=torch.zeros(call.mask.shape, dtype=torch.int64), use_cache=False)
            except _Captured:
                continue
    return Visit("head", (Site((name,), (model.weight(name),), gram),))
