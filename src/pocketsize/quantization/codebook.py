"""Codebooks: tables of the values that codes stand for, and the ways in which their scales are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

# Scales as compiled loops are told of them; their cached code holds these numbers.
SCALES = ("half", "float", "e8m0", "e4m3")
HALF, FLOAT, E8M0, E4M3 = range(len(SCALES))
SCALE_BITS: Mapping[str, int] = MappingProxyType({"half": 16, "float": 32, "e8m0": 8, "e4m3": 8})
# No scale is smaller: of powers of two the least that float32 has all digits of; of floats one whose
# products with any table are far from the least numbers.
LEAST: Mapping[str, float] = MappingProxyType({"half": 2.0**-17, "float": 2.0**-100, "e8m0": 2.0**-126})
# The largest float8 (e4m3) and its least normal number; it has 4 significant binary digits.
E4M3_MOST, E4M3_NORMAL, E4M3_LEAST, E4M3_DIGITS = 448.0, 2.0**-6, 2.0**-9, 4
# What a table of fewer entries is filled up with where compiled loops compare: above any weight.
_BEYOND = 3e38


@dataclass(frozen=True, slots=True)
class Codebook:
    """The values of codes 0, 1, ..., rising, and the bits that a stored code takes.

    `scales` says how the scale of a group is stored: as float16, as float32, as a power of two (`e8m0`), or
    as a float8 under one scale of the matrix (`e4m3`). `stored` is what formats that number the values in
    another order write for each code. `by_mean`: a scale is the mean magnitude of its weights rather than
    what puts the largest at the end of the table.
    """

    values: tuple[float, ...]
    scales: str = "half"
    bits: float = 4
    stored: tuple[int, ...] | None = None
    by_mean: bool = False

    @property
    def reach(self) -> float:
        """The largest magnitude in the table."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    @property
    def lopsided(self) -> bool:
        """Whether the values are other than their negatives, so that a scale may gain by being negative."""
        return any(a != -b for a, b in zip(self.values, reversed(self.values), strict=True))

    def tensor(self, device: torch.device) -> Float[Tensor, "entries"]:
        """The values, float32."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def middles(self, device: torch.device) -> Float[Tensor, "gaps"]:
        """Where the nearest value changes, float32; a weight that lies there takes the lower one."""
        values = torch.tensor(self.values, dtype=torch.float64)
        return ((values[1:] + values[:-1]) / 2).to(torch.float32).to(device)

    def padded(self) -> tuple[Float[Tensor, "16"], Float[Tensor, "16"]]:
        """Values and middles as compiled loops read them, 16 each; no weight reaches what fills them up."""
        cpu = torch.device("cpu")
        values, middles = torch.zeros(16), torch.full((16,), _BEYOND)
        values[: len(self.values)] = self.tensor(cpu)
        middles[: len(self.values) - 1] = self.middles(cpu)
        return values, middles


# Floats of 4 bits, one of them for the sign (OCP Microscaling Formats 1.0, 5.3.3); 0 has one code here.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*(-x for x in reversed(_MAGNITUDES[1:])), *_MAGNITUDES)
_AS_BITS = (*range(15, 8, -1), *range(8))

CODEBOOKS: Mapping[str, Codebook] = MappingProxyType(
    {
        # Quantiles of a normal distribution, scaled to -1 .. 1, with an exact zero: arXiv:2305.14314, app. E.
        "nf4": Codebook(
            (
                *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
                *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
                *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
                *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
            ),
            "float",
        ),
        # OCP Microscaling Formats 1.0: groups of 32 under a power of two.
        "mxfp4": Codebook(_E2M1, "e8m0", stored=_AS_BITS),
        # The same floats in groups of 16 under a float8, as NVIDIA's tensor cores multiply them.
        "nvfp4": Codebook(_E2M1, "e4m3", stored=_AS_BITS),
        # The table of llama.cpp's IQ4_NL and IQ4_XS.
        "iq4_nl": Codebook(
            tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
        ),
        # BitNet b1.58, arXiv:2402.17764: codes of 2 bits, or five in a byte as llama.cpp's TQ1_0 packs them
        # (16 of its 256 take two bits each, so all together 13/8 a code).
        "ternary": Codebook((-1.0, 0.0, 1.0), bits=2, by_mean=True),
        "trits": Codebook((-1.0, 0.0, 1.0), bits=1.625, by_mean=True),
    }
)


def unit_of(W: Float[Tensor, "out in"], codebook: Codebook) -> float:
    """The scale of a whole matrix under which scales of its groups are float8: a power of two.

    A floating point scale gains nothing by any other number, and so what a code stands for has few digits.
    The largest group's scale lies between 128 and 256 units, which leaves it room to grow up to 448.
    """
    most = float(W.abs().amax()) / codebook.reach if W.numel() else 0.0
    return 2.0 ** (_ceil_log2(most) - 8) if most > 0 else 1.0


def unit_within(scale: Float[Tensor, "out groups"]) -> float:
    """The least unit in which these scales are float8."""
    return 2.0 ** _ceil_log2(float(scale.abs().amax()) / E4M3_MOST)


def _ceil_log2(x: float) -> int:
    mantissa, exponent = torch.frexp(torch.tensor(x, dtype=torch.float64))
    return int(exponent) - int(mantissa == 0.5)


def whole_power(scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """The nearest powers of two, by the arithmetic middle."""
    mantissa, exponent = torch.frexp(scale.to(torch.float64))
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa <= 0.75).to(exponent.dtype)).to(
        torch.float32
    )


def digits_of(scale: Float[Tensor, "out groups"], digits: int) -> Float[Tensor, "out groups"]:
    """The nearest numbers with so many significant binary digits."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2.0**digits).round(), exponent - digits)


def as_e4m3(scale: Float[Tensor, "out groups"], unit: float) -> Float[Tensor, "out groups"]:
    """The nearest scales that are float8 (e4m3) in this unit, none zero."""
    return (scale / unit).clamp(E4M3_LEAST, E4M3_MOST).to(torch.float8_e4m3fn).to(torch.float32) * unit
