"""Which heads, channels and tokens of a teacher its student keeps, and how shared keys are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(slots=True)
class Importance:
    """How much each slice of an activation carries; a slice is `width` neighbouring channels.

        I_j = sqrt( sum over texts ( mean over tokens |x_j| )^2 ),     |x_j| the length of slice j

    Minitron (arXiv:2407.14679, section 3): L2 over the batch of the mean over the sequence. Squares are
    summed in float64, so texts may come in any order and in any batches.
    """

    total: Float[Tensor, "slices"]
    width: int = 1

    @classmethod
    def zeros(cls, slices: int, width: int = 1) -> Importance:
        """Of so many slices, nothing seen yet."""
        return cls(torch.zeros(slices, dtype=torch.float64), width)

    def update(self, X: Float[Tensor, "n s channels"], mask: Bool[Tensor, "n s"]) -> None:
        """Add texts; padding does not count."""
        sizes = X.detach().float().unflatten(-1, (-1, self.width)).norm(dim=-1)
        means = (sizes * mask[..., None]).sum(1, dtype=torch.float64) / mask.sum(1).clamp_min(1)[:, None]
        self.total += means.square().sum(0).cpu()

    def value(self) -> Float[Tensor, "slices"]:
        """The importance of each slice."""
        return self.total.sqrt()


def summed(parts: Sequence[Float[Tensor, "slices"]]) -> Float[Tensor, "slices"]:
    """The importance of slices that several places share; each place counts alike, however large it is."""
    return torch.stack([part / part.mean().clamp_min(1e-30) for part in parts]).sum(0)


def added(parts: Sequence[Float[Tensor, "slices"]]) -> Float[Tensor, "slices"]:
    """The importance of slices that several places share, where its square is a cost: costs add up."""
    return torch.stack(list(parts)).square().sum(0).sqrt()


def best(importance: Float[Tensor, "slices"], count: int) -> list[int]:
    """The numbers of the most important slices, rising; of equal ones the first."""
    if not 0 < count <= len(importance):
        raise ValueError(f"{count} of {len(importance)} slices cannot be kept")
    order = importance.argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


@dataclass(frozen=True, slots=True)
class Heads:
    """The queries that stay, and for each key and value that is left the ones that it is the mean of."""

    queries: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...]


def kept_heads(importance: Float[Tensor, "heads"], keys: int, queries_left: int, keys_left: int) -> Heads:
    """Which queries stay of heads that share `keys` keys and values, evenly, and which keys become one.

    Where each key keeps as many queries as it had, whole groups go, the least important first. Else
    neighbouring keys become one, their mean (GQA, arXiv:2305.13245, section 2.1), and of the queries that
    then share it the most important stay: every key has as many queries as every other one.
    """
    heads = len(importance)
    if heads % keys or queries_left % keys_left:
        whole = (heads, keys) if heads % keys else (queries_left, keys_left)
        raise ValueError("{} heads cannot share {} keys and values evenly".format(*whole))
    if not 0 < queries_left <= heads or keys_left > keys:
        raise ValueError(
            f"{queries_left} heads on {keys_left} keys cannot be kept of {heads} on {keys}: those are fewer"
        )
    per, per_left = heads // keys, queries_left // keys_left
    if per == per_left:
        whole_groups = best(importance.reshape(keys, per).sum(1), keys_left)
        queries = [k * per + i for k in whole_groups for i in range(per)]
        return Heads(tuple(queries), tuple((k,) for k in whole_groups))
    if keys % keys_left:
        ways = [n for n in range(1, keys + 1) if keys % n == 0]
        raise ValueError(f"{keys} keys and values become {keys_left} of equal parts only if one of {ways}")
    merged = keys // keys_left
    if per_left > merged * per:
        raise ValueError(f"{keys_left} keys would need {per_left} queries each; they have {merged * per}")
    queries = []
    for k in range(keys_left):
        first = k * merged * per
        queries += [first + i for i in best(importance[first : first + merged * per], per_left)]
    return Heads(tuple(queries), tuple(tuple(range(k * merged, (k + 1) * merged)) for k in range(keys_left)))


def rows_of(slices: Sequence[int], width: int) -> list[int]:
    """The channels of slices that are `width` channels each."""
    return [j * width + i for j in slices for i in range(width)]


def pooled(W: Float[Tensor, "rows *columns"], keys: Sequence[Sequence[int]], width: int) -> Tensor:
    """The rows of shared keys or values: of each the mean of those it stands for."""
    parts = W.unflatten(0, (-1, width))
    return torch.cat([parts[list(group)].mean(0) for group in keys])
