"""Gates of a model, calibrated on text: which numbers they decide by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pocketsize.models.backward import Ends, Seen, backward_walk
from pocketsize.models.gates import gated_groups, head_path, mlp_of, sites, total_work
from pocketsize.models.model import Model
from pocketsize.models.skeleton import skeleton
from pocketsize.models.skipping import require_room
from pocketsize.pruning.gate import (
    Gates,
    budget_level,
    fit_factor,
    quantile_threshold,
    sensitivity,
    thresholds,
    token_factor,
)

# Scores of each gate that are kept, and tokens that tell what the head's inputs are worth.
KEPT, HEADS = 65536, 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """What gates are to choose by.

    `kind` is `inputs` or `channels`; `score` says whether they leave out what costs least (`sensitivity`)
    or what is smallest (`magnitude`), `head` whether the head's inputs have gates too,
    `tokens` whether those of `inputs` ask how much a token has to lose.
    """

    kind: str
    score: str = "sensitivity"
    head: bool = True
    tokens: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """What calibration text tells of one gate: scores of what passed, and all operations it could save.

    `weights` turn squared magnitudes into scores, for each operation that one of them saves: `work`.
    `line` tells how much a token has to lose, here and at the places behind that have none.
    """

    scores: Float[Tensor, "*n"]
    price: float
    work: float
    weights: Float[Tensor, "n"]
    line: Float[Tensor, "n+1"] | None = None


def gauged(
    model: Model,
    choices: Sequence[Choice],
    ids: Int64[Tensor, "n s"],
    mask: Bool[Tensor, "n s"],
    *,
    seed: int = 0,
) -> list[dict[str, Place]]:
    """The gates of each choice with what this text tells of them, in running order; one walk for all.

    What leaving something out costs is told by the model's Fisher information: half of the squared
    gradient of the likelihood of tokens it drew itself, times the square of what is missing, is what KL
    rises by, to second order. Gradients come block by block, one block in memory at a time.
    """
    for choice in choices:
        sites(model, choice.kind)  # refuses what cannot have them
    later = (mask.long().cumsum(1) > 1)[mask]
    readers = [_Reader(model, choice, later) for choice in choices]
    found: list[dict[str, Place]] = [{} for _ in choices]
    for path, seen in backward_walk(model, ids, mask, seed=seed):
        for reader, places in zip(readers, found, strict=True):
            if not isinstance(seen, Ends):
                places |= reader.block(path, seen)
            elif reader.choice.kind == "inputs" and reader.choice.head:
                places[head_path(model)] = _head_place(model, seen, reader.choice)
    order = {name: i for i, name in enumerate(model.linears)}
    return [{p: v for p, v in sorted(one.items(), key=lambda item: _rank(item[0], order))} for one in found]


def _rank(path: str, order: Mapping[str, int]) -> int:
    """Where a gate stands among the linears; the head comes last."""
    own = (i for name, i in order.items() if name == f"{path}.weight" or name.startswith(f"{path}."))
    return min(own, default=len(order))


def settled(
    model: Model, kind: str, places: Mapping[str, Place], *, save: float, length: int, spread: str = "global"
) -> Gates:
    """Gates that save this share of all operations of windows of this length on the text they were gauged by.

    `spread` says whether places that can spare more save more (`global`), or each the same share (`uniform`).
    """
    budget, prices = save * total_work(model, length), [place.price for place in places.values()]
    require_room(budget, sum(prices))
    level = budget_level([place.scores for place in places.values()], prices, budget)
    values: dict[str, Tensor] = {}
    for path, place in places.items():
        own = level if spread == "global" else quantile_threshold(place.scores, budget / sum(prices))
        values[path] = thresholds(place.weights, max(own, 0.0), place.work)
    lines = {f"{path}:line": place.line for path, place in places.items() if place.line is not None}
    return Gates(kind, values, None, lines)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads what a backward walk has seen of a block; `later` marks rows that are no text's first token."""

    model: Model
    choice: Choice
    later: Bool[Tensor, "t"]

    def block(self, path: str, seen: Mapping[str, Seen]) -> dict[str, Place]:
        """The gates of a block."""
        mlp = mlp_of(self.model)
        if self.choice.kind == "channels" and mlp is not None:
            return {f"{path}.{mlp}": self._channels(f"{path}.{mlp}", seen)}
        every = gated_groups(self.model)
        groups = {first: names for first, names in every.items() if first.startswith(f"{path}.")}
        if self.choice.kind == "channels":
            groups = dict([list(groups.items())[-1]])
            return {first: self._before(first, names, seen)[0] for first, names in groups.items()}
        return self._told_apart({first: self._before(first, names, seen) for first, names in groups.items()})

    def _told_apart(self, found: Mapping[str, tuple[Place, Tensor, Tensor]]) -> dict[str, Place]:
        """The places of a block; with a line at the first, scores are those of each token's own weight."""
        places = {path: place for path, (place, _, _) in found.items()}
        if self.choice.score != "sensitivity" or not self.choice.tokens:
            return places
        first = next(iter(found))
        relative = torch.stack([own for _, _, own in found.values()]).mean(0)
        values = fit_factor(found[first][1], relative)
        factor = token_factor(values, found[first][1]).square().cpu()
        for path, (place, x, _) in found.items():
            places[path] = replace(place, scores=place.scores * factor[:: _step(x)])
        places[first] = replace(places[first], line=values.cpu())
        return places

    def _before(
        self, first: str, names: Sequence[str], seen: Mapping[str, Seen]
    ) -> tuple[Place, Tensor, Tensor]:
        """A place, what passed there, and what each token had to lose there, relative to the mean."""
        x = self._rows(seen[f"{names[0]}.weight"].joined()[0])
        slopes, outputs = torch.zeros_like(x), 0
        for name in names:
            W = self._matrix(name).to(x.device)
            slopes += self._rows(seen[f"{name}.weight"].joined()[1]) @ W
            outputs += len(W)
        weights = sensitivity(x, slopes)
        lost = slopes.square() / (2 * weights).clamp_min(1e-30)
        relative = lost[:, weights > 0].mean(1)
        return self._place(x, weights, 2.0 * outputs), x, relative

    def _channels(self, mlp: str, seen: Mapping[str, Seen]) -> Place:
        """The channels of an MLP, by what its gate says of them."""
        gate, up, down = (f"{mlp}.{end}" for end in ("gate_proj", "up_proj", "down_proj"))
        x = self._rows(seen[f"{gate}.weight"].joined()[0])
        a, u = _activation(self.model, mlp)(self._out(gate, x)), self._out(up, x)
        D = self._matrix(down).to(x.device)
        slopes = self._rows(seen[f"{down}.weight"].joined()[1]) @ D * u
        return self._place(a, sensitivity(a, slopes), 2.0 * (x.shape[1] + len(D)))

    def _place(self, x: Tensor, weights: Tensor, work: float) -> Place:
        return _place(x, weights, work, self.choice)

    def _rows(self, x: Tensor) -> Tensor:
        return x[self.later.to(x.device)].float()

    def _matrix(self, path: str) -> Tensor:
        name = f"{path}.weight"
        return self.model.as_stored(name, self.model.weight(name))

    def _out(self, path: str, x: Tensor) -> Tensor:
        y = x @ self._matrix(path).to(x.device).T
        bias = f"{path}.bias"
        return y + self.model.weight(bias).to(x.device) if bias in self.model.checkpoint.entries else y


