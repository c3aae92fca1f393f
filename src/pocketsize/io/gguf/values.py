"""The numbers of a GGUF tensor, dequantized a few rows at a time."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.io.checkpoint import open_plain, read_into
from pocketsize.io.gguf.header import GgufTensor

# Types that a safetensors file holds as they are.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ELEMENTS = 1 << 21


def dtype_of(tensor: GgufTensor) -> torch.dtype:
    """The smallest type that holds the tensor's values exactly: its own, or float32."""
    return FLOATS.get(tensor.kind, torch.float32)


def part_of(tensor: GgufTensor, index: int) -> GgufTensor:
    """The tensor at `index` of those that are stacked in this one."""
    size = (tensor.end - tensor.begin) // tensor.shape[0]
    begin = tensor.begin + index * size
    name = f"{tensor.name}[{index}]"
    return GgufTensor(name, tensor.kind, tensor.shape[1:], tensor.path, begin, begin + size)


def read_values(tensor: GgufTensor) -> Tensor:
    """The tensor in memory of its own, in `dtype_of` it. The blocks of a few rows are held besides."""
    kind, columns = GGMLQuantizationType[tensor.kind], tensor.shape[-1]
    block, size = GGML_QUANT_SIZES[kind]
    rows, row_bytes = math.prod(tensor.shape[:-1]), columns // block * size
    out = torch.empty((rows, columns), dtype=dtype_of(tensor))
    raw = out.view(torch.uint8).numpy()
    step = rows if tensor.kind in FLOATS else max(1, _ELEMENTS // columns)
    descriptor, _ = open_plain(tensor.path)
    try:
        for a in range(0, rows, step):
            b = min(a + step, rows)
            own = raw[a:b].reshape(-1) if tensor.kind in FLOATS else np.empty((b - a) * row_bytes, np.uint8)
            read_into(descriptor, own.data, tensor.begin + a * row_bytes, tensor.path, tensor.name)
            if tensor.kind not in FLOATS:
                out[a:b] = _dequantized(own.reshape(b - a, row_bytes), kind, tensor)
    finally:
        os.close(descriptor)
    return out.reshape(tensor.shape)


def _dequantized(blocks: np.ndarray, kind: GGMLQuantizationType, tensor: GgufTensor) -> Tensor:
    try:
        with np.errstate(all="ignore"):  # NaN and infinity are found, and named, when the model is loaded
            return torch.from_numpy(np.ascontiguousarray(dequantize(blocks, kind), dtype=np.float32))
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{tensor.path}: tensor {tensor.name}: type {tensor.kind} cannot be dequantized; "
            "make the file again from the original with another type"
        ) from error
