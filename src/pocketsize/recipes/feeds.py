"""What feeds a linear can take factors of its inputs: a norm, or the linear before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.models.batches import HELD_OUT
from pocketsize.models.model import Model
from pocketsize.models.walk import Site
from pocketsize.recipes.record import Finding
from pocketsize.recipes.step import Unit


def require_feeds(kind: str, model: Model) -> None:
    """Refuse a family in which no linear is fed by what can take its scales."""
    if all(group.fed_by is None for group in model.arch.groups):
        raise UnsupportedError(
            f"{model.folder}: {kind}: in the family {model.config.model_type} nothing before a linear can "
            "take its scales; use step gptq"
        )


def few_windows(windows: int) -> Iterator[Finding]:
    """A finding where no window is left to judge scales that others suggest."""
    if windows < HELD_OUT:
        said = f"every {HELD_OUT}th calibration window judges scales; of {windows} none does"
        yield Finding("few-windows", f"{said}: nothing was scaled; give {HELD_OUT} windows or more", "")


@dataclass(frozen=True, slots=True)
class Feed:
    """What feeds a site: a norm or a linear; which of its outputs each input is; what they can take."""

    path: str
    inputs: Int64[Tensor, "in"]
    most: Float[Tensor, "fed"]


def feed_of(site: Site, unit: Unit, model: Model) -> Feed | None:
    """What can take the scales of a site; None where nothing can."""
    if site.fed_by is None:
        return None
    columns, own = site.weights[0].shape[1], unit.weights.get(f"{site.fed_by}.weight")
    each = torch.arange(columns)
    if own is None:
        if f"{site.fed_by}.weight" in model.linears_of(site.block):
            return None  # a linear that an override leaves as it is
        return Feed(site.fed_by, each, torch.full((columns,), float("inf")))
    rows = len(own.codes)
    if columns != rows:  # several query heads read one head of values
        width = model.head_width
        if columns % rows or rows % width:
            return None
        each = each // width // (columns // rows) * width + each % width
    return Feed(site.fed_by, each, own.most)


def fold(feed: Feed, s: Float[Tensor, "fed"], unit: Unit, model: Model) -> None:
    """Divide what feeds a site by its scales: a quantized linear by rows, a norm, and their biases."""
    name, bias = f"{feed.path}.weight", f"{feed.path}.bias"
    if name in unit.weights:
        unit.weights[name] = unit.weights[name].divided(s)
    else:
        unit.changed[name] = model.original(name) / s
    if bias in model.checkpoint.entries:
        unit.changed[bias] = model.original(bias) / s
