"""The options that all quantizing steps share: how blocks and ends are stored, and what exports allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.exporting.table import EXPORTERS
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import BITS, GROUPS, Scheme, bits_of, default_group
from pocketsize.recipes.step import Step

Auto = Literal["auto"]


@runtime_checkable
class Quantizer(Step, Protocol):
    """A step that quantizes the linears of the blocks, and perhaps embedding and head."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def scheme(self) -> str:
        """The width of codes: `W4A16`."""
        ...

    @property
    def group(self) -> int | Auto | None:
        """Inputs per scale; None: one scale per row."""
        ...

    @property
    def symmetric(self) -> bool | Auto:
        """Whether grids have no zeros."""
        ...

    @property
    def float_zeros(self) -> bool | Auto:
        """Whether zeros may be other than codes."""
        ...

    @property
    def embeddings(self) -> int | Auto | None:
        """The width of embedding and head; None leaves them."""
        ...

    @property
    def embeddings_symmetric(self) -> bool:
        """Whether their grids have no zeros."""
        ...

    @property
    def scale_digits(self) -> int | Auto:
        """Significant binary digits of a stored scale."""
        ...


def block_scheme(step: Quantizer) -> Scheme:
    """How a resolved step stores the linears of the blocks."""
    found = step.group, step.symmetric, step.scale_digits, step.float_zeros
    group, symmetric, digits, float_zeros = found
    if group == "auto" or symmetric == "auto" or digits == "auto" or float_zeros == "auto":
        raise UsageError(f"{step.kind}: its `auto` options are still to be resolved")
    return Scheme(bits_of(step.scheme), group, symmetric, digits, float_zeros)


def embedding_scheme(step: Quantizer) -> Scheme | None:
    """How a resolved step stores embedding and head; None where it leaves them.

    The one format that stores them quantized, GGUF, has float zeros.
    """
    if step.embeddings is None or step.embeddings == "auto":
        return None
    free = not step.embeddings_symmetric
    return Scheme(step.embeddings, 32, step.embeddings_symmetric, float_zeros=free)


def scheme_of(step: Quantizer, model: Model) -> Callable[[str], Scheme | None]:
    """How a resolved step stores each parameter by its name; None where it leaves it."""
    blocks, ends, linears = block_scheme(step), embedding_scheme(step), set(model.linears)

    def of(name: str) -> Scheme | None:
        if name in linears:
            return blocks
        return ends if name in (model.arch.embedding, model.arch.head) else None

    return of


def check(step: Quantizer) -> None:
    """Refuse options that no model could make sense of."""
    bits_of(step.scheme)
    if step.embeddings not in (*BITS, "auto", None):
        raise UsageError(
            f"{step.kind}: embeddings must be one of {BITS}, auto or null, got {step.embeddings!r}"
        )
    if step.group not in ("auto", None) and (not isinstance(step.group, int) or step.group < 1):
        raise UsageError(f"{step.kind}: group must be a positive number, auto or null, got {step.group!r}")
    for key in ("symmetric", "float_zeros"):
        if getattr(step, key) not in ("auto", True, False):
            raise UsageError(f"{step.kind}: {key} must be true, false or auto, got {getattr(step, key)!r}")
    if step.symmetric is True and step.float_zeros is True:
        raise UsageError(f"{step.kind}: a symmetric grid has no zeros; use float_zeros: false")


def chosen(step: Quantizer, model: Model, exports: tuple[str, ...]) -> dict[str, Any]:
    """The options of a step that may be `auto`, as they are for this model and these exports."""
    if model.arch.refuses is not None:
        raise UnsupportedError(f"{model.folder}: nothing in it can be quantized: {model.arch.refuses}")
    bits, gguf = bits_of(step.scheme), "gguf" in exports
    widths = {model.matrix_shape(name)[1] for name in model.linears}
    legal = set(GROUPS).intersection(*(EXPORTERS[e].groups for e in exports))
    group = default_group(widths, legal) if step.group == "auto" else step.group
    for width in widths:
        if group is not None and width % group:
            raise UnsupportedError(
                f"{step.kind}: group {group} does not divide rows of {width} weights; "
                f"use group: {default_group(widths, legal)}"
            )
    for name in exports:
        if bits not in EXPORTERS[name].bits:
            known = ", ".join(map(str, EXPORTERS[name].bits))
            raise UnsupportedError(f"{step.kind}: {name} cannot store {bits}-bit weights; it has {known}")
        if not EXPORTERS[name].takes_group(group):
            raise UnsupportedError(f"{step.kind}: {name} cannot store group {group}; use group: auto")
    packed_only = model.arch.experts is not None and "folder" in exports
    plain = step.float_zeros is not True and (gguf or packed_only or bits == 8)
    symmetric = plain if step.symmetric == "auto" else step.symmetric
    if packed_only and not symmetric:
        raise UnsupportedError(
            f"{step.kind}: transformers loads packed experts without zeros alone; use symmetric: true"
        )
    embeddings = (8 if gguf else None) if step.embeddings == "auto" else step.embeddings
    if gguf and bits == 8 and not symmetric:
        raise UnsupportedError(f"{step.kind}: gguf has no 8-bit type with zeros; use symmetric: true")
    float_zeros = _float_zeros(step, symmetric, exports)
    # Scale times code difference has to fit the 11 digits of float16: GGUF stores that product as a
    # minimum, and stock loaders of a folder multiply in the dtype of the scale.
    exact = min(8, 11 - bits) if not symmetric and not float_zeros and bits <= 5 else 8
    digits = exact if step.scale_digits == "auto" else step.scale_digits
    if gguf and digits > exact:
        raise UnsupportedError(
            f"{step.kind}: gguf stores {bits}-bit minima exactly up to scale_digits: {exact}"
        )
    return {
        "group": group,
        "symmetric": symmetric,
        "float_zeros": float_zeros,
        "embeddings": embeddings,
        "scale_digits": digits,
    }


def _float_zeros(step: Quantizer, symmetric: bool, exports: tuple[str, ...]) -> bool:
    """Whether zeros may be any number: where nothing is said, where every export stores them so."""
    without = [name for name in exports if not EXPORTERS[name].float_zeros]
    if step.float_zeros == "auto":
        return bool(exports) and not symmetric and not without
    if step.float_zeros and without:
        raise UnsupportedError(
            f"{step.kind}: {without[0]} cannot store float zeros; "
            "use float_zeros: false, or export gguf alone"
        )
    return step.float_zeros
