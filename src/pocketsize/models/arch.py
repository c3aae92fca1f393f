"""What Pocketsize has to know of a model family, as data."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from pocketsize.errors import UnsupportedError, did_you_mean
from pocketsize.models import archs


@dataclass(frozen=True, slots=True)
class Linears:
    """Linear layers of a block that read the same tensor; names are relative to the block.

    `attends`: what they give meets in attention (queries, keys, values).
    """

    names: tuple[str, ...]
    attends: bool = False

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a group of linears needs at least one name")


@dataclass(frozen=True, slots=True)
class Arch:
    """A model family: where its blocks are, and which linears of a block read the same tensor.

    `task` is `generate` for causal language models and `embed` for encoders. `blocks` is the
    path of the list of blocks below the loaded module. `groups` are in running order. `embedding`
    and `head` name the parameters at the two ends (`head` None: the model has none).
    `gguf` is the architecture's name in llama.cpp, None where no GGUF can be written.
    `optional` lists prefixes of tensors that a checkpoint may hold or lack without harm.
    """

    task: str
    blocks: str
    groups: tuple[Linears, ...]
    embedding: str
    head: str | None = None
    gguf: str | None = None
    optional: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block that are compressed, in running order."""
        return tuple(name for group in self.groups for name in group.names)


def families() -> list[str]:
    """The `model_type`s that have a literal in `models/archs/`."""
    return sorted(m.name for m in pkgutil.iter_modules(archs.__path__))


def arch_of(model_type: str) -> Arch:
    """The literal of a family; an unknown one says where to add it."""
    if model_type not in families():
        raise UnsupportedError(
            f"model family {model_type!r} is not known{did_you_mean(model_type, families())} "
            f"To add it, write src/pocketsize/models/archs/{model_type}.py with one Arch literal"
        )
    return importlib.import_module(f"pocketsize.models.archs.{model_type}").ARCH
