"""The model that is written, digit for digit: what is not quantized as the artefact gives it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pocketsize.exporting.table import EXPORTERS
from pocketsize.io.checkpoint import DTYPES
from pocketsize.models.model import Model


def as_written(model: Model, exports: Sequence[str]) -> Model:
    """The model as an export gives it back: figures are to be of what is written, not of float32 numbers.

    That is the GGUF where one is written, else the first folder. What is quantized is the same in all.
    """
    if model.dtype == torch.float32:
        return model
    export = _measured(exports)
    names = {
        name
        for name in model.checkpoint.entries
        if name not in model.quantized and (name in model.changed or rounds(model, exports, name))
    }
    return replace(model, changed=_Stored(model, export, names))


def rounds(model: Model, exports: Sequence[str], name: str) -> bool:
    """Whether a tensor that is not quantized is stored in another type than the checkpoint has it in."""
    entry = model.checkpoint.entries[name]
    kind = DTYPES[entry.dtype]
    if not kind.is_floating_point or model.dtype == torch.float32:
        return False
    if EXPORTERS[_measured(exports)].is_folder:
        return kind != model.dtype
    return len(entry.shape) > 1 and kind != torch.float16


def _measured(exports: Sequence[str]) -> str:
    """The export that figures are of."""
    return min(exports, key=lambda name: EXPORTERS[name].is_folder)


class _Stored(Mapping[str, Tensor]):
    """Tensors as an export gives them back, made as they are asked for."""

    def __init__(self, model: Model, export: str, names: set[str]) -> None:
        self.model, self.stored, self.names = model, EXPORTERS[export].stored, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.stored(self.model, name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)
