"""How a weight matrix is stored: width, group and symmetry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.quantization.codebook import CODEBOOKS, SCALE_BITS, Codebook

BITS = (2, 3, 4, 5, 8)
# What a group's grid may be, as compiled loops are told; their cached code holds these numbers.
SYMMETRIC, INTEGER_ZEROS, FLOAT_ZEROS = range(3)
GROUPS = (128, 96, 64, 32)
# Inputs of a super-block: its groups share the step of which their scales, and that of which their minima
# are whole multiples.
SUPER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight matrix is stored: `bits` per code, one scale per `group` inputs.

    `group` None means one scale per output row. `scale_digits` is the number of significant
    binary digits of a stored scale: 8 fits bfloat16 and float16 alike; fewer are kept where
    the product of scale and whole zero has to fit float16 as well (the minimum of GGUF Q4_1).
    With `float_zeros` the zero need not be a whole number: what is stored is the value of code 0, as
    float16. With fewer than 16 `scale_bits` scales (and the values of code 0) are stored in so many bits, as
    whole multiples of a float16 that the groups of a super-block of 256 inputs share. With a `codebook` codes
    stand for the values of that table, which says how scales are stored too. With `floats` codes are float8
    (e4m3) by their bits rather than whole numbers. With `activations` a linear rounds what it reads as well,
    token by token, to 8 bits of the kind its codes are of.
    """

    bits: int = 4
    group: int | None = 128
    symmetric: bool = False
    scale_digits: int = 8
    float_zeros: bool = False
    scale_bits: int = 16
    codebook: str | None = None
    activations: bool = False
    floats: bool = False

    def __post_init__(self) -> None:
        if self.super_blocks:
            self._check_super_blocks()
        elif self.bits not in BITS:
            raise UsageError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise UsageError(f"group must be positive or null (one scale per row), got {self.group}")
        if not 4 <= self.scale_digits <= 8:
            raise UsageError(f"scale_digits must be 4..8, got {self.scale_digits}")
        if self.symmetric and self.float_zeros:
            raise UsageError("a symmetric grid has no zeros: float_zeros needs symmetric: false")
        if self.codebook not in (None, *CODEBOOKS):
            raise UsageError(f"codebook must be one of {', '.join(CODEBOOKS)}, got {self.codebook}")
        if self.codebook is not None and not self.symmetric:
            raise UsageError(f"codebook {self.codebook} has no zeros: it needs symmetric: true")
        self._check_rounding()

    def _check_rounding(self) -> None:
        if self.floats and (self.bits != 8 or not self.symmetric):
            raise UsageError("codes that are floats have 8 bits and no zeros")
        if self.activations and (self.bits != 8 or not self.symmetric or self.group is not None):
            raise UsageError("rounded inputs go with 8 bits, one scale a row and no zeros")

    @property
    def table(self) -> Codebook | None:
        """The table of a scheme with a codebook."""
        return None if self.codebook is None else CODEBOOKS[self.codebook]

    def _check_super_blocks(self) -> None:
        if self.bits not in (*BITS, 6) or self.scale_bits not in (4, 6, 8):
            raise UsageError(f"no super-blocks of {self.bits}-bit codes, {self.scale_bits}-bit scales")
        if self.group is None or SUPER_BLOCK % self.group or self.symmetric is self.float_zeros:
            raise UsageError("super-blocks need a group that divides 256, and no zeros or float ones")

    @property
    def super_blocks(self) -> bool:
        """Whether the scales of 256 inputs are whole multiples of one number."""
        return self.scale_bits < 16

    @property
    def top_scale(self) -> int:
        """The largest multiple that a scale of a super-block is; on a symmetric grid it has a sign."""
        return 2 ** (self.scale_bits - self.symmetric) - 1

    @property
    def top(self) -> int:
        """The largest code; codes are 0 .. top."""
        return 2**self.bits - 1 if self.table is None else len(self.table.values) - 1

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
        if columns % (whole := SUPER_BLOCK if self.super_blocks else self.group):
            what = f"super-blocks of {whole} do" if self.super_blocks else f"group {whole} does"
            raise UnsupportedError(f"{what} not divide a row of {columns} weights")
        return self.group

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight of a matrix with `columns` inputs: codes, scales of groups, zeros.

        A whole zero is packed as a code is, a float one takes 16 bits; in a super-block as many as a scale.
        """
        if self.table is not None:
            return self.table.bits + SCALE_BITS[self.table.scales] / self.width(columns)
        if self.super_blocks:
            own, shared = self.scale_bits / self.width(columns), 16 / SUPER_BLOCK
            return self.bits + (1 + self.float_zeros) * (own + shared)
        zero = (0, self.bits, 16)[self.grid]
        return self.bits + (16 + zero) / self.width(columns)

    @property
    def name(self) -> str:
        """The field's name for it: `W4A16`, `W8A8`, or that of a codebook."""
        own = next((name for name, known in NAMED.items() if known == self), None)
        if own is not None and (self.codebook or self.floats):
            return own
        return f"W{self.bits}A{8 if self.activations else 16}"

    def facts(self) -> dict[str, Any]:
        """Its fields as plain data; those that most schemes do without only where they have them."""
        return {key: value for key, value in asdict(self).items() if key not in _RARE or _RARE[key] != value}


