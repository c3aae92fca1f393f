"""A model and what was cut from it, walked side by side: what each linear of the smaller one lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from greenlet import getcurrent
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.models.arch import Linears
from pocketsize.models.batches import HELD_OUT
from pocketsize.models.calls import Call, capture
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.models.shelf import Shelf
from pocketsize.models.skeleton import assign, fill, skeleton
from pocketsize.models.stream import hooked
from pocketsize.models.surgery import Selection, cut_outputs, norm_first, writers_of
from pocketsize.models.walk import Batch, keep, reached, require_finite, shelf_for, through
from pocketsize.pruning.heal import Residuals

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Pair:
    """A model, and a smaller one made of it: of the blocks with these numbers, each with these slices."""

    original: Model
    cut: Model
    blocks: tuple[int, ...]
    chosen: Selection = field(default_factory=Selection)

    @property
    def first(self) -> int:
        """The first block of the smaller model that lacks something; before it both are the same."""
        if self.chosen != Selection() or self.blocks[0] != 0:
            return 0
        return next((i for i, old in enumerate(self.blocks) if self.after(i) != old), len(self.blocks))

    def after(self, index: int) -> int:
        """The block of the original behind which it is where the smaller one is behind its block `index`."""
        return (*self.blocks, len(self.original.blocks))[index + 1] - 1


@dataclass(slots=True)
class Fit:
    """Linears of the smaller model that read the same tensor, stacked: what they read and what they lack.

    `weights` are float32, with the bias as the last column where there is one. Tokens of every fourth window
    are in `judge`, the others in `teach`. What is put into `changed` is what the rest of the walk sees.
    """

    block: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    weights: Float[Tensor, "out in"]
    biased: bool
    teach: Residuals
    judge: Residuals
    last: bool
    transposed: bool = False
    changed: Float[Tensor, "out in"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The weights and biases as they are now, by parameter name, as the family stores them."""
        found: dict[str, Tensor] = {}
        now = self.weights if self.changed is None else self.changed
        for name, part in zip(self.names, now.split(self.rows), strict=True):
            W = part[:, :-1] if self.biased else part
            found[name] = (W.T if self.transposed else W).contiguous()
            if self.biased:
                found[bias_of(name)] = part[:, -1].contiguous()
        return found


def bias_of(name: str) -> str:
    """The bias beside a weight."""
    return f"{name.removesuffix('.weight')}.bias"


@dataclass(slots=True)
class _Side:
    """One of both models: its module, and the batches in front of its next block."""

    model: Model
    module: nn.Module
    calls: list[Call]
    shelf: Shelf

    @classmethod
    def of(cls, model: Model, ids: Tensor, mask: Tensor) -> _Side:
        module = skeleton(model, ids.device)
        calls = capture(module, model, ids, mask)
        return cls(model, module, calls, shelf_for(model, calls))

    def fill(self, path: str, other: Weights | None = None) -> nn.Module:
        """The block, with its weights or with others instead of some."""
        new = other or {}

        def read(name: str) -> Tensor:
            return (new[name] if name in new else self.model.weight(name)).to(forward_dtype())

        fill(self.module, path, read, self.calls[0].hidden.device)
        return self.module.get_submodule(path)

    def through(self, path: str, other: Weights | None = None) -> None:
        """Run a block on all batches and let go of it."""
        block = self.fill(path, other)
        through(block, self.calls, self.shelf, path)
        self.leave(path)

    def among(self, numbers: Iterable[int]) -> None:
        """Run the blocks with these numbers on all batches."""
        for number in numbers:
            self.through(self.model.blocks[number])

    def leave(self, path: str) -> None:
        """Let go of a block that all batches are behind."""
        for number, call in enumerate(self.calls):
            require_finite(call.hidden, path, number)
        self.module.get_submodule(path).to("meta")


