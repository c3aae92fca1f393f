"""Per-layer errors arranged for a plot: one panel for each kind of linear, one column for each block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pocketsize.recipes.record import LayerReport

MOST_PANELS = 16
MOST_COLUMNS = 48


@dataclass(frozen=True, slots=True)
class Column:
    """One block, or several neighbours where a model has more blocks than a plot has room for.

    `error` and `rtn_error` are geometric means over its layers, `low` and `high` the range of `error`.
    """

    first: int
    last: int
    error: float
    rtn_error: float
    low: float
    high: float
    layers: int


@dataclass(frozen=True, slots=True)
class Panel:
    """One kind of linear through all blocks; `bits` are the widths that occur."""

    kind: str
    bits: tuple[int, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A step's layers, placed: panels, layers outside the blocks, and how many kinds had no room."""

    panels: tuple[Panel, ...]
    outside: tuple[LayerReport, ...]
    left_out: int
    last_block: int
    low: float
    high: float


def layout(layers: Sequence[LayerReport]) -> Layout:
    """Panels of the layers with finite errors; `low` and `high` bound every positive error shown."""
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
    outside: list[LayerReport] = []
    for layer in layers:
        block, kind = place(layer.name)
        if block is None:
            outside.append(layer)
        elif math.isfinite(layer.error) and math.isfinite(layer.rtn_error):
            kinds.setdefault(kind, []).append((block, layer))
    last_block = max((b for members in kinds.values() for b, _ in members), default=0)
    shown = list(kinds.items())[:MOST_PANELS]
    panels = tuple(_panel(kind, members, last_block) for kind, members in shown)
    errors = [e for p in panels for c in p.columns for e in (c.low, c.high, c.rtn_error) if e > 0]
    low, high = (min(errors), max(errors)) if errors else (1e-3, 1e-2)
    return Layout(panels, tuple(outside), len(kinds) - len(shown), last_block, low, high)


def place(name: str) -> tuple[int | None, str]:
    """The block a layer stands in and its kind within blocks: `12, self_attn.q_proj`.

    Experts of one block are one kind: later numbers in the name become a star.
    """
    name = name.removesuffix(".weight")
    found = re.search(r"(?:^|\.)(\d{1,6})\.(.+)$", name)
    if found is None:
        return None, name
    return int(found[1]), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", found[2])


def _panel(kind: str, members: list[tuple[int, LayerReport]], last_block: int) -> Panel:
    per_column = math.ceil((last_block + 1) / MOST_COLUMNS)
    bins: dict[int, list[tuple[int, LayerReport]]] = {}
    for block, layer in members:
        bins.setdefault(block // per_column, []).append((block, layer))
    columns = []
    for i in sorted(bins):
        errors = [layer.error for _, layer in bins[i]]
        columns.append(
            Column(
                first=min(block for block, _ in bins[i]),
                last=max(block for block, _ in bins[i]),
                error=_geometric_mean(errors),
                rtn_error=_geometric_mean(layer.rtn_error for _, layer in bins[i]),
                low=min(errors),
                high=max(errors),
                layers=len(errors),
            )
        )
    return Panel(kind, tuple(sorted({layer.bits for _, layer in members})), tuple(columns))


def _geometric_mean(values: Iterable[float]) -> float:
    """The mean on the plot's log axis; zero as soon as one value is."""
    values = list(values)
    if min(values) <= 0:
        return 0.0
    return math.exp(math.fsum(math.log(v) for v in values) / len(values))