_RARE: Mapping[str, object] = MappingProxyType(
    {"scale_bits": 16, "codebook": None, "activations": False, "floats": False}
)

# Schemes that people know by a name which says everything about the grid.
NAMED: Mapping[str, Scheme] = MappingProxyType(
    {
        "Q8_0": Scheme(8, 32, symmetric=True),
        "Q5_1": Scheme(5, 32, float_zeros=True),
        "Q5_0": Scheme(5, 32, symmetric=True),
        "Q4_1": Scheme(4, 32, float_zeros=True),
        "Q4_0": Scheme(4, 32, symmetric=True),
        "NF4": Scheme(4, 64, symmetric=True, codebook="nf4"),
        "IQ4_NL": Scheme(4, 32, symmetric=True, codebook="iq4_nl"),
        "NVFP4": Scheme(4, 16, symmetric=True, codebook="nvfp4"),
        "MXFP4": Scheme(4, 32, symmetric=True, codebook="mxfp4"),
        "TERNARY": Scheme(2, None, symmetric=True, codebook="ternary"),
        "TQ2_0": Scheme(2, 256, symmetric=True, codebook="ternary"),
        "TQ1_0": Scheme(2, 256, symmetric=True, codebook="trits"),
        "Q6_K": Scheme(6, 16, symmetric=True, scale_bits=8),
        "Q5_K": Scheme(5, 32, float_zeros=True, scale_bits=6),
        "Q4_K": Scheme(4, 32, float_zeros=True, scale_bits=6),
        "Q3_K": Scheme(3, 16, symmetric=True, scale_bits=6),
        "Q2_K": Scheme(2, 16, float_zeros=True, scale_bits=4),
        "W8A8": Scheme(8, None, symmetric=True, activations=True),
        "FP8": Scheme(8, None, symmetric=True, activations=True, floats=True),
    }
)


def named(word: str) -> Scheme | None:
    """The scheme that goes by this name, in any case; None for a width such as `W4A16`."""
    return NAMED.get(word.upper())


def bits_of(word: str) -> int:
    """The width of codes in a scheme's name: `W4A16`, or one that says everything, such as `Q4_0`."""
    if (scheme := named(word)) is not None:
        return scheme.bits
    if re.fullmatch(r"Q4_[23]|(Q4_0|IQ4_NL)_[48]_[48]", word.upper()):
        raise UnsupportedError(f"{word}: this type was removed from GGUF; use Q4_0, Q4_1 or Q4_K")
    found = re.fullmatch(r"[wW](\d)[aA]16", word)
    if found and int(found[1]) < min(BITS):
        least = f"W{min(BITS)}A16"
        raise UsageError(f"unknown scheme {word!r}: {least} has the fewest bits, TERNARY three values")
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
