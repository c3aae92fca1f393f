"""The options that all quantizing steps share: how blocks and ends are stored, and what exports allow."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.exporting.gguf.blocks import block_type
from pocketsize.exporting.table import EXPORTERS
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import BITS, GROUPS, NAMED, Scheme, bits_of, default_group, named
from pocketsize.recipes.mixes import INSTEAD, MIXES, base_of, by_name
from pocketsize.recipes.overrides import decides, matched, matches, module_of, require_packed
from pocketsize.recipes.rounds import check_rounds
from pocketsize.recipes.step import Auto, Context, Step
from pocketsize.recipes.zeros import float_zeros_of, require_zero_of

# The options that say how a linear is stored; each may be another where an override says so.
GRID = ("scheme", "group", "symmetric", "float_zeros", "scale_digits")


@dataclass(frozen=True, slots=True)
class Quantizer(ABC):
    """A step that quantizes the linears of the blocks, and perhaps embedding and head: what all such have.

    `scheme` is the width of codes (`W4A16`), a name that says all of the grid (`Q4_0`) or that of a mix
    (`Q4_K_M`), `group` the inputs per scale (None: one scale per row), `symmetric` whether grids have no
    zeros, `float_zeros` whether zeros may be other than codes; `embeddings` is the width of embedding and
    head, or a name as well (`same`: stored as the linears are; None leaves them), `scale_digits` how many
    binary digits a stored scale has, `overrides` what some linears have instead, by pattern, or embedding
    or head by its whole name (None leaves them).
    """

    scheme: str = "W4A16"
    group: int | Auto | None = "auto"
    symmetric: bool | Auto = "auto"
    float_zeros: bool | Auto = "auto"
    embeddings: int | str | None = "auto"
    embeddings_symmetric: bool = True
    scale_digits: int | Auto = "auto"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str]
    calibrated: ClassVar[bool]
    # Whether it moves factors of inputs into what feeds them, if text that is held out bears it out.
    moves: ClassVar[bool] = False
    # How many tokens of each site it asks for, and whether it knows that linears may round what they read.
    sampled: ClassVar[int] = 0
    rounds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Self:
        """The step with group, zeros, digits and embedding width decided."""
        return replace(self, **chosen(self, model, exports))

    def outline(self, model: Model) -> Model:
        """The same model: quantizing changes no shape."""
        return model

    @abstractmethod
    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with its linears quantized."""


def block_scheme(step: Quantizer) -> Scheme:
    """How a resolved step stores the linears of the blocks that no override names."""
    return _scheme(_own(step))


def layer_scheme(step: Quantizer, name: str) -> Scheme | None:
    """How a resolved step stores one linear of the blocks; None where it leaves it."""
    pattern = decides(step.overrides, name)
    if pattern is None:
        return block_scheme(step)
    found = step.overrides[pattern]
    return None if found is None else _scheme(found)


def layer_schemes(step: Quantizer) -> list[Scheme]:
    """All schemes that a resolved step has for linears of the blocks, each once."""
    others = [_scheme(found) for found in step.overrides.values() if found is not None]
    return list(dict.fromkeys([block_scheme(step), *others]))


def _own(step: Quantizer) -> dict[str, Any]:
    return {key: getattr(step, key) for key in GRID} | {"scheme": base_of(str(step.scheme))}


def _scheme(grid: Mapping[str, Any]) -> Scheme:
    if (own := named(grid["scheme"])) is not None:
        return own
    if "auto" in grid.values():
        raise UsageError("its `auto` options are still to be resolved")
    known = {key: grid[key] for key in GRID if key != "scheme"}
    return Scheme(bits_of(grid["scheme"]), **known)


def embedding_scheme(step: Quantizer) -> Scheme | None:
    """How a resolved step stores embedding and head (with their own width in GGUF alone); None if not."""
    if step.embeddings is None or step.embeddings == "auto":
        return None
    if step.embeddings == "same":
        return block_scheme(step)
    if isinstance(step.embeddings, str):
        return named(step.embeddings)
    free = not step.embeddings_symmetric
    return Scheme(step.embeddings, 32, step.embeddings_symmetric, float_zeros=free)


def end_scheme(step: Quantizer, name: str) -> Scheme | None:
    """How a resolved step stores the embedding or the head of this name; None where it leaves it."""
    if module_of(name) not in step.overrides or step.embeddings is None:
        return embedding_scheme(step)
    other = step.overrides[module_of(name)]
    return None if other is None else _scheme(other)


