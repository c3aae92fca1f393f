"""A model as a GPTQ checkpoint, in either version of the format.

Codes are packed along the inputs, zeros along the outputs, both as dense streams of 32-bit words. The
first version stores zeros less one: of a zero of 0 some readers make 0, vLLM 2^bits, and GPTQModel, which
adds one to whole words, a wrong neighbour; and it loads no folder with zeros that it did not write itself.
So the first version holds symmetric grids here, which all readers agree on, and the second everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

import pocketsize
from pocketsize.exporting import packed
from pocketsize.exporting.packed import Packing, one_for_all, scales, split, unpackable
from pocketsize.io.checkpoint import TensorSpec
from pocketsize.models.model import Model
from pocketsize.quantization.pack import gptq_codes, gptq_zeros
from pocketsize.quantization.scheme import Scheme

BITS = (8, 4, 3, 2)
_WORD = 32


def lacks(scheme: Scheme, *, zeros: bool) -> str | None:
    """What the format cannot hold of a scheme; `zeros`: whether it holds any but the middle."""
    if missing := packed.lacks(scheme, BITS):
        return missing
    return None if scheme.symmetric or zeros else "codes with zeros, as gptq_v2 does"


def mixes(kinds: Sequence[Scheme | None]) -> str | None:
    """Why a folder cannot hold linears of these schemes (None: unquantized) beside each other."""
    if None in kinds and {*kinds} != {None}:
        return (
            "its readers take every linear of the blocks as packed; leave none out, or export folder or awq"
        )
    return one_for_all(kinds)


def refuses(model: Model) -> str | None:
    """Why no GPTQ checkpoint can be made of a model; None where one can."""
    return split(model) or unpackable(model, rows=_WORD, columns=_WORD)


def _config(model: Model, schemes: Mapping[str, Scheme], *, version: str) -> dict[str, object]:
    """What GPTQModel, vLLM and transformers read of how the linears are packed."""
    scheme = next(iter(schemes.values()))
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"pocketsize:{pocketsize.__version__}"]},
    }


def _parts(model: Model, name: str, scheme: Scheme, *, version: str) -> Iterator[TensorSpec]:
    """The tensors of one linear."""
    rows, columns = model.matrix_shape(name)
    owner, width, bits = name.removesuffix("weight"), scheme.width(columns), scheme.bits
    groups, shifted = columns // width, version == "gptq"

    def codes() -> Tensor:
        return gptq_codes(model.quantized[name].codes, bits)

    def zeros() -> Tensor:
        return gptq_zeros(model.quantized[name].zero, bits, shifted=shifted)

    def group_of() -> Tensor:
        return torch.arange(columns, dtype=torch.int32) // width

    yield TensorSpec(f"{owner}qweight", torch.int32, (columns * bits // _WORD, rows), codes)
    yield TensorSpec(f"{owner}qzeros", torch.int32, (groups, rows * bits // _WORD), zeros)
    yield scales(model, name, scheme, f"{owner}scales")
    yield TensorSpec(f"{owner}g_idx", torch.int32, (columns,), group_of)


V1, V2 = (
    Packing(
        version, partial(_parts, version=version), partial(_config, version=version), "quantize_config.json"
    )
    for version in ("gptq", "gptq_v2")
)
