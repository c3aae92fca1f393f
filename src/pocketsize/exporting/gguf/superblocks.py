"""A super-block matrix as GGUF's k-quants: the codes, multiples and float16 it has, nothing rounded again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.quantization.grid import QWeight, multiples
from pocketsize.quantization.scheme import NAMED, SUPER_BLOCK, Scheme


@dataclass(frozen=True, slots=True)
class SuperBlockType:
    """A GGUF type of 256 weights a block."""

    name: str
    scheme: Scheme

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights."""
        return round(columns * self.scheme.bits_per_weight(columns) / 8)


TYPES: Mapping[Scheme, SuperBlockType] = MappingProxyType(
    {scheme: SuperBlockType(name, scheme) for name, scheme in NAMED.items() if scheme.super_blocks}
)


def super_block_type(scheme: Scheme, columns: int, name: str) -> SuperBlockType:
    """The type that holds a super-block matrix; `name` is for the error."""
    if scheme not in TYPES:
        raise UnsupportedError(
            f"{name}: GGUF has super-blocks as {', '.join(t.name for t in TYPES.values())}"
        )
    if columns % SUPER_BLOCK:
        raise UnsupportedError(f"{name}: {SUPER_BLOCK} does not divide its rows of {columns} weights")
    return TYPES[scheme]


def pack(weight: QWeight, name: str) -> UInt8[np.ndarray, "out bytes"]:
    """The rows of a super-block matrix as block bytes; `name` is for errors."""
    out, columns = weight.codes.shape
    kind = super_block_type(weight.scheme, columns, name)
    codes = weight.codes.numpy().reshape(-1, SUPER_BLOCK)
    try:
        found = multiples(weight)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error
    units = [_halves(unit) for unit, _ in found]
    counts = [count.numpy().reshape(len(codes), -1) for _, count in found]
    parts = {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}[kind.name](codes, counts, units)
    return np.concatenate(parts, axis=1).reshape(out, kind.row_bytes(columns))


def _q2(codes: np.ndarray, counts: list[np.ndarray], units: list[np.ndarray]) -> list[np.ndarray]:
    return [(counts[0] | counts[1] << 4).astype(np.uint8), _planes(codes, 2, 32), *units]


def _q3(codes: np.ndarray, counts: list[np.ndarray], units: list[np.ndarray]) -> list[np.ndarray]:
    high, low = _planes(codes >> 2, 1, 32), _planes(codes & 3, 2, 32)
    n = (counts[0] + 32).astype(np.uint8)
    return [high, low, _planes(n & 15, 4, 8), _planes(n >> 4, 2, 4), *units]


def _q4(codes: np.ndarray, counts: list[np.ndarray], units: list[np.ndarray]) -> list[np.ndarray]:
    return [*units, _six_bits(*counts), _planes(codes, 4, 32)]


def _q5(codes: np.ndarray, counts: list[np.ndarray], units: list[np.ndarray]) -> list[np.ndarray]:
    return [*units, _six_bits(*counts), _planes(codes >> 4, 1, 32), _planes(codes & 15, 4, 32)]


def _q6(codes: np.ndarray, counts: list[np.ndarray], units: list[np.ndarray]) -> list[np.ndarray]:
    signed = counts[0].astype(np.int8).view(np.uint8)
    return [_planes(codes & 15, 4, 64), _planes(codes >> 4, 2, 32), signed, *units]


def _planes(values: np.ndarray, bits: int, run: int) -> UInt8[np.ndarray, "blocks bytes"]:
    """Values of so many bits side by side in bytes: what shares a byte lies `run` apart."""
    per = 8 // bits
    grouped = values.astype(np.uint8).reshape(len(values), -1, per, run)
    shifts = (bits * np.arange(per, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(grouped << shifts, axis=2).reshape(len(values), -1)


def _six_bits(scales: np.ndarray, minima: np.ndarray) -> UInt8[np.ndarray, "blocks 12"]:
    """Eight scales and eight minima of six bits: four of each whole, with two bits of the others."""
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    low, high = slice(0, 4), slice(4, 8)
    rest = (s[:, high] & 15) | (m[:, high] & 15) << 4
    return np.concatenate([s[:, low] | s[:, high] >> 4 << 6, m[:, low] | m[:, high] >> 4 << 6, rest], axis=1)


def _halves(values: Tensor) -> UInt8[np.ndarray, "blocks 2"]:
    """Float16 numbers as little-endian bytes."""
    return values.to(torch.float16).numpy().astype("<f2").reshape(-1, 1).view(np.uint8)