def _place(x: Float[Tensor, "t n"], weights: Float[Tensor, "n"], work: float, choice: Choice) -> Place:
    """What passed, as scores of some tokens."""
    weights = weights if choice.score == "sensitivity" else torch.ones_like(weights)
    rows = x[:: _step(x)]
    return Place((rows.square() * weights / work).cpu(), work * x.shape[1], work, weights.cpu())


def _step(x: Tensor) -> int:
    """Of how many tokens one is kept."""
    return max(1, x.numel() // KEPT)


def _head_place(model: Model, seen: Ends, choice: Choice) -> Place:
    """The head's inputs. What a missing one costs is known in closed form: the variance of its column.

    d2 KL / dx_i^2 = sum_v p_v W_vi^2 - (sum_v p_v W_vi)^2
    """
    x = torch.cat([rows[1:] for rows in seen.hidden]).float()
    W = model.weight(model.ends[-1]).to(x.device)
    asked = x[:: max(1, len(x) // HEADS)]
    squares, found = W.square(), list[Tensor]()
    for rows in asked.split(64):
        p = (rows @ W.T).softmax(-1)
        found.append(p @ squares - (p @ W).square())
    costs = torch.cat(found)
    weights = 0.5 * costs.mean(0)
    place = _place(x, weights, 2.0 * len(W), choice)
    if choice.score != "sensitivity" or not choice.tokens:
        return place
    values = fit_factor(asked, (costs / (2 * weights).clamp_min(1e-30)).mean(1))
    factor = token_factor(values, x[:: _step(x)]).square().cpu()
    return replace(place, scores=place.scores * factor, line=values.cpu())


def _activation(model: Model, path: str) -> Callable[[Tensor], Tensor]:
    return cast(Callable[[Tensor], Tensor], skeleton(model).get_submodule(path).get_submodule("act_fn"))