@torch.no_grad()
def lockstep(
    pair: Pair,
    input_ids: Int64[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
    *,
    finished: Callable[[str], Weights | None] = lambda block: None,
) -> Iterator[Fit]:
    """Visit the linears of the smaller model in running order, each with what it lacks beside the original.

    A linear that adds to what passes the blocks lacks what that lacks: the drift of all before it is its
    to make up for. Behind a block that others followed, which are gone, that is measured behind those. Every
    other linear lacks what the original's gives more than it does; where norms stand behind what is added,
    that is all of them. Experts, which are given other tokens than the original's, are not visited. Blocks
    for which `finished` returns weights are run with those, unvisited; so are those before the first cut.

    Forward passes run in `forward_dtype()`, sums in float32; padding counts nowhere.
    """
    device = working_device()
    ids, mask = input_ids.to(device), mask.to(device)
    whole, small = (_Side.of(model, ids, mask) for model in (pair.original, pair.cut))
    whole.among(range(pair.blocks[0]))
    for index, path in enumerate(small.model.blocks):
        done, old = finished(path), pair.blocks[index]
        if done is None and index >= pair.first:
            yield from _visit(whole, small, pair, index)
            continue
        whole.among(range(old, pair.after(index) + 1))
        if index < pair.first:
            for ours, theirs in zip(small.calls, whole.calls, strict=True):
                ours.hidden.copy_(theirs.hidden)
        else:
            small.through(path, done)


def _visit(whole: _Side, small: _Side, pair: Pair, index: int) -> Iterator[Fit]:
    """The linears of a block in running order; afterwards both models' batches are behind it."""
    old, path = whole.model.blocks[pair.blocks[index]], small.model.blocks[index]
    groups, driver = small.model.groups, getcurrent()
    visited = [group for group in groups if not small.model.arch.is_expert(group.names[0])]
    blocks = whole.fill(old), small.fill(path)
    firsts = [[block.get_submodule(group.names[0]) for group in visited] for block in blocks]
    rest = [call.hidden.clone() for call in small.calls]

    def wait(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        driver.switch((linear, args))

    def go_behind() -> None:
        _finish(theirs, whole, old)
        whole.among(range(pair.blocks[index] + 1, pair.after(index) + 1))

    with hooked([*firsts[0], *firsts[1]], wait):
        theirs = [Batch(blocks[0], call, whole.shelf) for call in whole.calls]
        ours = [Batch(blocks[1], call, small.shelf) for call in small.calls]
        for number, group in enumerate(visited):
            places = ((theirs, firsts[0], old, whole), (ours, firsts[1], path, small))
            asked, given = (
                [
                    _read(run, call, linears[number], where, group)
                    for run, call in zip(runs, side.calls, strict=True)
                ]
                for runs, linears, where, side in places
            )
            place = _Place(whole, small, pair, (old, path), group, number == len(visited) - 1)
            behind = place.writes and group is groups[-1]
            if behind:  # what it adds is measured behind the block
                asked.clear()
                go_behind()
            fit = place.gather(asked, given, rest)
            yield fit
            place.put(fit, given, rest)
            if place.last and not behind:
                go_behind()
        _finish(ours, small, path)


def _read(run: Batch, call: Call, linear: nn.Module, path: str, group: Linears) -> Float[Tensor, "b s in"]:
    """What the linears of a group read of a batch, which waits there; some read all texts as one matrix."""
    X = reached(run.go_on(), linear, path, group.names)[0]
    return X.view(*call.mask.shape, -1)


def _finish(runs: Sequence[Batch], side: _Side, path: str) -> None:
    """Run waiting batches on to the end of their block, and let go of it."""
    for run, call in zip(runs, side.calls, strict=True):
        keep(run.go_on(), call, path)
    side.leave(path)


@dataclass(frozen=True, slots=True)
class _Place:
    """Linears that read the same tensor, in a block of both models."""

    whole: _Side
    small: _Side
    pair: Pair
    paths: tuple[str, str]
    group: Linears
    last: bool

    @property
    def writes(self) -> bool:
        """Whether what they give is added to what passes the blocks."""
        return self.group.names[0] in writers_of(self.small.model)

    @property
    def norm_first(self) -> bool:
        """Whether a norm stands in front of each half of a block, not behind it."""
        return norm_first(self.small.model)

    def linears(self, side: int) -> list[nn.Module]:
        """Those of one of both models."""
        owner = (self.whole, self.small)[side].module
        return [owner.get_submodule(f"{self.paths[side]}.{name}") for name in self.group.names]

    def gather(self, asked: Sequence[Tensor], given: Sequence[Tensor], rest: list[Tensor]) -> Fit:
        """What they read and what they lack, over all batches; `rest` is what their output is added to."""
        linears, names = self.linears(1), tuple(f"{self.paths[1]}.{n}.weight" for n in self.group.names)
        biased = getattr(linears[0], "bias", None) is not None
        model = self.small.model
        W = [model.as_stored(name, model.weight(name)).to(given[0].device) for name in names]
        if biased:
            biases = [model.weight(bias_of(name)).to(given[0].device) for name in names]
            W = [torch.cat((A, b[:, None]), 1) for A, b in zip(W, biases, strict=True)]
        stacked = torch.cat(W)
        sums = [Residuals.zeros(stacked.shape[0], stacked.shape[1], stacked.device) for _ in range(2)]
        window = 0
        for i, X in enumerate(given):
            mask = self.small.calls[i].mask
            if not self.writes and not self.norm_first:
                rest[i] = X
            wanted, weight = self._wanted(i, asked[i] if asked else None, X, rest[i])
            R = wanted - torch.cat([_given(linear, X) for linear in linears], -1).float()
            held = (torch.arange(len(mask), device=mask.device) + window) % HELD_OUT == HELD_OUT - 1
            window += len(mask)
            X = torch.cat((X, X.new_ones(*X.shape[:-1], 1)), -1) if biased else X
            for part, rows in zip(sums, (mask & ~held[:, None], mask & held[:, None]), strict=True):
                part.update(X[rows], R[rows], None if weight is None else weight[rows])
        rows = tuple(len(A) for A in W)
        turned = model.arch.is_transposed(names[0])
        return Fit(self.paths[1], names, rows, stacked, biased, sums[0], sums[1], self.last, turned)

    def _wanted(self, i: int, asked: Tensor | None, X: Tensor, rest: Tensor) -> tuple[Tensor, Tensor | None]:
        """What they should give for a batch, and how much each token counts."""
        chosen, call = self.pair.chosen, self.whole.calls[i]
        if not self.writes:
            assert asked is not None
            names = [f"{self.paths[0]}.{name}.weight" for name in self.group.names]
            given = [_given(linear, asked) for linear in self.linears(0)]
            model = self.whole.model
            parts = [cut_outputs(model, n, Y, chosen) for n, Y in zip(names, given, strict=True)]
            return torch.cat(parts, -1).float(), None
        there = call.hidden if asked is None else call.hidden + _given(self.linears(0)[0], asked)
        if chosen.width is not None:
            there = there[..., list(chosen.width)]
        there, rest = there.float(), rest.float()
        if self.norm_first:  # tokens differ a thousandfold in size, and every norm divides that out
            return there - rest, 1 / there.square().mean(-1).clamp_min(_EPS)
        if self.last:  # behind the last norm: what goes into it is to come out as that
            norm = [part for part in self._block(1).modules() if isinstance(part, nn.LayerNorm)][-1]
            now = rest + _given(self.linears(1)[0], X)
            mean, spread = now.mean(-1, keepdim=True), now.std(-1, keepdim=True)
            gain = norm.weight.where(norm.weight.abs() > _EPS, torch.inf)
            there = mean + spread * (there - norm.bias) / gain
        return there - rest, None

    def _block(self, side: int) -> nn.Module:
        return (self.whole, self.small)[side].module.get_submodule(self.paths[side])

    def put(self, fit: Fit, given: Sequence[Tensor], rest: list[Tensor]) -> None:
        """Go on with the weights that the caller chose."""
        if fit.changed is not None:
            for name, T in fit.tensors().items():
                inside = name.removeprefix(f"{self.paths[1]}.")
                assign(self._block(1), inside, T.to(forward_dtype()))
        if self.writes and self.norm_first and not self.last:
            for i, X in enumerate(given):
                rest[i] += _given(self.linears(1)[0], X)


_EPS = 1e-6


def _given(linear: nn.Module, X: Tensor) -> Tensor:
    """What a linear makes of a tensor, past the hooks at which its batches wait."""
    return linear.forward(X)
