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
from pocketsize.models.cuts import Cuts
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
    """The slices that stay: heads of each block, inner channels of each linear that reads them, by its path,
    channels of all, tokens.

    None: they all stay.
    """

    heads: tuple[Heads, ...] | None = None
    ffn: Mapping[str, tuple[int, ...]] | None = None
    width: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None


def cuts_of(model: Model, sizes: Sequence[str] = ()) -> Cuts:
    """What goes together in a family; refuses one for which nobody has said it, and `sizes` that stay."""
    if model.arch.cuts is None:
        raise UnsupportedError(
            f"student: it is not known which slices of a {model.config.model_type} model go together; leave "
            "out heads, kv_heads, ffn and hidden (`layers` works), or build one: family: llama, bert, ..."
        )
    stay = [size for size in sizes if size != "ffn"]
    if stay and not model.arch.cuts.heads:
        raise UnsupportedError(
            f"student: {stay[0]}: heads and channels of a {model.config.model_type} go through bottlenecks "
            "and stay; cut ffn alone, or build one: family: mobilebert"
        )
    return model.arch.cuts


def free_sizes(model: Model) -> tuple[str, ...]:
    """The sizes that may be named for a cut: they neither stay nor follow from others."""
    cuts = cuts_of(model)
    if not cuts.heads:
        return ("ffn",)
    return ("heads", "ffn", "hidden") if cuts.square else ("heads", "kv_heads", "ffn", "hidden")


def sizes_of(model: Model) -> Sizes:
    """How wide a model is; where it is not known what goes together, heads and channels count as none."""
    config = model.config
    heads = keys = ffn = 0
    if model.arch.cuts is not None:
        heads = int(config.num_attention_heads)
        keys = int(getattr(config, "num_key_value_heads", None) or heads)
        # GPT-2's config may leave it to a rule.
        ffn = model.matrix_shape(f"{model.blocks[0]}.{readers(model, 'ffn')[0]}.weight")[1]
    return Sizes(heads, keys, ffn, int(config.hidden_size), int(config.vocab_size))


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
    own, found_in = sizes_of(model), partial(readers, model)
    if (own.heads, own.kv_heads) != (sizes.heads, sizes.kv_heads):
        (reader,) = found_in("heads")
        each = [importance[f"{path}.{reader}"].value() for path in model.blocks]
        if cuts.per_head:  # one table for the heads of all blocks
            each = [together(each)] * len(each)
        made = [kept_heads(x, own.kv_heads, sizes.heads, sizes.kv_heads) for x in each]
        found = replace(found, heads=tuple(made))
    if own.ffn != sizes.ffn:
        names = [f"{path}.{name}" for path in model.blocks for name in found_in("ffn")]
        kept = {name: tuple(best(_worth(model, name, importance), sizes.ffn)) for name in names}
        found = replace(found, ffn=MappingProxyType(kept))
    if own.hidden != sizes.hidden:
        names = [f"{path}.{name}" for path in model.blocks for name in found_in("width")]
        width = best(together([importance[name].value() for name in names]), sizes.hidden)
        found = replace(found, width=tuple(width))
    return found


def _worth(model: Model, name: str, importance: Mapping[str, Importance]) -> Tensor:
    """What the inner channels that a linear reads are worth; of an expert without a token, by its weights."""
    found = importance[name].value()
    W = f"{name}.weight"
    return found if found.any() else model.as_stored(W, model.weight(W)).norm(dim=0)


def watched(model: Model, sizes: Sizes) -> dict[str, int]:
    """The linears whose inputs tell which slices matter, each with the width of a slice of them."""
    own, inside = sizes_of(model), dict[str, int]()
    if (own.heads, own.kv_heads) != (sizes.heads, sizes.kv_heads):
        inside |= dict.fromkeys(readers(model, "heads"), model.head_width)
    if own.ffn != sizes.ffn:
        inside |= dict.fromkeys(readers(model, "ffn"), 1)
    if own.hidden != sizes.hidden:
        inside |= dict.fromkeys(readers(model, "width"), 1)
    return {f"{path}.{name}": width for path in model.blocks for name, width in inside.items()}


def readers(model: Model, kind: str) -> list[str]:
    """The linears of a block that read slices of this kind; of several that read one tensor the first."""
    cuts = cuts_of(model)
    return [g.names[0] for g in model.groups if cuts.kinds(f"{g.names[0]}:in") == (kind,)]


def writers_of(model: Model) -> tuple[str, ...]:
    """The linears of a block whose outputs are added as they are to what passes it, to every token.

    Behind attention, and behind channels unless those are of experts; none where norms stand behind them.
    """
    cuts = model.arch.cuts
    if cuts is None or not cuts.adds:
        return ()
    channels = [] if model.arch.experts is not None else readers(model, "ffn")
    return (*readers(model, "heads"), *channels)


def norm_first(model: Model) -> bool:
    """Whether norms stand before what a block reads, not behind what it adds."""
    key = cuts_of(model).norm_first
    return model.arch.causal if key is None else bool(getattr(model.config, key))


def sides(model: Model, name: str) -> tuple[tuple[str, ...], ...]:
    """What each side of a tensor has slices for: heads, keys, bundles, ffn, width, tokens or head.

    A side may have parts, one after the other; one without any stays as it is. `keys` are those of heads that
    share them; where every head has its own they are cut as queries are.
    """
    rank, arch, cuts = len(model.checkpoint.entries[name].shape), model.arch, model.arch.cuts
    narrow = cuts is not None and _narrow(model, cuts)
    if name in (arch.embedding, arch.head):
        return ("tokens",), ("width",) if cuts and cuts.heads and not narrow else ()
    if cuts is None:
        return ((),) * rank
    block, part = _place(model, name)
    if block is None:
        return cuts.around_blocks(part, rank, narrow=narrow)
    ends = ("in", "out") if arch.is_transposed(name) else ("out", "in")
    return tuple(cuts.kinds(f"{part}:{end}") for end in ends[:rank])


