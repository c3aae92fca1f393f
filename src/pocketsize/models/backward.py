"""The gradient of a model's own uncertainty at every linear, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.models.calls import Call, capture, replayed, run_block
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.models.skeleton import assign, fill, skeleton
from pocketsize.models.stream import surroundings


@dataclass(slots=True)
class Seen:
    """What one linear read, and the gradient at its output, row by row of the same real tokens."""

    inputs: list[Float[Tensor, "t in"]] = field(default_factory=list)
    gradients: list[Float[Tensor, "t out"]] = field(default_factory=list)

    def joined(self) -> tuple[Float[Tensor, "t in"], Float[Tensor, "t out"]]:
        """All rows."""
        return torch.cat(self.inputs), torch.cat(self.gradients)


@dataclass(frozen=True, slots=True)
class Ends:
    """What the head reads with its own logits, window by window, and the gradient at the first block's input.

    `tokens` are those of the same rows.
    """

    hidden: Sequence[Float[Tensor, "t hidden"]]
    gradient: Float[Tensor, "t hidden"]
    tokens: Int64[Tensor, "t"]


def backward_walk(
    model: Model, input_ids: Int64[Tensor, "n length"], mask: Bool[Tensor, "n length"], *, seed: int
) -> Iterator[tuple[str, Mapping[str, Seen] | Ends]]:
    """The blocks of a model from the last to the first, with what each of their linears saw.

    The loss is the negative log-likelihood of tokens (of a classifier: classes) drawn from the model's own
    predictions, summed over all positions: the mean of its squared gradients is the Fisher information, which
    is what KL is made of to second order. Of an encoder it is its embedding of a window, of length 1, times a
    direction drawn by chance: the mean square of its changes is the embedding's own, which is twice
    1 - cosine; of both, windows count by their tokens. Hidden states in front of every block stay in memory
    until the block's turn comes. The last that comes, of a causal language model alone, is `Ends`, under the
    name `ends`.
    """
    device = working_device()
    module = skeleton(model, device)
    calls = capture(module, model, input_ids.to(device), mask.to(device))
    before = _forward(module, model, calls)
    hidden: list[Tensor] = []
    if model.arch.task == "generate":
        slopes, hidden = _uncertainty(module, model, calls, seed)
    else:
        slopes = _probed(module, model, calls, seed)
    for path in reversed(model.blocks):
        block = module.get_submodule(path)
        fill(module, path, lambda name: model.weight(name).to(forward_dtype()), device)
        with _watched(block, path, model) as seen:
            for number, call in enumerate(calls):
                seen.mask = call.mask
                there = replace(call, hidden=before[path][number])
                slopes[number] = _back(block, there, slopes[number])
        yield path, seen.linears
        del before[path]
        block.to("meta")
    if model.arch.task != "generate":
        return
    rows = [slope[call.mask] for slope, call in zip(slopes, calls, strict=True)]
    tokens = input_ids.to(device)[mask.to(device)]
    yield "ends", Ends(hidden, torch.cat(rows).float(), tokens)


def _back(block: nn.Module, call: Call, slope: Tensor) -> Tensor:
    """The gradient in front of a block, given that behind it."""
    call.hidden.requires_grad_()
    with torch.enable_grad():
        out = run_block(block, call)
    out.backward(slope)
    assert call.hidden.grad is not None
    return call.hidden.grad


@torch.no_grad()
def _forward(module: nn.Module, model: Model, calls: Sequence[Call]) -> dict[str, list[Tensor]]:
    """Hidden states in front of each block; afterwards the calls hold those behind the last."""
    before: dict[str, list[Tensor]] = {}
    for path in model.blocks:
        block = module.get_submodule(path)
        fill(module, path, lambda name: model.weight(name).to(forward_dtype()), working_device())
        before[path] = [call.hidden.clone() for call in calls]
        for call in calls:
            call.hidden = run_block(block, call)
        block.to("meta")
    return before


def _uncertainty(
    module: nn.Module, model: Model, calls: Sequence[Call], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The loss's gradient behind the last block, by batch, and what the head reads, by window."""
    assert model.arch.head is not None
    name = model.arch.embedding if model.tied else model.arch.head
    W = model.weight(name).to(calls[0].hidden.device, forward_dtype())
    assign(module, model.arch.head, W)
    linear, slopes, hidden = module.get_submodule(model.arch.head.rpartition(".")[0]), [], list[Tensor]()
    generator = torch.Generator(device=W.device).manual_seed(seed)
    handle = linear.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    with replayed(module, model, calls) as replay:
        for call in calls:
            slope = torch.zeros_like(call.hidden)
            for i, real in enumerate(call.mask):
                replay.hidden = call.hidden[i : i + 1].detach().requires_grad_()
                _surprise(module, replay.hidden, real, W.shape[1], generator).backward()
                hidden[-1] = hidden[-1][0, real]
                assert replay.hidden.grad is not None
                slope[i] = replay.hidden.grad[0]
            slopes.append(slope)
    handle.remove()
    return slopes, hidden


