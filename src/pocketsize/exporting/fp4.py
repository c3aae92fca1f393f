"""Floats of 4 bits in a compressed-tensors folder: `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.

Two codes share a byte, the first in its low half. Scales are float8 under one scale of the matrix, which
readers divide by, or the exponents of powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.io.checkpoint import TensorSpec
from pocketsize.models.arch import Arch
from pocketsize.models.model import Model
from pocketsize.quantization.codebook import as_e4m3, unit_within
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import Scheme

FORMATS: Mapping[str | None, str] = MappingProxyType(
    {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
)
_BIAS = 127


def mixes(kinds: Sequence[Scheme], arch: Arch) -> str | None:
    """Why a folder cannot hold these schemes beside each other; None where it can, or has no float4."""
    floats = [kind for kind in kinds if kind.codebook in FORMATS]
    if not floats:
        return None
    if len({*kinds}) > 1:
        return f"{floats[0].name} stands alone in a folder; use one scheme"
    if arch.transposed or arch.dense_on_load or arch.experts is not None:
        return f"transformers unpacks linears of this family as it loads, which it cannot of {floats[0].name}"
    return None


def weights(scheme: Scheme) -> dict[str, object]:
    """What a `quantization_config` says of how weights are stored."""
    spread = "tensor_group" if scheme.codebook == "nvfp4" else "group"
    grid = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": spread, "group_size": scheme.group}
    return {**grid, "dynamic": False, "actorder": None}


def specs(model: Model, name: str, scheme: Scheme) -> list[TensorSpec]:
    """The tensors that a linear becomes."""
    stored_as, (rows, columns) = model.checkpoint.entries[name].name, model.matrix_shape(name)
    groups = (rows, columns // scheme.width(columns))
    packed = TensorSpec(
        f"{stored_as}_packed", torch.uint8, (rows, columns // 2), lambda: _codes(model.quantized[name])
    )
    if scheme.codebook == "mxfp4":
        exponents = TensorSpec(
            f"{stored_as}_scale", torch.uint8, groups, lambda: exponents_of(model.quantized[name].scale)
        )
        return [packed, exponents]

    def scales() -> Tensor:
        return (model.quantized[name].scale / _unit(model, name)).to(torch.float8_e4m3fn)

    def divisor() -> Tensor:
        return torch.tensor([1 / _unit(model, name)])

    scale = TensorSpec(f"{stored_as}_scale", torch.float8_e4m3fn, groups, scales)
    return [packed, scale, TensorSpec(f"{stored_as}_global_scale", torch.float32, (1,), divisor)]


def exponents_of(scale: Float[Tensor, "out groups"]) -> UInt8[Tensor, "out groups"]:
    """The bytes of powers of two (e8m0)."""
    return (torch.frexp(scale).exponent - 1 + _BIAS).to(torch.uint8)


def _codes(weight: QWeight) -> UInt8[Tensor, "out half"]:
    table = weight.scheme.table
    assert table is not None and table.stored is not None
    stored = torch.tensor(table.stored, dtype=torch.uint8)[weight.codes.int()]
    return stored[:, ::2] | (stored[:, 1::2] << 4)


def _unit(model: Model, name: str) -> float:
    """The unit of a matrix's scales: if they allow it, that of all linears which read the same tensor.

    Programs that multiply by those as one matrix take one scale for all of them.
    """
    scale = model.quantized[name].scale
    own = unit_within(scale)
    if not torch.equal(as_e4m3(scale, own), scale):
        raise UnsupportedError(
            f"{name}: scales are no float8 under one scale of the matrix; use step gptq or rtn"
        )
    siblings = [model.quantized[other] for other in _beside(model, name) if other in model.quantized]
    units = [unit_within(q.scale) for q in siblings if q.scheme.codebook == "nvfp4"]
    shared = max([own, *units])
    return shared if torch.equal(as_e4m3(scale, shared), scale) else own


def _beside(model: Model, name: str) -> list[str]:
    """The other linears that read what this one reads."""
    for block in model.blocks:
        for group in model.groups if name.startswith(f"{block}.") else ():
            names = [f"{block}.{inner}.weight" for inner in group.names]
            if name in names:
                return [other for other in names if other != name]
    return []