def _place(model: Model, name: str) -> tuple[int | None, str]:
    """The number of the block that holds a tensor, and the path in it of what the tensor is of.

    None: it is outside of the blocks, and the path is that in the module.
    """
    path = name.removesuffix(".weight").removesuffix(".bias")
    inside = re.match(rf"{re.escape(model.arch.blocks)}\.(\d+)\.(.*)$", path)
    return (None, path) if inside is None else (int(inside[1]), inside[2])


def _narrow(model: Model, cuts: Cuts) -> bool:
    """Whether the embedding is narrower than the model."""
    return cuts.embedding is not None and getattr(model.config, cuts.embedding) != model.config.hidden_size


def cut_shape(model: Model, name: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that a tensor will have."""
    counts, shape = _counts(model, sizes), model.checkpoint.entries[name].shape
    return tuple(
        sum(counts[kind] for kind in kinds) if kinds else old
        for old, kinds in zip(shape, sides(model, name), strict=True)
    )


def _counts(model: Model, sizes: Sizes) -> dict[str, int]:
    """How long a side of each kind is."""
    queries = sizes.heads * model.head_width
    return {
        "heads": queries,
        "keys": sizes.kv_heads * model.head_width,
        "bundles": 3 * queries,
        "ffn": sizes.ffn,
        "width": sizes.hidden,
        "tokens": sizes.vocabulary,
        "head": sizes.heads,
    }


def cut_tensor(model: Model, name: str, chosen: Selection) -> Tensor:
    """What stays of a tensor, float32."""
    W = model.weight(name)
    for axis, kinds in enumerate(sides(model, name)):
        W = _cut(model, name, W, axis, kinds, chosen)
    return W.contiguous()


def cut_outputs(model: Model, name: str, Y: Tensor, chosen: Selection) -> Tensor:
    """What stays of what a linear of a block gives, channels last."""
    kinds = cuts_of(model).kinds(f"{_place(model, name)[1]}:out")
    return _cut(model, name, Y, Y.dim() - 1, kinds, chosen)


def _cut(model: Model, name: str, T: Tensor, axis: int, kinds: tuple[str, ...], chosen: Selection) -> Tensor:
    """What stays of one side of the tensor of this name, or of what a linear gives with it."""
    if len(kinds) < 2:
        return _cut_part(model, name, T, axis, kinds[0], chosen) if kinds else T
    counts = _counts(model, sizes_of(model))
    parts = T.split([counts[kind] for kind in kinds], axis)
    left = [_cut_part(model, name, one, axis, kind, chosen) for one, kind in zip(parts, kinds, strict=True)]
    return torch.cat(left, axis)


def _cut_part(model: Model, name: str, T: Tensor, axis: int, kind: str, chosen: Selection) -> Tensor:
    (block, part), d = _place(model, name), model.head_width
    heads = None if chosen.heads is None else chosen.heads[block or 0]
    if kind == "keys" and heads is not None:
        return pooled(T.movedim(axis, 0), heads.keys, d).movedim(0, axis)
    rows: Sequence[int] | None = {"width": chosen.width, "tokens": chosen.tokens}.get(kind)
    if kind in ("heads", "bundles", "head") and heads is not None:
        rows = rows_of(heads.queries, {"heads": d, "bundles": 3 * d, "head": 1}[kind])
    if kind == "ffn" and chosen.ffn is not None:
        assert block is not None
        rows = chosen.ffn[f"{model.blocks[block]}.{cuts_of(model).reader_of(part)}"]
    return T if rows is None else T.index_select(axis, torch.tensor(rows, device=T.device))


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
    raw[cuts.inner] = sizes.ffn
    if not cuts.heads:
        return raw
    put("num_attention_heads", sizes.heads)
    put("hidden_size", sizes.hidden)
    if cuts.embedding is not None and not _narrow(model, cuts):
        raw[cuts.embedding] = sizes.hidden
    elif cuts.embedding is not None and sizes.hidden == raw[cuts.embedding]:
        raise UsageError(
            f"student: hidden: {sizes.hidden} is as wide as the embedding of this {model.config.model_type}, "
            "whose class then has no place for what leads from the one to the other; use another width"
        )
    if not cuts.square:
        put("num_key_value_heads", sizes.kv_heads)
        put("head_dim", model.head_width)
    return raw


def outlined(model: Model, sizes: Sizes, *, tied: bool = False) -> Model:
    """The model with the shapes that it will have; its tensors are not there yet."""
    arch = model.arch
    gone = arch.head if tied else None
    names = [name for name in model.checkpoint.entries if name != gone and not arch.is_other_head(name)]
    shapes = {name: cut_shape(model, name, sizes) for name in names}
    raw = cut_config(model, sizes, tied=tied)
    stored = {name: model.checkpoint.entries[name].name for name in names}
    try:
        return promised(model, raw, shapes, stored)
    except UsageError as error:
        way = "ffn alone, or hidden and heads in proportion, can always be cut"
        raise UsageError(f"{error}; {way}" if arch.cuts and arch.cuts.heads else str(error)) from error


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