@torch.enable_grad()
def _probed(module: nn.Module, model: Model, calls: Sequence[Call], seed: int) -> list[Tensor]:
    """The same gradient for an encoder or a classifier, by batch."""
    generator = torch.Generator(device=calls[0].hidden.device).manual_seed(seed)
    classifies = model.arch.task == "classify"
    for name in surroundings(module, model) if classifies else ():
        fill(module, name, lambda full: model.weight(full).to(forward_dtype()), working_device())
    width, slopes = model.checkpoint.entries[model.arch.embedding].shape[1], list[Tensor]()
    mean = sum(int(call.mask.sum()) for call in calls) / sum(len(call.mask) for call in calls)
    with replayed(module, model, calls) as replay:
        for call in calls:
            hidden, worth = call.hidden.detach().requires_grad_(), (call.mask.sum(1) / mean).sqrt()
            if classifies:
                replay.hidden, empty = hidden, hidden.new_zeros(*call.mask.shape, width)
                logits = module(inputs_embeds=empty, attention_mask=call.mask.long()).logits
                p = logits.float().log_softmax(-1)
                drawn = torch.multinomial(p.detach().exp(), 1, generator=generator)
                loss = -(p.gather(-1, drawn)[:, 0] * worth).sum()
            else:
                kept = call.mask[..., None]
                found = F.normalize((hidden.float() * kept).sum(1) / kept.sum(1), dim=-1)
                probe = torch.randn(found.shape, generator=generator, device=found.device)
                loss = ((found * probe).sum(-1) * worth).sum()
            (slope,) = torch.autograd.grad(loss, hidden)
            slopes.append(slope)
    return slopes


@torch.enable_grad()
def _surprise(
    module: nn.Module, hidden: Tensor, real: Tensor, width: int, generator: torch.Generator
) -> Tensor:
    """The negative log-likelihood of tokens drawn from the model's own predictions, of one window."""
    empty = hidden.new_zeros(1, len(real), width)
    p = module(inputs_embeds=empty, use_cache=False).logits[0, real].float().log_softmax(-1)
    drawn = torch.multinomial(p.detach().exp(), 1, generator=generator)
    return -p.gather(-1, drawn).sum()


@dataclass(slots=True)
class _Watching:
    """What the linears of a block have seen; `mask` is that of the batch that goes back."""

    linears: dict[str, Seen]
    mask: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def _watched(block: nn.Module, path: str, model: Model) -> Iterator[_Watching]:
    """While it is entered, what goes through each linear of a block is noted, forward and backward."""
    seen = _Watching({})
    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in model.linears_of(path):
        linear = block.get_submodule(name.removeprefix(f"{path}.").removesuffix(".weight"))
        seen.linears[name] = one = Seen()

        def note(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, one: Seen = one) -> None:
            X = args[0].detach()

            def back(gradient: Tensor) -> None:
                one.inputs.append(_real(X, seen.mask))
                one.gradients.append(_real(gradient, seen.mask))

            out.register_hook(back)

        handles.append(linear.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _real(X: Tensor, mask: Tensor) -> Float[Tensor, "t width"]:
    """The rows of real tokens; an expert's rows are some tokens, all of them real enough."""
    rows = X.flatten(0, -2)
    return rows[mask.flatten()] if len(rows) == mask.numel() else rows
