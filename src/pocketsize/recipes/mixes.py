"""Mixes of k-quants as llama.cpp names them, and what stands in where 256 does not divide a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from pocketsize.errors import UnsupportedError
from pocketsize.exporting.gguf.names import gguf_name
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import SUPER_BLOCK, bits_of, named
from pocketsize.recipes.overrides import Overrides, matched, module_of
from pocketsize.recipes.record import Finding

# The scheme that most linears of a mix have, by the mix's name.
MIXES: Mapping[str, str] = MappingProxyType(
    {
        "Q2_K": "Q2_K",
        "Q3_K_S": "Q3_K",
        "Q3_K_M": "Q3_K",
        "Q3_K_L": "Q3_K",
        "Q4_K_S": "Q4_K",
        "Q4_K_M": "Q4_K",
        "Q5_K_S": "Q5_K",
        "Q5_K_M": "Q5_K",
        "Q6_K": "Q6_K",
    }
)
# What a mix stores the head as, and an embedding that is the head too.
HEAD = "Q6_K"
# What stands in for a scheme of super-blocks, in blocks of 32: never fewer bits.
STAND_INS: Mapping[str, str] = MappingProxyType(
    {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)
INSTEAD = "instead_of"


def base_of(word: str) -> str:
    """The scheme that most linears have under this name: its own, unless it is that of a mix."""
    return MIXES.get(word.upper(), word)


def mix_of(word: str, model: Model, names: list[str]) -> dict[str, str]:
    """Which of these linears have another scheme than most, in a mix of this name."""
    if (mix := word.upper()) not in MIXES:
        return {}
    if model.arch.gguf is None:
        if mix == MIXES[mix]:
            return {}
        raise UnsupportedError(
            f"{mix} is a mix by llama.cpp's names of tensors, which the family {model.config.model_type} has "
            f"none of, as no GGUF is written of it; use scheme: W{bits_of(MIXES[mix])}A16"
        )
    config = model.config
    heads = config.num_attention_heads // config.num_key_value_heads
    found: dict[str, str] = {}
    for name in names:
        _, number, role, _ = gguf_name(model, name).split(".")
        kind = _kind(mix, role, int(number), config.num_hidden_layers, heads)
        if kind != MIXES[mix]:
            found[name] = kind
    return found


def _kind(mix: str, role: str, layer: int, layers: int, heads: int) -> str:
    """The scheme of a tensor of a block in a mix, as llama.cpp's quantizer assigns it.

    `heads` is the number of query heads to a head of keys and values.
    """
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    several = "Q4_K" if heads >= 4 else "Q3_K"
    medium = "Q6_K" if more else MIXES[mix]
    early = "Q5_K" if layer < layers // 8 else "Q4_K"
    by_role: Mapping[str, Mapping[str, str]] = {
        "attn_v": {
            "Q2_K": several,
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if layer < 4 else "Q4_K",
            "Q4_K_M": medium,
            "Q5_K_M": medium,
        },
        "ffn_down": {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": early,
            "Q4_K_M": medium,
            "Q5_K_M": medium,
        },
        "attn_output": {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"},
    }
    found = by_role.get(role, {}).get(mix, MIXES[mix])
    shared = role == "attn_v" and layers == 80 and heads > 1  # of 70 billion parameters these are few
    return "Q5_K" if shared and found in ("Q3_K", "Q4_K") else found


def stand_in(scheme: str, columns: int) -> str | None:
    """What is stored instead of a scheme where its super-blocks do not divide rows; None where they do."""
    own = named(scheme)
    if own is None or not own.super_blocks or columns % SUPER_BLOCK == 0:
        return None
    return STAND_INS[scheme.upper()]


def by_name(
    scheme: str, embeddings: int | str | None, overrides: Overrides, model: Model
) -> tuple[int | str | None, dict[str, Any]]:
    """Embeddings and overrides with a mix told matrix by matrix, and with what stands in for super-blocks."""
    told: dict[str, Any] = {}
    ends = {module_of(name) for name in model.ends}  # named with `.weight` or without
    overrides = {module_of(p) if module_of(p) in ends else p: grid for p, grid in overrides.items()}
    for name, kind in mix_of(scheme, model, matched(overrides, model)[None]).items():
        told[module_of(name)] = {"scheme": kind}
    if embeddings == "auto" and scheme.upper() in MIXES and model.arch.gguf:
        embeddings = HEAD
        if not model.tied:
            told[module_of(model.arch.embedding)] = {"scheme": base_of(scheme)}
    found = _with_stand_ins(base_of(scheme), told | dict(overrides), model)
    for name in model.ends:
        word = base_of(scheme) if embeddings == "same" else str(embeddings)
        if module_of(name) not in found and stand_in(word, model.matrix_shape(name)[1]):
            found[module_of(name)] = _instead(word)
    return embeddings, found


def _with_stand_ins(base: str, overrides: Overrides, model: Model) -> dict[str, Any]:
    """The overrides with those of matrices that have other blocks than they are to have, each by its name."""
    found, stood, others = dict(overrides), 0, 0
    for pattern, names in matched(overrides, model).items():
        grid = {} if pattern is None else overrides[pattern]
        if grid is None:
            continue
        word = str(grid.get("scheme", base))
        short = [name for name in names if stand_in(word, model.matrix_shape(name)[1])]
        if pattern is not None and short == names and names:
            found[pattern] = _instead(word)
        else:
            found |= {module_of(name): _instead(word) for name in short}
        linears = [name for name in names if name not in model.ends]
        stood += sum(name in short for name in linears)
        others += sum(name not in short for name in linears)
    if stood and not others:
        raise UnsupportedError(
            f"{base}: {SUPER_BLOCK} divides the rows of none of the {stood} linears, so none could have "
            f"super-blocks; use scheme: {STAND_INS.get(base, 'Q5_0')}"
        )
    return found


def _instead(word: str) -> dict[str, Any]:
    return {"scheme": STAND_INS[word.upper()], INSTEAD: word.upper()}


def stand_ins(overrides: Overrides, model: Model) -> Iterator[Finding]:
    """A finding for each scheme that another stands in for."""
    names, found = matched(overrides, model), dict[tuple[str, str], list[str]]()
    for pattern, grid in overrides.items():
        if grid is not None and INSTEAD in grid:
            found.setdefault((grid[INSTEAD], grid["scheme"]), []).extend(names[pattern])
    for (asked, stored), such in found.items():
        if not such:  # in an excerpt of the model
            continue
        shapes = [model.matrix_shape(name) for name in such]
        widths = ", ".join(map(str, sorted({columns for _, columns in shapes})))
        count = sum(rows * columns for rows, columns in shapes)
        what = "1 matrix" if len(such) == 1 else f"{len(such)} matrices"
        said = f"{what}, {count} weights, stored as {stored} instead of {asked}"
        yield Finding("stand-in", f"{said}: {SUPER_BLOCK} does not divide their rows of {widths}", such[0])
