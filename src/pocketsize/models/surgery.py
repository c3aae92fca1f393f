"""A model made narrower: the slices of its tensors that stay, by the data of its family."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from pocketsize.distillation.slices import Heads, Importance, best, kept_heads, pooled, rows_of, summed
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.io.checkpoint import Checkpoint, Entry, Packed
from pocketsize.models.arch import Cuts
from pocketsize.models.model import Model
from pocketsize.models.packing import KEYS


@dataclass(frozen=True, slots=True)
class Sizes:
    """How wide a model is: query heads, keys and values, inner channels, channels, tokens."""

    heads: int
    kv_heads: int
    ffn: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The slices that stay: heads and inner channels of each block, channels of all, tokens.

    None: they all stay.
    """

    heads: tuple[Heads, ...] | None = None
    ffn: tuple[tuple[int, ...], ...] | None = None
    width: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None


def cuts_of(model: Model) -> Cuts:
    """What goes together in a family; refuses one for which nobody has said it."""
    if model.arch.cuts is None:
        raise UnsupportedError(
            f"student: it is not known which slices of a {model.config.model_type} model go together; leave "
            "out heads, kv_heads, ffn and hidden (`layers` works), or build one: family: llama, bert, ..."
        )
    return model.arch.cuts


def sizes_of(model: Model) -> Sizes:
    """How wide a model is."""
    config = model.config
    heads = int(config.num_attention_heads)
    keys = getattr(config, "num_key_value_heads", None) or heads
    ffn = getattr(config, model.arch.cuts.inner if model.arch.cuts else "intermediate_size")
    return Sizes(heads, int(keys), int(ffn), int(config.hidden_size), int(config.vocab_size))


def selection(
    model: Model,
    sizes: Sizes,
    importance: Mapping[str, Importance],
    tokens: Sequence[int] | None,
    *,
    together: Callable[[Sequence[Tensor]], Tensor] = summed,
) -> Selection:
    """The most important slices; `importance` has one for what each linear named by `watched` reads.

    `together` is what slices are worth that several places share.
    """
    cuts = model.arch.cuts
    found = Selection(tokens=None if tokens is None else tuple(tokens))
    if cuts is None:
        return found
    own = sizes_of(model)
    if (own.heads, own.kv_heads) != (sizes.heads, sizes.kv_heads):
        reader = cuts.reader(cuts.heads)
        each = [importance[f"{path}.{reader}"].value() for path in model.blocks]
        if cuts.per_head:  # one table for the heads of all blocks
            each = [together(each)] * len(each)
        made = [kept_heads(x, own.kv_heads, sizes.heads, sizes.kv_heads) for x in each]
        found = replace(found, heads=tuple(made))
    if own.ffn != sizes.ffn:
        reader = cuts.reader(cuts.ffn)
        kept = [best(importance[f"{path}.{reader}"].value(), sizes.ffn) for path in model.blocks]
        found = replace(found, ffn=tuple(tuple(one) for one in kept))
    if own.hidden != sizes.hidden:
        names = [f"{path}.{name}" for path in model.blocks for name in readers_of_width(model)]
        width = best(together([importance[name].value() for name in names]), sizes.hidden)
        found = replace(found, width=tuple(width))
    return found


def watched(model: Model, sizes: Sizes) -> dict[str, int]:
    """The linears whose inputs tell which slices matter, each with the width of a slice of them."""
    own, cuts = sizes_of(model), cuts_of(model)
    inside: dict[str, int] = {}
    if (own.heads, own.kv_heads) != (sizes.heads, sizes.kv_heads):
        inside[cuts.reader(cuts.heads)] = model.head_width
    if own.ffn != sizes.ffn:
        inside[cuts.reader(cuts.ffn)] = 1
    if own.hidden != sizes.hidden:
        inside |= dict.fromkeys(readers_of_width(model), 1)
    return {f"{path}.{name}": width for path in model.blocks for name, width in inside.items()}


def readers_of_width(model: Model) -> list[str]:
    """One linear of a block for each tensor of the model's width that is read: what a norm gives."""
    return [group.names[0] for group in model.groups if group.names[0] not in writers_of(model)]


def writers_of(model: Model) -> tuple[str, str]:
    """The linears of a block whose outputs are added to what passes it: behind attention, behind channels."""
    cuts = cuts_of(model)
    return cuts.reader(cuts.heads), cuts.reader(cuts.ffn)


def sides(model: Model, name: str) -> tuple[str | None, ...]:
    """What each side of a tensor has a slice for: heads, keys, ffn, width, tokens or head; None: none of it.

    `keys` are those of heads that share them; where every head has its own they are cut as queries are.
    """
    shape, arch, cuts = model.checkpoint.entries[name].shape, model.arch, model.arch.cuts
    if name in (arch.embedding, arch.head):
        return ("tokens", "width" if cuts else None)
    if cuts is None:
        return (None,) * len(shape)
    part = name.removesuffix(".weight").removesuffix(".bias")
    inside = re.match(rf"{re.escape(arch.blocks)}\.\d+\.(.*)$", part)
    if inside is None:
        if part in cuts.classes:
            return (None, "width")[: len(shape)]
        if len(shape) == 1 or part in cuts.around:
            return ("width",) * len(shape)
        return (None, "head" if part in cuts.per_head else "width")
    if inside[1] in cuts.fixed:
        return (None,) * len(shape)
    return tuple(_side(cuts, f"{inside[1]}:{end}") for end in ("out", "in")[: len(shape)])


