"""Which modules of a student follow which of its teacher, and how far they are from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pocketsize.distillation.feature import (
    as_heads,
    cosine_distance,
    hidden_distance,
    layer_map,
    relation_distance,
)
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.models.model import Model
from pocketsize.models.taps import tapped

# Relations of which of queries, keys and values, as their places among the three.
ATTENTION, RELATIONS = ((0, 1),), ((0, 0), (1, 1), (2, 2))


@dataclass(frozen=True, slots=True)
class Weights:
    """What each loss beside the divergence counts; 0 for not at all.

    `hidden` and `cosine` compare what blocks give, every block of the student with one of the teacher;
    `attention` compares softmax(Q K^T) of the same blocks (before rotation, where a family rotates),
    `relations` Q Q^T, K K^T and V V^T of the last block of each (MiniLM v2), cut into `heads` heads, None
    for the teacher's own number.
    """

    hidden: float = 0.0
    cosine: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    heads: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "cosine", "attention", "relations"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be a number from 0 upwards, got {getattr(self, name)}")
        if self.heads is not None and self.heads < 1:
            raise UsageError(f"heads must be at least 1, got {self.heads}")

    def __bool__(self) -> bool:
        return any((self.hidden, self.cosine, self.attention, self.relations))


class Features(nn.Module):
    """The losses inside two models; its parameters are projections that only the training has.

    Where the widths differ, hidden states of the student are projected to the teacher's width.
    """

    def __init__(self, student: Model, teacher: Model, weights: Weights) -> None:
        super().__init__()
        require_places(student, teacher, weights)
        self.weights = weights
        mapped = layer_map(len(student.blocks), len(teacher.blocks))
        self.blocks = [(s, teacher.blocks[i]) for s, i in zip(student.blocks, mapped, strict=True)]
        wide = int(student.config.hidden_size), int(teacher.config.hidden_size)
        compares = bool(weights.hidden or weights.cosine)
        self.projections = nn.ModuleList(
            [_projection(*wide) for _ in self.blocks] if compares and wide[0] != wide[1] else []
        )
        self.heads = _heads(teacher, weights)
        self.attends = [_attending(m) for m in (student, teacher)] if self._relates else []

    @property
    def _relates(self) -> bool:
        return bool(self.weights.attention or self.weights.relations)

    def paths(self, which: int) -> list[str]:
        """What has to be tapped of the student (0) or the teacher (1)."""
        found = [pair[which] for pair in self.blocks] if self.weights.hidden or self.weights.cosine else []
        return found + [f"{block}.{name}" for block in self._related(which) for name in self.attends[which]]

    def distance(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Bool[Tensor, "n s"]
    ) -> Float[Tensor, ""]:
        """The weighted sum of the distances; each is a mean over the blocks that are compared."""
        total = torch.zeros((), device=mask.device)
        count = len(self.blocks)
        for i, (mine, theirs) in enumerate(self.blocks):
            if mine not in student:
                break
            total = total + self.distance_of(i, student[mine].float(), teacher[theirs].float(), mask) / count
        if self.weights.attention:
            total = total + self.weights.attention * self._relation(student, teacher, mask, ATTENTION)
        if self.weights.relations:
            total = total + self.weights.relations * self._relation(student, teacher, mask, RELATIONS)
        return total

    def distance_of(self, block: int, x: Tensor, y: Tensor, mask: Bool[Tensor, "n s"]) -> Float[Tensor, ""]:
        """The weighted distances of what one block of each gives."""
        x, total = (
            self.projections[block](x) if len(self.projections) else x,
            torch.zeros((), device=mask.device),
        )
        if self.weights.hidden:
            total = total + self.weights.hidden * hidden_distance(x, y, mask)
        if self.weights.cosine:
            total = total + self.weights.cosine * cosine_distance(x, y, mask)
        return total

    def _related(self, which: int) -> list[str]:
        """The blocks whose queries, keys and values are compared: all for attention, else the last."""
        if not self._relates:
            return []
        return [pair[which] for pair in (self.blocks if self.weights.attention else self.blocks[-1:])]

    def _relation(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        mask: Bool[Tensor, "n s"],
        pairs: tuple[tuple[int, int], ...],
    ) -> Float[Tensor, ""]:
        blocks = self.blocks if pairs is ATTENTION else self.blocks[-1:]
        found = []
        for mine, theirs in blocks:
            x, y = (
                [as_heads(taps[f"{block}.{name}"].float(), self.heads) for name in names]
                for taps, block, names in zip((student, teacher), (mine, theirs), self.attends, strict=True)
            )
            found += [relation_distance((x[a], x[b]), (y[a], y[b]), mask) for a, b in pairs]
        return torch.stack(found).mean()


def require_places(student: Model, teacher: Model, weights: Weights) -> None:
    """Refuse losses that the two models have no place for."""
    blocks = len(student.blocks), len(teacher.blocks)
    if weights and blocks[0] > blocks[1]:
        raise UnsupportedError(
            f"a student of {blocks[0]} blocks cannot follow a teacher of {blocks[1]} block by block; keep "
            "fewer blocks (layers), or leave hidden, cosine, attention, relations and progressive at 0"
        )
    if not weights.attention and not weights.relations:
        return
    heads = _heads(teacher, weights)
    for model in (student, teacher):
        names = _attending(model)
        widths = {model.matrix_shape(f"{model.blocks[0]}.{name}.weight")[0] for name in names}
        if weights.attention and len(widths) > 1:
            raise UnsupportedError(
                "attention: this family shares keys between queries (grouped queries); use relations"
            )
        if odd := [width for width in widths if width % heads]:
            raise UsageError(
                f"heads: {heads} do not divide a width of {odd[0]} ({model.config.model_type}); "
                "give a number that divides both models' queries, keys and values"
            )


@contextmanager
def followed(
    features: Features | None, *modules: nn.Module
) -> Iterator[Callable[[Bool[Tensor, "n s"]], Float[Tensor, ""] | float]]:
    """What `features` make of the forward passes of student and teacher inside the block, once both ran.

    Without features that is nothing.
    """
    if features is None:
        yield lambda mask: 0.0
        return
    with ExitStack() as stack:
        taps = [stack.enter_context(tapped(module, features.paths(i))) for i, module in enumerate(modules)]
        yield lambda mask: features.distance(taps[0], taps[1], mask)


def _attending(model: Model) -> tuple[str, ...]:
    """Queries, keys and values of a block."""
    names = next((group.names for group in model.arch.groups if group.attends), ())
    if len(names) != 3:
        raise UnsupportedError(
            f"attention and relations: {model.config.model_type} keeps queries, keys and values in one "
            "matrix; use hidden"
        )
    return names


def _heads(teacher: Model, weights: Weights) -> int:
    """Into how many heads relations are cut."""
    return weights.heads or int(teacher.config.num_attention_heads)


def _projection(narrow: int, wide: int) -> nn.Linear:
    layer = nn.Linear(narrow, wide, bias=False)
    nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return layer
