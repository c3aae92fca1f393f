"""A model as a 4-bit bitsandbytes checkpoint: NF4, a float32 scale for 64 weights of a row.

Its blocks run along the matrix as one line of weights, which are our groups wherever 64 divides a row. Two
codes share a byte, the first in its high half. What is no tensor is JSON in the bytes of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from pocketsize.exporting.packed import Packing, unpackable
from pocketsize.io.checkpoint import TensorSpec
from pocketsize.models.model import Model
from pocketsize.models.skeleton import skeleton
from pocketsize.quantization.codebook import CODEBOOKS
from pocketsize.quantization.scheme import Scheme

BLOCK = 64
STATE = "quant_state.bitsandbytes__nf4"


def lacks(scheme: Scheme) -> str | None:
    """What the format cannot hold of a scheme."""
    if scheme.codebook != "nf4":
        return f"codes of {scheme.name}, only NF4"
    return None if scheme.group == BLOCK else f"groups of {scheme.group}"


def refuses(model: Model) -> str | None:
    """Why no such checkpoint can be made of a model; None where one can."""
    if model.arch.transposed:
        return f"its blocks run along rows, and {model.config.model_type} stores inputs first; use folder"
    return unpackable(model, rows=1, columns=BLOCK)


def _config(model: Model, schemes: Mapping[str, Scheme]) -> dict[str, object]:
    """What transformers and vLLM read of how the linears are packed."""
    linears = [name for name, module in skeleton(model).named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [name for name in linears if f"{name}.weight" not in schemes],
    }


def _parts(model: Model, name: str, scheme: Scheme) -> Iterator[TensorSpec]:
    """The tensors of one linear."""
    rows, columns = model.matrix_shape(name)
    weights, blocks = rows * columns, rows * columns // BLOCK
    state = _state(model, rows, columns)

    def codes() -> Tensor:
        flat = model.quantized[name].codes.reshape(-1)
        return ((flat[::2] << 4) | flat[1::2])[:, None]

    yield TensorSpec(name, torch.uint8, (weights // 2, 1), codes)
    yield TensorSpec(
        f"{name}.absmax", torch.float32, (blocks,), lambda: model.quantized[name].scale.reshape(-1)
    )
    table = CODEBOOKS["nf4"].tensor(torch.device("cpu"))
    yield TensorSpec(f"{name}.quant_map", torch.float32, (len(table),), lambda: table)
    yield TensorSpec(f"{name}.{STATE}", torch.uint8, (len(state),), lambda: state)


def _state(model: Model, rows: int, columns: int) -> UInt8[Tensor, "bytes"]:
    """What is no tensor, as bytes."""
    dtype = str(model.dtype).removeprefix("torch.")
    said = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": [rows, columns]}
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


NF4 = Packing("bitsandbytes", _parts, _config)