def scheme_of(step: Quantizer, model: Model) -> Callable[[str], Scheme | None]:
    """How a resolved step stores each parameter by its name; None where it leaves it."""
    blocks = {name: layer_scheme(step, name) for name in model.linears}

    def of(name: str) -> Scheme | None:
        if name in blocks:
            return blocks[name]
        return end_scheme(step, name) if name in model.ends else None

    return of


def check(step: Quantizer) -> None:
    """Refuse options that no model could make sense of."""
    _check_grid(step.kind, _own(step))
    check_rounds(step.kind, words_of(step), knows=step.rounds, embeddings=step.embeddings)
    known = isinstance(step.embeddings, str) and named(step.embeddings) is not None
    if not known and step.embeddings not in (*BITS, "auto", "same", None):
        raise UsageError(
            f"{step.kind}: embeddings must be one of {BITS}, a scheme with a name such as Q6_K, same, auto "
            f"or null, got {step.embeddings!r}"
        )
    for pattern, other in step.overrides.items():
        where = f"{step.kind}: overrides: {pattern}"
        if other is not None and not isinstance(other, Mapping):
            raise UsageError(f"{where}: options such as {{scheme: W8A16}}, or null, got {other!r}")
        for key in other or ():
            if key not in (*GRID, INSTEAD):
                raise UsageError(f"{where}: unknown option {key!r}{did_you_mean(str(key), GRID)}")
        if (mix := str((other or {}).get("scheme", "")).upper()) in MIXES and mix != MIXES[mix]:
            raise UsageError(f"{where}: {mix} is a mix for a whole model; use {MIXES[mix]}")
        _check_grid(where, _overridden(_own(step), other or {}))
        if pattern.startswith("re:"):
            _compiles(where, pattern.removeprefix("re:"))


def words_of(step: Quantizer) -> list[str]:
    """Every scheme of a step, as it is called there."""
    others = (o.get("scheme", "") for o in step.overrides.values() if isinstance(o, Mapping))
    return [str(word) for word in (step.scheme, *others)]


def _check_grid(where: str, grid: Mapping[str, Any]) -> None:
    try:
        bits_of(str(grid["scheme"]))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    group = grid["group"]
    if group not in ("auto", None) and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise UsageError(f"{where}: group must be a positive number, auto or null, got {group!r}")
    for key in ("symmetric", "float_zeros"):
        if grid[key] not in ("auto", True, False):
            raise UsageError(f"{where}: {key} must be true, false or auto, got {grid[key]!r}")
    if grid["symmetric"] is True and grid["float_zeros"] is True:
        raise UsageError(f"{where}: a symmetric grid has no zeros; use float_zeros: false")
    if (own := named(str(grid["scheme"]))) is not None:
        for key, value in _options(own).items():
            if grid[key] not in ("auto", value):
                said = "null" if value is None else str(value).lower()
                raise UsageError(f"{where}: {key}: {grid['scheme']} has {said}; leave {key} out")


