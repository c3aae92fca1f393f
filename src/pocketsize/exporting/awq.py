"""A model as an AWQ checkpoint: AutoAWQ's `gemm` layout, 4 bits, codes and zeros packed along the outputs.

The layout always has zeros; a symmetric grid stores its middle there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pocketsize.exporting import packed
from pocketsize.exporting.packed import Packing, scales, split, unpackable
from pocketsize.io.checkpoint import TensorSpec
from pocketsize.models.model import Model
from pocketsize.models.skeleton import skeleton
from pocketsize.quantization.pack import awq_words
from pocketsize.quantization.scheme import Scheme

BITS = (4,)
_COLUMNS = 8
# Families in whose blocks AutoAWQ put scales behind the activation; without them transformers gives NaN.
_SCALED = ("gpt_neox",)


def lacks(scheme: Scheme) -> str | None:
    """What the format cannot hold of a scheme."""
    return packed.lacks(scheme, BITS)


def refuses(model: Model) -> str | None:
    """Why no AWQ checkpoint can be made of a model; None where one can."""
    if model.config.model_type in _SCALED:
        return f"transformers looks for scales of the activations of {model.config.model_type}; use folder"
    if model.arch.transposed:
        return f"its readers pack nn.Linear alone, and {model.config.model_type} has Conv1D; use folder"
    return split(model) or unpackable(model, rows=_COLUMNS, columns=1, encoders=True)


def _config(model: Model, schemes: Mapping[str, Scheme]) -> dict[str, object]:
    """What AutoAWQ, vLLM and transformers read of how the linears are packed."""
    scheme = next(iter(schemes.values()))
    linears = [name for name, module in skeleton(model).named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [name for name in linears if f"{name}.weight" not in schemes],
    }


def _parts(model: Model, name: str, scheme: Scheme) -> Iterator[TensorSpec]:
    """The tensors of one linear."""
    rows, columns = model.matrix_shape(name)
    owner, groups = name.removesuffix("weight"), columns // scheme.width(columns)

    def codes() -> Tensor:
        return awq_words(model.quantized[name].codes.T.contiguous())

    def zeros() -> Tensor:
        return awq_words(model.quantized[name].zero.to(torch.uint8).T.contiguous())

    yield TensorSpec(f"{owner}qweight", torch.int32, (columns, rows // _COLUMNS), codes)
    yield TensorSpec(f"{owner}qzeros", torch.int32, (groups, rows // _COLUMNS), zeros)
    yield scales(model, name, scheme, f"{owner}scales")


GEMM = Packing("awq", _parts, _config)
