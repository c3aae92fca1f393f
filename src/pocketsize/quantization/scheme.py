"""How a weight matrix is stored: width, group and symmetry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pocketsize.errors import UnsupportedError, UsageError, did_you_mean

BITS = (2, 3, 4, 5, 8)
# What a group's grid may be, as compiled loops are told; their cached code holds these numbers.
SYMMETRIC, INTEGER_ZEROS, FLOAT_ZEROS = range(3)
GROUPS = (128, 96, 64, 32)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight matrix is stored: `bits` per code, one scale per `group` inputs.

    `group` None means one scale per output row. `scale_digits` is the number of significant
    binary digits of a stored scale: 8 fits bfloat16 and float16 alike; fewer are kept where
    the product of scale and whole zero has to fit float16 as well (the minimum of GGUF Q4_1).
    With `float_zeros` the zero need not be a whole number: what is stored is the value of code 0, as
    float16.
    """

    bits: int = 4
    group: int | None = 128
    symmetric: bool = False
    scale_digits: int = 8
    float_zeros: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise UsageError(f"group must be positive or null (one scale per row), got {self.group}")
        if not 4 <= self.scale_digits <= 8:
            raise UsageError(f"scale_digits must be 4..8, got {self.scale_digits}")
        if self.symmetric and self.float_zeros:
            raise UsageError("a symmetric grid has no zeros: float_zeros needs symmetric: false")

    @property
    def top(self) -> int:
        """The largest code; codes are 0 .. top."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 2 ** (self.bits - 1)

    @property
    def grid(self) -> int:
        """Which of the three grids this is."""
        return SYMMETRIC if self.symmetric else FLOAT_ZEROS if self.float_zeros else INTEGER_ZEROS

    def width(self, columns: int) -> int:
        """Inputs per scale in a matrix with `columns` inputs; refuses a group that does not divide."""
        if self.group is None:
            return columns
        if columns % self.group:
            raise UnsupportedError(f"group {self.group} does not divide a row of {columns} weights")
        return self.group

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight of a matrix with `columns` inputs: codes, 16-bit scales, zeros.

        A whole zero is packed as a code is, a float one takes 16 bits.
        """
        zero = (0, self.bits, 16)[self.grid]
        return self.bits + (16 + zero) / self.width(columns)

    @property
    def name(self) -> str:
        """The field's name for it: `W4A16`."""
        return f"W{self.bits}A16"


# Schemes that people know by a name which says everything about the grid.
NAMED: Mapping[str, Scheme] = MappingProxyType(
    {
        "Q8_0": Scheme(8, 32, symmetric=True),
        "Q5_1": Scheme(5, 32, float_zeros=True),
        "Q5_0": Scheme(5, 32, symmetric=True),
        "Q4_1": Scheme(4, 32, float_zeros=True),
        "Q4_0": Scheme(4, 32, symmetric=True),
    }
)


def named(word: str) -> Scheme | None:
    """The scheme that goes by this name, in any case; None for a width such as `W4A16`."""
    return NAMED.get(word.upper())


def bits_of(word: str) -> int:
    """The width of codes in a scheme's name: `W4A16`, or one that says everything, such as `Q4_0`."""
    if (scheme := named(word)) is not None:
        return scheme.bits
    found = re.fullmatch(r"[wW](\d)[aA]16", word)
    if not found or int(found[1]) not in BITS:
        known = [*(f"W{b}A16" for b in BITS), *NAMED]
        raise UsageError(f"unknown scheme {word!r}{did_you_mean(word.upper(), known)}")
    return int(found[1])


def default_group(widths: Iterable[int], legal: Iterable[int] = GROUPS) -> int:
    """The largest of 128, 96, 64, 32 that divides every width and is in `legal`."""
    columns, allowed = sorted(set(widths)), set(legal)
    for group in GROUPS:
        if group in allowed and all(c % group == 0 for c in columns):
            return group
    raise UnsupportedError(
        f"no group of {sorted(allowed)} divides all row widths {columns}; "
        "ask for one scale per row (group: null)"
    )