def _side(cuts: Cuts, side: str) -> str:
    for kind in ("heads", "keys", "ffn"):
        if side in getattr(cuts, kind):
            return kind
    return "width"


def cut_shape(model: Model, name: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that a tensor will have."""
    d = model.head_width
    counts = {
        "heads": sizes.heads * d,
        "keys": sizes.kv_heads * d,
        "ffn": sizes.ffn,
        "width": sizes.hidden,
        "tokens": sizes.vocabulary,
        "head": sizes.heads,
    }
    shape = model.checkpoint.entries[name].shape
    return tuple(
        old if side is None else counts[side] for old, side in zip(shape, sides(model, name), strict=True)
    )


def cut_tensor(model: Model, name: str, chosen: Selection) -> Tensor:
    """What stays of a tensor, float32."""
    W, d = model.weight(name), model.head_width
    block = re.match(rf"{re.escape(model.arch.blocks)}\.(\d+)\.", name)
    index = int(block[1]) if block else 0
    for axis, side in enumerate(sides(model, name)):
        if side == "keys" and chosen.heads is not None:
            W = pooled(W, chosen.heads[index].keys, d)
        elif (rows := _rows(chosen, side, index, d)) is not None:
            W = W.index_select(axis, torch.tensor(rows))
    return W.contiguous()


def cut_outputs(model: Model, name: str, Y: Tensor, chosen: Selection) -> Tensor:
    """What stays of what a linear of a block gives, channels last."""
    block = re.match(rf"{re.escape(model.arch.blocks)}\.(\d+)\.", name)
    assert block is not None
    side, index, d = sides(model, name)[0], int(block[1]), model.head_width
    if side == "keys" and chosen.heads is not None:
        parts = Y.unflatten(-1, (-1, d))
        return torch.cat([parts[..., list(group), :].mean(-2) for group in chosen.heads[index].keys], -1)
    rows = _rows(chosen, side, index, d)
    return Y if rows is None else Y[..., list(rows)]


def _rows(chosen: Selection, side: str | None, index: int, d: int) -> Sequence[int] | None:
    """The numbers of the rows that stay; None: all of them."""
    if side in ("heads", "head") and chosen.heads is not None:
        queries = chosen.heads[index].queries
        return rows_of(queries, d) if side == "heads" else queries
    if side == "ffn" and chosen.ffn is not None:
        return chosen.ffn[index]
    return {"width": chosen.width, "tokens": chosen.tokens}.get(side or "")


def cut_config(model: Model, sizes: Sizes, *, tied: bool) -> dict[str, Any]:
    """The config of a model of these sizes."""
    raw: dict[str, Any] = copy.deepcopy(model.config.to_dict())
    for key in KEYS:
        raw.pop(key, None)
    names: Mapping[str, str] = type(model.config).attribute_map

    def put(name: str, value: int) -> None:
        raw[names.get(name, name)] = value

    put("vocab_size", sizes.vocabulary)
    if tied:
        raw["tie_word_embeddings"] = True
    if (cuts := model.arch.cuts) is None:
        return raw
    put("num_attention_heads", sizes.heads)
    put("hidden_size", sizes.hidden)
    raw[cuts.inner] = sizes.ffn
    if not cuts.square:
        put("num_key_value_heads", sizes.kv_heads)
        put("head_dim", model.head_width)
    return raw


def outlined(model: Model, sizes: Sizes, *, tied: bool = False) -> Model:
    """The model with the shapes that it will have; its tensors are not there yet."""
    names = [name for name in model.checkpoint.entries if not (tied and name == model.arch.head)]
    shapes = {name: cut_shape(model, name, sizes) for name in names}
    raw = cut_config(model, sizes, tied=tied)
    stored = {name: model.checkpoint.entries[name].name for name in names}
    return promised(model, raw, shapes, stored)


def laid(model: Model, sizes: Sizes, chosen: Selection) -> Model:
    """The model with these slices alone; a tensor is cut when it is read."""
    made = outlined(model, sizes)
    packed = {
        entry.name: Packed(partial(cut_tensor, model, name, chosen), ())
        for name, entry in made.checkpoint.entries.items()
    }
    return replace(made, checkpoint=replace(made.checkpoint, packed=MappingProxyType(packed)), changed={})


def promised(
    model: Model,
    raw: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str] = MappingProxyType({}),
) -> Model:
    """A model of a config and of shapes; its numbers stand in for those that are not there yet.

    Tokenizer and origin are still those of `model`.
    """
    parameters = sum(math.prod(shape) for shape in shapes.values())
    entries = {
        name: Entry(stored.get(name, name), "", "F32", shape, 0, 4 * math.prod(shape))
        for name, shape in shapes.items()
    }
    packed = {entry.name: Packed(partial(stand_in, entry.shape), ()) for entry in entries.values()}
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # the classes check themselves, each with errors of its own
        reason = " ".join(str(error.__cause__ or error).split())
        raise UsageError(f"student: stock {raw['model_type']} models cannot be so: {reason}") from error
    return replace(
        model,
        config=config,
        checkpoint=Checkpoint(model.folder, MappingProxyType(entries), MappingProxyType(packed)),
        origin=replace(model.origin, parameters=parameters, bf16_bytes=2 * parameters),
    )


def stand_in(shape: tuple[int, ...]) -> Tensor:
    """Numbers for a tensor that is not there yet."""
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
