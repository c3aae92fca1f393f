"""Every tensor of a model, what it is for, and what may be compressed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pocketsize.models.model import Model

ROLES = ("compressible", "embedding", "head", "norm", "bias", "other")
GROUPS = (128, 96, 64, 32)


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    bytes: int
    role: str

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Total:
    """What the tensors of one role add up to."""

    role: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """All tensors in the order of the files, totals by role, and the group sizes that fit.

    `groups` holds those of 128, 96, 64 and 32 that divide every width that would be compressed;
    the first is the default.
    """

    rows: tuple[Row, ...]
    totals: tuple[Total, ...]
    groups: tuple[int, ...]
    tied: bool


def ledger(model: Model) -> Ledger:
    """The ledger of a model as it is on disk."""
    targets = set(model.linears)
    rows = tuple(
        Row(
            name,
            e.shape,
            e.packed_as or e.dtype,
            e.file,
            e.end - e.begin,
            _role(model, name, e.shape, targets),
        )
        for name, e in model.checkpoint.entries.items()
    )
    widths = {model.matrix_shape(row.name)[1] for row in rows if row.role == "compressible"}
    groups = tuple(g for g in GROUPS if widths and all(width % g == 0 for width in widths))
    totals = tuple(_total(role, rows) for role in ROLES if any(row.role == role for row in rows))
    return Ledger(rows, totals, groups, model.tied)


def _total(role: str, rows: tuple[Row, ...]) -> Total:
    own = [row for row in rows if row.role == role]
    return Total(role, len(own), sum(r.parameters for r in own), sum(r.bytes for r in own))


def _role(model: Model, name: str, shape: tuple[int, ...], targets: set[str]) -> str:
    if name in targets:
        return "compressible"
    if name == model.arch.embedding:
        return "embedding"
    if name == model.arch.head:
        return "head"
    if "norm" in name.lower() or ".ln_" in name:
        return "norm"
    if name.endswith(".bias") and len(shape) == 1:
        return "bias"
    return "other"
