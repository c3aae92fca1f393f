"""The model that is written, digit for digit: what is not quantized, in the type that it is stored in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pocketsize.exporting.table import EXPORTERS
from pocketsize.io.checkpoint import DTYPES
from pocketsize.models.model import Model


def as_written(model: Model, exports: Sequence[str]) -> Model:
    """The model as its exports have it: figures are to be of what is written, not of float32 numbers.

    A folder stores all that is not quantized in the model's `dtype`. Where a GGUF is written the figures are
    of that: matrices are float16 and vectors float32, unless all digits were asked for.
    """
    if model.dtype == torch.float32:
        return model
    if all(EXPORTERS[name].is_folder for name in exports):
        return replace(model, changed=_Stored(model, model.dtype, model.dtype))
    return replace(model, changed=_Stored(model, torch.float16, torch.float32))


class _Stored(Mapping[str, Tensor]):
    """What is not quantized, rounded to the types of matrices and of vectors as it is asked for."""

    def __init__(self, model: Model, matrices: torch.dtype, vectors: torch.dtype) -> None:
        self.model, self.kinds = model, (vectors, matrices)
        entries = model.checkpoint.entries
        self.names = {n for n, e in entries.items() if DTYPES[e.dtype].is_floating_point} - {*model.quantized}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        W = self.model.kept(name)
        return W.to(self.kinds[W.ndim > 1]).to(torch.float32)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)