def _overridden(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A grid with what an override says; under a name that says everything nothing else is left."""
    named_own, named_other = (named(str(grid.get("scheme", ""))) is not None for grid in (own, other))
    alone = named_other or (named_own and "scheme" in other)
    return (dict.fromkeys(GRID, "auto") if alone else dict(own)) | dict(other)


def _options(scheme: Scheme) -> dict[str, Any]:
    """What a scheme with a name says of the other keys of a grid."""
    return {key: getattr(scheme, key) for key in GRID if key != "scheme"}


def unstorable(word: str, export: str) -> str | None:
    """What an export cannot hold of a scheme, by its name; None where it holds all of it."""
    word = base_of(word)
    if (scheme := named(word)) is not None:
        return EXPORTERS[export].lacks(scheme)
    bits = bits_of(word)
    return None if bits in EXPORTERS[export].bits else f"{bits}-bit weights"


def _compiles(where: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise UsageError(f"{where}: not a regular expression: {error}") from error


def refuse_unstored(steps: Sequence[Step], exports: Sequence[str]) -> None:
    """Refuse a width for embedding and head that nothing which is asked for would store."""
    for step in steps:
        own = isinstance(step, Quantizer) and step.embeddings not in ("auto", "same", None)
        if own and "gguf" not in exports:
            raise UnsupportedError(
                f"{step.kind}: embeddings: {exports[0]} has no width of its own for embedding and head; use "
                "same, or leave embeddings out, or export gguf"
            )


def chosen(step: Quantizer, model: Model, exports: tuple[str, ...]) -> dict[str, Any]:
    """The options of a step that may be `auto`, as they are for this model and these exports."""
    if model.arch.refuses is not None:
        raise UnsupportedError(f"{model.folder}: nothing in it can be quantized: {model.arch.refuses}")
    for name in exports:
        if (missing := unstorable(step.scheme, name)) is not None:
            raise UnsupportedError(f"{step.kind}: {_cannot(step.scheme, name, missing)}")
    asked, told = by_name(step.scheme, step.embeddings, step.overrides, model)
    own, names = _own(step), matched(told, model)
    overrides = dict(_overrides(step, told, names, model, exports))
    others = names[None] or ([] if named(own["scheme"]) else model.linears)
    rest = _resolved(step.kind, own, model, exports, others, mixed=bool(overrides))
    ends = {module_of(name) for name in model.ends}
    inside = [grid for pattern, grid in overrides.items() if pattern not in ends]
    kinds = [grid for grid in inside if grid is not None]
    kinds = [rest] * bool(names[None]) + kinds
    if not kinds:
        raise UsageError(f"{step.kind}: overrides leave every linear as it is; nothing would be quantized")
    left: list[Scheme | None] = [None] if None in inside else []
    for name in exports:
        if reason := EXPORTERS[name].mixes([*(_scheme(grid) for grid in kinds), *left], model.arch):
            raise UnsupportedError(f"{step.kind}: {name}: {reason}")
    if step.embeddings == "same":
        _require_same(step.kind, [_scheme(grid) for grid in kinds], _scheme(rest), model, exports)
    embeddings = (8 if "gguf" in exports else None) if asked == "auto" else asked
    if isinstance(embeddings, str) and embeddings != "same":
        embeddings = embeddings.upper()
        if "gguf" in exports and (missing := unstorable(embeddings, "gguf")) is not None:
            raise UnsupportedError(f"{step.kind}: embeddings: {_cannot(embeddings, 'gguf', missing)}")
    return rest | {"embeddings": embeddings, "overrides": overrides}


def _overrides(
    step: Quantizer,
    told: Mapping[str, Any],
    names: Mapping[str | None, list[str]],
    model: Model,
    exports: tuple[str, ...],
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The overrides with nothing left to choose; `names` are the matrices that each decides."""
    for pattern, other in told.items():
        if not names[pattern]:
            _refuse_pattern(step, pattern, model)
        where = f"{step.kind}: overrides: {pattern}"
        if names[pattern][0] in model.ends and exports != ("gguf",):
            raise UnsupportedError(f"{where}: embedding and head have a scheme of their own in gguf alone")
        if names[pattern][0] in model.ends and step.embeddings is None and other is not None:
            raise UsageError(f"{where}: embeddings: null leaves embedding and head; leave out one of both")
        if other is None:
            require_packed(where, names[pattern], model, exports)
            yield pattern, None
            continue
        grid = _overridden(_own(step), other)
        found = _resolved(where, grid, model, exports, names[pattern], mixed=True)
        yield pattern, found | ({INSTEAD: grid[INSTEAD]} if INSTEAD in grid else {})


def _cannot(word: str, export: str, missing: str) -> str:
    """What an export cannot hold of a scheme, by its name, and the way out."""
    known, bits = ", ".join(map(str, EXPORTERS[export].bits)), bits_of(base_of(word))
    way = f"it has {known} bits" if known else "use scheme: NF4"
    own = (name for name, one in NAMED.items() if one.bits == bits and EXPORTERS[export].lacks(one) is None)
    if bits not in EXPORTERS[export].bits and (other := next(own, None)):
        way += f", and scheme {other}"
    if (scheme := named(word)) is not None and scheme.codebook is not None:
        way = f"export {' or '.join(e for e, other in EXPORTERS.items() if other.lacks(scheme) is None)}"
    return f"{export} cannot store {missing}; {way}"


def _require_same(
    kind: str, kinds: Sequence[Scheme], own: Scheme, model: Model, exports: tuple[str, ...]
) -> None:
    """Refuse `embeddings: same` where embedding and head cannot be stored as the linears are."""
    if bare := [name for name in exports if not EXPORTERS[name].packs_ends]:
        why = f"{bare[0]} has embedding and head unquantized"
        raise UnsupportedError(f"{kind}: embeddings: same: {why}; use embeddings: null")
    if "folder" in exports and ({*kinds} != {own} or model.arch.dense_on_load or own.codebook):
        why = own.name if own.codebook else f"the family {model.config.model_type}"
        why = "more than one scheme" if {*kinds} != {own} else why
        raise UnsupportedError(
            f"{kind}: embeddings: same: transformers unpacks no embedding with {why}; use embeddings: null"
        )
    for name in model.ends:
        if own.super_blocks:  # others stand in where they do not divide
            continue
        if (width := model.matrix_shape(name)[1]) % own.width(width):
            raise UnsupportedError(f"{kind}: embeddings: same: group {own.group} does not divide {name}")


def _refuse_pattern(step: Quantizer, pattern: str, model: Model) -> None:
    """An override that decides nothing: it matches nothing, or a later one matches all that it does."""
    if any(matches(pattern, module_of(name)) for name in model.linears):
        raise UsageError(f"{step.kind}: overrides: {pattern}: later patterns match all that it does")
    such, ends = module_of(model.linears[0]), " and ".join(map(module_of, model.ends))
    none = f"matches none of {len(model.linears)} linears, such as {such}; nor is it {ends}"
    raise UsageError(f"{step.kind}: overrides: {pattern}: {none}")


def _resolved(
    where: str,
    grid: Mapping[str, Any],
    model: Model,
    exports: tuple[str, ...],
    names: Sequence[str],
    *,
    mixed: bool,
) -> dict[str, Any]:
    """A grid with nothing left to choose, for these linears; `mixed`: others may have another."""
    bits, gguf = bits_of(grid["scheme"]), "gguf" in exports
    widths = {model.matrix_shape(name)[1]: name for name in reversed(names)}  # the first of each
    for name in exports:
        if (missing := unstorable(grid["scheme"], name)) is not None:
            raise UnsupportedError(f"{where}: {_cannot(grid['scheme'], name, missing)}")
    if (own := named(grid["scheme"])) is not None:
        require_zero_of(where, own, model)
        _require_blocks(where, own, model, names)
        for name in names if gguf else ():
            block_type(own, model.matrix_shape(name)[1], name)
        return {"scheme": str(grid["scheme"]).upper(), **_options(own)}
    group = _group(where, grid["group"], widths, exports)
    packed_only = model.arch.experts is not None and "folder" in exports
    middle = [e for e in exports if EXPORTERS[e].lacks(Scheme(bits, None, symmetric=False)) is not None]
    plain = gguf or bool(middle) or packed_only or bits == 8 or (mixed and "folder" in exports)
    plain = plain and grid["float_zeros"] is not True
    symmetric = plain if grid["symmetric"] == "auto" else grid["symmetric"]
    if packed_only and not symmetric:
        raise UnsupportedError(
            f"{where}: transformers loads packed experts without zeros alone; use symmetric: true"
        )
    float_zeros = float_zeros_of(where, grid["float_zeros"], symmetric, exports, model)
    if middle and not symmetric:
        way = " or export gptq_v2" if middle == ["gptq"] else ""
        raise UnsupportedError(
            f"{where}: {middle[0]} has no {bits}-bit type with zeros; use symmetric: true{way}"
        )
    # Scale times code difference has to fit the 11 digits of float16: GGUF stores that product as a
    # minimum, and stock loaders of a folder multiply in the dtype of the scale.
    exact = min(8, 11 - bits) if not symmetric and not float_zeros and bits <= 5 else 8
    digits = exact if grid["scale_digits"] == "auto" else grid["scale_digits"]
    if gguf and digits > exact:
        raise UnsupportedError(f"{where}: gguf stores {bits}-bit minima exactly up to scale_digits: {exact}")
    return {
        "scheme": grid["scheme"],
        "group": group,
        "symmetric": symmetric,
        "float_zeros": float_zeros,
        "scale_digits": digits,
    }


def _group(
    where: str, asked: int | Auto | None, widths: dict[int, str], exports: tuple[str, ...]
) -> int | None:
    """The group for rows of these widths; refuses one that does not divide them or cannot be stored."""
    legal = set(GROUPS).intersection(*(EXPORTERS[e].groups for e in exports))
    group = default_group(widths, legal) if asked == "auto" else asked
    for width, name in reversed(widths.items()):
        if group is not None and width % group:
            raise UnsupportedError(
                f"{where}: group {group} does not divide rows of {width} weights ({module_of(name)}); "
                f"use group: {default_group(widths, legal)}"
            )
    for name in exports:
        if not EXPORTERS[name].takes_group(group):
            raise UnsupportedError(f"{where}: {name} cannot store group {group}; use group: auto")
    return group


def _require_blocks(where: str, scheme: Scheme, model: Model, names: Sequence[str]) -> None:
    """Refuse a scheme with a name where its groups do not divide the rows of a linear."""
    for name in names:
        if scheme.group is not None and (width := model.matrix_shape(name)[1]) % scheme.group:
            raise UnsupportedError(
                f"{where}: rows of {name} have {width} weights, which groups of {scheme.group} do not "
                "divide; give it another scheme by an override"
            )
