"""Gates that leave out halves of blocks, or all blocks behind one, calibrated on text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.errors import UsageError
from pocketsize.models.body import body_of
from pocketsize.models.calls import capture, run_block
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.exits import LAST_NORM, behind, exit_cost, exit_state, unit
from pocketsize.models.exits import confidence as confidence_at
from pocketsize.models.gates import Work, attention_of, head_path, mlp_of, sites, total_work, work_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import fill, skeleton
from pocketsize.models.stream import without_blocks
from pocketsize.pruning.gate import (
    Gates,
    agreed_level,
    budget_level,
    fit_line,
    fit_map,
    line,
    quantile_threshold,
    saving_level,
)

# Positions whose logits are in memory at once.
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Passed:
    """Rows of real tokens around a block: what it read, what it gave, and what parts of it read and gave."""

    before: Float[Tensor, "t n"]
    after: Float[Tensor, "t n"]
    parts: dict[str, tuple[Float[Tensor, "t n"], Float[Tensor, "t n"]]]


@torch.no_grad()
def passing(
    model: Model, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"], parts: Sequence[str] = ()
) -> Iterator[tuple[str, Passed]]:
    """What passes each block, in running order; one block in memory at a time."""
    device = working_device()
    module = skeleton(model, device)
    calls = capture(module, model, ids.to(device), mask.to(device))
    for path in model.blocks:
        block = module.get_submodule(path)
        fill(module, path, lambda name: model.weight(name).to(forward_dtype()), device)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {part: [] for part in parts}
        handles = [
            block.get_submodule(part).register_forward_hook(_noting(rows), with_kwargs=True)
            for part, rows in seen.items()
        ]
        rows: list[tuple[Tensor, Tensor]] = []
        for call in calls:
            before = call.hidden.clone()
            call.hidden = run_block(block, call)
            rows.append((before[call.mask].float(), call.hidden[call.mask].float()))
        for handle in handles:
            handle.remove()
        own = {
            part: _joined(
                [(x[c.mask].float(), y[c.mask].float()) for (x, y), c in zip(r, calls, strict=True)]
            )
            for part, r in seen.items()
        }
        yield path, Passed(*_joined(rows), own)
        block.to("meta")


def _noting(rows: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """A hook that notes what a part read and gave."""

    def hook(_: nn.Module, args: Any, options: Any, out: Any) -> None:
        x = args[0] if args else options["hidden_states"]
        rows.append((x, out[0] if isinstance(out, tuple) else out))

    return hook


def _joined(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*rows, strict=True)
    return torch.cat(first), torch.cat(second)


def skipped_halves(
    model: Model, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"], *, save: float, spread: str = "global"
) -> Gates:
    """Gates of kind `layers` that save this share of all operations on this text.

    A half (attention or MLP) that gives y where h passes by changes it by 1 - cos(h, h + y) (ShortGPT,
    arXiv:2403.03853, section 3.1). A line through what the half reads tells the logarithm of that for each
    operation saved, and tokens of which it tells little leave the half out.
    """
    sites(model, "layers")  # refuses blocks without halves
    halves = cast(tuple[str, str], (attention_of(model), mlp_of(model)))
    work, later = work_of(model), (mask.long().cumsum(1) > 1)[mask].to(working_device())
    lines: dict[str, Tensor] = {}
    told: list[Tensor] = []
    prices: list[float] = []
    for path, passed in passing(model, ids, mask, halves):
        h = passed.before
        for half in halves:
            x, y = passed.parts[half]
            change = (1 - F.cosine_similarity(h, h + y, dim=-1))[later]
            h = h + y
            ops = half_work(f"{path}.{half}", work)
            told_of = (change.clamp_min(1e-6) / ops).log()
            lines[f"{path}.{half}"] = fit_line(x[later], told_of, ridge=1.0).cpu()
            told.append(line(lines[f"{path}.{half}"], x[later].cpu()))
            prices.append(float(ops))
    budget = save * total_work(model, ids.shape[1])
    require_room(budget, sum(prices))
    level = budget_level(told, prices, budget)
    values: dict[str, Tensor] = {}
    for (path, slopes), tells in zip(lines.items(), told, strict=True):
        own = level if spread == "global" else quantile_threshold(tells, budget / sum(prices))
        values[path] = torch.cat([slopes[:-1], slopes[-1:] - own - 1e-6 * abs(own)])
    return Gates("layers", values)


def half_work(path: str, work: Work) -> int:
    """What is saved where a half of a block is left out; keys and values are always made."""
    return work.of(path) - work.of(f"{path}.k_proj") - work.of(f"{path}.v_proj")


def require_room(budget: float, most: float) -> None:
    """Refuse to save what no gate stands before."""
    if budget >= most:
        raise UsageError(
            f"gate: save: these gates stand before {most / 1e6:.3g} million operations of a token, and "
            f"{budget / 1e6:.3g} million are to be saved; ask for less, or use another kind"
        )


@dataclass(frozen=True, slots=True)
class Leave:
    """How tokens leave early: behind which blocks, how sure, and what the last block would have given.

    `save` is the share of all operations to be saved, or else `agree` that of tokens for which the model
    goes on saying what it says. `rank` is that of the map from a state to the last one; 0: none.
    """

    exits: tuple[int, ...]
    confidence: str = "probe"
    save: float | None = None
    agree: float | None = None
    rank: int = 64


def early_exits(model: Model, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"], leave: Leave) -> Gates:
    """Gates of kind `exit`. Maps and lines are fitted on every other window, the level on those between."""
    sites(model, "exit")  # refuses what cannot leave
    paths = [model.blocks[i] for i in leave.exits]
    states: dict[str, Passed] = {}
    for path, passed in passing(model, ids, mask):
        if path in paths or path == model.blocks[-1]:
            states[path] = passed
    first = (torch.arange(len(mask)) % 2 == 0)[:, None].expand_as(mask)[mask].to(working_device())
    judged = ~first & (mask.long().cumsum(1) > 1)[mask].to(working_device())
    ends = without_blocks(model, model.weight)
    last, said = states[model.blocks[-1]].after, _Reader(ends, model)
    top = said.top(last)
    maps: dict[str, Tensor] = {}
    for path in paths:
        h = states[path].after
        if leave.rank:
            found = fit_map(h[first], last[first], min(leave.rank, h.shape[1]))
            maps |= {f"{path}:{end}": part for end, part in zip(("in", "out", "bias"), found, strict=True)}
    bare = Gates("exit", dict.fromkeys(paths, torch.zeros(1)), leave.confidence, maps)
    agrees = {path: said.top(exit_state(bare, path, states[path].after)) == top for path in paths}
    if leave.confidence == "probe":
        for path in paths:
            x = unit(states[path].after[first])
            maps[f"{path}:probe"] = fit_line(x, agrees[path][first].float(), ridge=1.0)
        bare = Gates("exit", bare.values, leave.confidence, maps)
    sure = torch.stack([said.sure(bare, path, states[path], judged) for path in paths]).cpu()
    right = torch.stack([agrees[path][judged] for path in paths]).cpu()
    level = _level(model, leave, bare, sure, right, ids.shape[1])
    maps = {name: value.cpu() for name, value in maps.items()}
    return Gates("exit", dict.fromkeys(paths, torch.tensor([level])), leave.confidence, maps)


def _level(model: Model, leave: Leave, gates: Gates, sure: Tensor, right: Tensor, length: int) -> float:
    """How sure a token must be."""
    if leave.agree is not None:
        return agreed_level(sure, right, leave.agree)
    work, width = work_of(model), int(model.config.hidden_size)
    seen = work.attention * (length + 1) / 2
    last = len(model.blocks) - 1
    saves = [behind(work, model.blocks, i) + (last - i) * seen for i in leave.exits]
    asks = [float(exit_cost(gates, path, width)) for path in gates.values]
    reads = float(work.head) if leave.confidence in ("probability", "entropy") else 0.0
    wished = cast(float, leave.save) * total_work(model, length)
    level = saving_level(sure, torch.tensor(saves), torch.tensor(asks), reads, wished)
    if level == float("inf"):
        raise UsageError(
            f"gate: save: {leave.save:g}: no level of {leave.confidence} saves as much behind blocks "
            f"{', '.join(map(str, leave.exits))}; ask for less, or leave earlier"
        )
    return level


@dataclass(frozen=True, slots=True)
class _Reader:
    """What a model's last norm and head say of states."""

    module: nn.Module
    model: Model

    def top(self, h: Float[Tensor, "t n"]) -> Int64[Tensor, "t"]:
        """The token that comes first."""
        return torch.cat([self._logits(rows).argmax(-1) for rows in h.split(CHUNK)])

    def sure(self, gates: Gates, path: str, passed: Passed, rows: Bool[Tensor, "t"]) -> Float[Tensor, "t"]:
        """How sure these rows are behind a block."""
        pairs = zip(passed.before[rows].split(CHUNK), passed.after[rows].split(CHUNK), strict=True)
        found: list[Tensor] = []
        for before, h in pairs:
            state = exit_state(gates, path, h)
            found.append(confidence_at(gates, path, before, h, lambda s=state: self._logits(s))[0])
        return torch.cat(found)

    def _logits(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            norm = body_of(self.module).get_submodule(LAST_NORM)
            return self.module.get_submodule(head_path(self.model))(norm(h))
