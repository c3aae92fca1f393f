"""Files of tensors that are read where they lie, a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pocketsize.io.checkpoint import open_file

_TYPES = {"I16": np.int16, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}


def mapped(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a safetensors file by name, mapped into memory: what is not looked at is not read."""
    return MappingProxyType(
        {
            name: np.memmap(path, _TYPES[entry.dtype], "r", entry.begin, entry.shape)
            for name, entry in open_file(path).entries.items()
        }
    )
