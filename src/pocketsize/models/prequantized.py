"""Folders that are quantized already, read as the matrices they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from pocketsize.errors import DataError
from pocketsize.io.checkpoint import Checkpoint, Entry, Packed
from pocketsize.models.arch import Arch
from pocketsize.models.packing import SPARSE, Prequantized
from pocketsize.pruning.bitmask import rows_of_bits, spread, unpacked_codes
from pocketsize.quantization.codebook import CODEBOOKS
from pocketsize.quantization.unpack import (
    awq_matrix,
    gptq_matrix,
    grouped_matrix,
    table_matrix,
    unpack_halves,
    unpack_rows,
)

_SCALES = ("F16", "BF16", "F32")
_STATE = "weight.quant_state.bitsandbytes__nf4"


def unpacked(checkpoint: Checkpoint, how: Prequantized, arch: Arch) -> Checkpoint:
    """The checkpoint with each packed matrix as one tensor, unpacked whenever it is read."""
    codes, parts, make = _LAYOUTS[how.layout]
    tell = "weight_scale" if how.plain else codes  # plain codes have the name of any weight
    owners = [name.removesuffix(tell) for name in checkpoint.entries if name.endswith(f".{tell}")]
    if not owners:
        raise DataError(f"{checkpoint.folder}: said to be {how}, yet no tensor ends in {tell}")
    entries, packed = dict(checkpoint.entries), {}
    for owner in owners:
        held = {part: entries.pop(owner + part) for part in (codes, *parts) if owner + part in entries}
        layer = _Layer(checkpoint, owner, held, how, arch.is_transposed(arch.module_name(f"{owner}weight")))
        entry = Entry(
            f"{owner}weight",
            held[codes].file,
            "F32",
            layer.shape(),
            0,
            sum(e.end - e.begin for e in held.values()),
        )
        entries[entry.name] = replace(entry, packed_as=str(replace(how, rounds=False)))
        packed[entry.name] = Packed(partial(make, layer), tuple(sorted({e.file for e in held.values()})))
    return Checkpoint(checkpoint.folder, MappingProxyType(entries), MappingProxyType(packed))


@dataclass(frozen=True, slots=True)
class _Layer:
    """The tensors that stand for one matrix, by the ends of their names.

    `flip`: the family stores inputs first.
    """

    checkpoint: Checkpoint
    owner: str
    held: Mapping[str, Entry]
    how: Prequantized
    flip: bool

    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix as the family stores it."""
        if self.how.method == "bitsandbytes":
            return self._said_shape()
        if self.how.method in ("nvfp4", "mxfp4"):
            rows, halves = self.table("weight_packed")
            return rows, 2 * halves
        if self.how.plain:
            return self.table("weight")
        if self.how.method in ("compressed-tensors", SPARSE):
            told = "shape" if self.how.method == SPARSE else "weight_shape"
            sizes = self.part(told, None, "I32", "I64").tolist()
            if len(sizes) != 2 or not all(0 < n < 1 << 31 for n in sizes):
                raise self.fault(told, f"is {str(sizes)[:80]}; two sizes are needed")
            return tuple(sizes)
        words, width = self.table("qweight")
        bits = self.how.bits[0]
        shape = (width * 32 // bits, words) if self.how.method == "awq" else (width, words * 32 // bits)
        return shape[::-1] if self.flip else shape

    def _said_shape(self) -> tuple[int, ...]:
        """The shape in what bitsandbytes writes as JSON; refuses what is not plain NF4 in our blocks."""
        said = bytes(self.part(_STATE, None, "U8").tolist())
        try:
            state = json.loads(said)
            sizes, kind, block = state["shape"], state["quant_type"], state["blocksize"]
        except (ValueError, KeyError, TypeError) as error:
            raise self.fault(_STATE, f"is not readable: {error}") from error
        if kind != "nf4" or block not in self.how.groups or "nested_blocksize" in state:
            raise self.fault(_STATE, f"says {str(state)[:120]}; plain nf4 in blocks of 64 is read")
        if (
            not isinstance(sizes, list)
            or len(sizes) != 2
            or not all(isinstance(n, int) and n > 0 for n in sizes)
        ):
            raise self.fault(_STATE, f"says the shape {str(sizes)[:80]}; two sizes are needed")
        return tuple(sizes)

    def entry(self, part: str) -> Entry:
        """Where a part is; it must be there."""
        if part not in self.held:
            raise DataError(f"{self.checkpoint.folder}: tensor {self.owner}{part} is missing")
        return self.held[part]

    def table(self, part: str) -> tuple[int, int]:
        """Rows and columns of a part, which must be a matrix."""
        shape = self.entry(part).shape
        if len(shape) != 2 or 0 in shape:
            raise self.fault(part, f"has shape {list(shape)}; rows and columns are needed")
        return shape[0], shape[1]

    def part(self, part: str, shape: tuple[int, ...] | None, *dtypes: str) -> Tensor:
        """A part, of this shape and one of these types."""
        entry = self.entry(part)
        if entry.dtype not in dtypes:
            raise self.fault(part, f"is stored as {entry.dtype}; needed: {', '.join(dtypes)}")
        if shape is not None and entry.shape != shape:
            raise self.fault(part, f"has shape {list(entry.shape)}, {list(shape)} is needed")
        return self.checkpoint.read(entry.name)

    def fault(self, part: str, text: str) -> DataError:
        """An error about a part."""
        file = self.checkpoint.folder / self.held[part].file
        return DataError(f"{file}: tensor {self.owner}{part} {text}")

    def groups(self, inputs: int, groups: int, index: str) -> Tensor:
        """The group of each input: as the tensor `index` says, or one after the other.

        There must be as many as the config implies.
        """
        width = next((w for w in (g or inputs for g in self.how.groups) if -(-inputs // w) == groups), None)
        if width is None:
            where = f"{self.checkpoint.folder}: {self.owner}weight"
            raise DataError(f"{where}: {groups} groups for {inputs} inputs, which is not {self.how}")
        if index in self.held:
            group_of = self.part(index, (inputs,), "I32", "I64").long()
            if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
                raise self.fault(index, f"names a group outside the {groups} that there are")
            return group_of
        return torch.arange(inputs) // width

    def as_stored(self, W: Tensor) -> Tensor:
        """A matrix with a row for each output as the family stores it."""
        return W.T.contiguous() if self.flip else W


def _gptq(layer: _Layer) -> Tensor:
    outputs, inputs = layer.shape()[::-1] if layer.flip else layer.shape()
    bits = layer.how.bits[0]
    groups = layer.table("scales")[0]
    W = gptq_matrix(
        layer.part("qweight", None, "I32"),
        layer.part("qzeros", (groups, outputs * bits // 32), "I32"),
        layer.part("scales", (groups, outputs), *_SCALES).float(),
        layer.groups(inputs, groups, "g_idx"),
        bits=bits,
        shifted=layer.how.shifted,
    )
    return layer.as_stored(W)


def _awq(layer: _Layer) -> Tensor:
    outputs, inputs = layer.shape()[::-1] if layer.flip else layer.shape()
    groups = layer.table("scales")[0]
    W = awq_matrix(
        layer.part("qweight", (inputs, outputs // 8), "I32"),
        layer.part("qzeros", (groups, outputs // 8), "I32"),
        layer.part("scales", (groups, outputs), *_SCALES).float(),
        layer.groups(inputs, groups, ""),
    )
    return layer.as_stored(W)


def _compressed_tensors(layer: _Layer) -> Tensor:
    """Rows of codes with a scale for each group; or, inputs first, with one for a block of rows."""
    rows, columns = layer.shape()
    words = layer.table("weight_packed")[1]
    fits = [bits for bits in layer.how.bits if -(-columns * bits // 32) == words]
    if len(fits) != 1:
        raise layer.fault(
            "weight_packed", f"has {words} words a row, which no scheme gives {columns} columns"
        )
    bits = fits[0]
    codes = unpack_rows(layer.part("weight_packed", (rows, words), "I32"), bits, columns)
    tall, wide = layer.table("weight_scale")
    scale = layer.part("weight_scale", None, *_SCALES).float()
    if wide == columns and tall < rows and layer.flip:
        zero = torch.full((tall, wide), 1 << (bits - 1), dtype=torch.uint8)
        if "weight_zero_point" in layer.held:
            zero = (layer.part("weight_zero_point", (tall, wide), "I8").int() + (1 << (bits - 1))).to(
                torch.uint8
            )
        turned = codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous()
        return grouped_matrix(*turned, layer.groups(rows, tall, "")).T.contiguous()
    if tall != rows:
        raise layer.fault("weight_scale", f"has {tall} rows, {rows} are needed")
    zero = torch.full((rows, wide), 1 << (bits - 1), dtype=torch.uint8)
    if "weight_zero_point" in layer.held:
        packed = layer.part("weight_zero_point", (-(-rows * bits // 32), wide), "I32")
        zero = unpack_rows(packed.T.contiguous(), bits, rows).T.contiguous()
    return grouped_matrix(codes, scale, zero, layer.groups(columns, wide, "weight_g_idx"))


def _fp4(layer: _Layer) -> Tensor:
    """Floats of 4 bits, two in a byte, under float8 and one scale of the matrix, or under powers of two."""
    (rows, columns), width = layer.shape(), layer.how.groups[0] or 1
    codes = unpack_halves(layer.part("weight_packed", (rows, columns // 2), "U8"))
    groups = (rows, columns // width)
    if layer.how.method == "mxfp4":
        scale = torch.exp2(layer.part("weight_scale", groups, "U8").float() - 127)
    else:
        divisor = layer.part("weight_global_scale", (1,), "F32")
        scale = layer.part("weight_scale", groups, "F8_E4M3").float() / divisor
    table = CODEBOOKS[layer.how.method]
    assert table.stored is not None
    values = torch.zeros(16).scatter(0, torch.tensor(table.stored), torch.tensor(table.values))
    return table_matrix(codes, scale, values)


def _bitsandbytes(layer: _Layer) -> Tensor:
    """NF4 along the matrix as one line of weights."""
    (rows, columns), block = layer.shape(), layer.how.groups[0] or 1
    weights = rows * columns
    if weights % block:
        raise layer.fault("weight", f"has {weights} values, no multiple of {block}")
    packed = layer.part("weight", (weights // 2, 1), "U8").view(1, -1)
    scale = layer.part("weight.absmax", (weights // block,), "F32").view(1, -1)
    values = layer.part("weight.quant_map", (16,), "F32")
    return layer.as_stored(
        table_matrix(unpack_halves(packed, high_first=True), scale, values).view(rows, columns)
    )


def _plain(layer: _Layer) -> Tensor:
    """Codes as whole numbers around 0, or as floats, with one scale for each row or for all."""
    rows, columns = layer.shape()
    codes = layer.part("weight", (rows, columns), "I8", "F8_E4M3").to(torch.float32)
    scale = layer.part("weight_scale", None, *_SCALES).float()
    if scale.numel() not in (1, rows) or scale.ndim > 2 or (scale.ndim == 2 and scale.shape[1] != 1):
        raise layer.fault("weight_scale", f"has shape {list(scale.shape)}; one for each row is needed")
    return codes * scale.reshape(-1, 1)


def _sparse(layer: _Layer) -> Tensor:
    """What is not zero, put where its bit is set; its codes under scales where it is quantized."""
    lines, across = layer.shape()
    mask = rows_of_bits(layer.part("bitmask", (lines, -(-across // 8)), "U8"), across)
    left = int(mask.sum())
    if "compressed" in layer.held:
        S = spread(layer.part("compressed", (left,), *_SCALES).float(), mask)
        if "left" not in layer.held:
            return S
        left, right = (layer.part(part, None, *_SCALES).float() for part in ("left", "right"))
        if left.ndim != 2 or right.ndim != 2 or (len(left), right.shape[1]) != layer.as_stored(S).shape:
            raise layer.fault("left", f"and right have shapes {list(left.shape)} and {list(right.shape)}")
        return S + layer.as_stored(left @ right)
    words = layer.entry("codes").shape
    fits = [bits for bits in layer.how.bits if words == (-(-left * bits // 32),)]
    if len(fits) != 1:
        raise layer.fault("codes", f"has shape {list(words)}, which no width gives {left} weights")
    bits, (rows, columns) = fits[0], (across, lines) if layer.flip else (lines, across)
    codes = spread(unpacked_codes(layer.part("codes", words, "I32"), left, bits), mask)
    scale = layer.part("scale", None, *_SCALES).float()
    if scale.ndim != 2 or scale.shape[0] != rows:
        raise layer.fault("scale", f"has shape {list(scale.shape)}; {rows} rows are needed")
    zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    if "zero_point" in layer.held:
        packed = layer.part("zero_point", (-(-scale.numel() * bits // 32),), "I32")
        zero = unpacked_codes(packed, scale.numel(), bits).view(scale.shape)
    turned = layer.as_stored(codes)
    W = grouped_matrix(turned, scale, zero, layer.groups(columns, scale.shape[1], ""))
    return layer.as_stored(W) * mask


# The end of the codes' name, those of what belongs to them, and what makes the matrix of them.
_LAYOUTS: Mapping[str, tuple[str, tuple[str, ...], Callable[[_Layer], Tensor]]] = MappingProxyType(
    {
        "gptq": ("qweight", ("qzeros", "scales", "g_idx"), _gptq),
        "awq": ("qweight", ("qzeros", "scales"), _awq),
        "compressed-tensors": (
            "weight_packed",
            ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
            _compressed_tensors,
        ),
        "nvfp4": ("weight_packed", ("weight_scale", "weight_global_scale"), _fp4),
        "mxfp4": ("weight_packed", ("weight_scale",), _fp4),
        # There scales tell a packed matrix: its codes are called as any weight.
        "bitsandbytes": ("weight.absmax", ("weight", "weight.quant_map", _STATE), _bitsandbytes),
        "compressed-tensors plain": ("weight", ("weight_scale",), _plain),
        SPARSE: (
            "bitmask",
            ("shape", "compressed", "row_offsets", "codes", "scale", "zero_point", "left", "right"),
            _sparse,
        ),
    }
)
