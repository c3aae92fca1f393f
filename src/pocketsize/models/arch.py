"""What Pocketsize has to know of a model family, as data."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pocketsize.errors import UnsupportedError, did_you_mean
from pocketsize.models import archs
from pocketsize.models.cuts import Cuts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# How stock classes are named that have a head for classes.
CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True, slots=True)
class Linears:
    """Linear layers of a block that read the same tensor; names are relative to the block.

    `attends`: what they give meets in attention (queries, keys, values). `fed_by`: the norm or the linear
    before them whose outputs nothing else reads, and each of whose outputs becomes one or more of their
    inputs, multiplied by what does not depend on it: a factor may move from the one to the other.
    """

    names: tuple[str, ...]
    attends: bool = False
    fed_by: str | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a group of linears needs at least one name")


@dataclass(frozen=True, slots=True)
class Arch:
    """A model family: where its blocks are, and which linears of a block read the same tensor.

    `task` is `generate` for causal language models, `embed` for encoders, and `classify` for either with a
    head for classes on it, which `classifying` derives from the literal. `blocks` is the
    path of the list of blocks below the loaded module. `groups` are in running order. `embedding`
    and `head` name the parameters at the two ends (`head` None: the model has none).
    `gguf` is the architecture's name in llama.cpp, None where no GGUF can be written.

    `transposed` says that the linears of the blocks are stored inputs first, as Conv1D has them.
    `experts` is where a block has its experts; in `groups`, `*` stands for the number of one.
    `joins`: some linears read the tokens of all texts as one matrix.
    `refuses` says why nothing in it can be compressed.
    `offset` counts the rows at the start of the position table that no token ever takes.
    `cuts` says what goes together where blocks become narrower, None where that is not known.

    `optional` lists beginnings of names that a checkpoint may hold or lack without harm, `*` standing
    for a number: parts, which end in a dot and are kept, and tables that loaders compute themselves.
    `renames` are patterns of names in checkpoints, each with what the module says instead.
    `prefix` is what an encoder is called inside a model that has a head on it; generators have None, as
    their names begin alike with any head.
    """

    task: str
    blocks: str
    groups: tuple[Linears, ...]
    embedding: str
    head: str | None = None
    gguf: str | None = None
    optional: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    offset: int = 0
    transposed: bool = False
    refuses: str | None = None
    experts: str | None = None
    joins: bool = False
    cuts: Cuts | None = None
    prefix: str | None = None

    @property
    def causal(self) -> bool:
        """Whether a token sees those before it alone."""
        return self.prefix is None

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block that are compressed, in running order."""
        return tuple(name for group in self.groups for name in group.names)

    @property
    def dense_on_load(self) -> bool:
        """Whether stock transformers has no packed form for these weights: it unpacks them as it loads."""
        return self.transposed or self.experts is not None

    def groups_with(self, experts: int) -> tuple[Linears, ...]:
        """The groups of a block with so many experts: one expert after the other."""
        plain = tuple(group for group in self.groups if "*" not in group.names[0])
        routed = [group for group in self.groups if "*" in group.names[0]]
        numbered = (
            replace(
                group,
                names=tuple(name.replace("*", str(i)) for name in group.names),
                fed_by=group.fed_by and group.fed_by.replace("*", str(i)),
            )
            for i in range(experts)
            for group in routed
        )
        return (*plain, *numbered)

    def is_expert(self, name: str) -> bool:
        """Whether this is of an expert, by its path in the module or in its block."""
        return self.experts is not None and f".{self.experts}." in f".{name}"

    def is_optional(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor or lack it."""
        return any(fnmatchcase(name, f"{part}*") for part in self.optional)

    def is_other_head(self, name: str) -> bool:
        """Whether this is part of a head for another task, which a checkpoint may hold beside the model."""
        parts = [part for part in self.optional if part.endswith(".") and not part.endswith("pooler.")]
        return any(fnmatchcase(name, f"{part}*") for part in parts)

    def is_table(self, name: str) -> bool:
        """Whether this is a table that loaders compute themselves, whatever a checkpoint says."""
        return any(fnmatchcase(name, part) for part in self.optional if not part.endswith("."))

    def is_transposed(self, name: str) -> bool:
        """Whether this parameter is a matrix that is stored inputs first."""
        inside = name.startswith(f"{self.blocks}.") and name.endswith(".weight")
        return self.transposed and inside and name.removesuffix(".weight").endswith(self.linears)

    def module_name(self, stored: str) -> str:
        """What the module calls a tensor that a checkpoint calls `stored`."""
        if self.task == "embed":
            stored = stored.removeprefix(f"{self.prefix}.")
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored)
        return stored


def families() -> list[str]:
    """The `model_type`s that have a literal in `models/archs/`."""
    return sorted(m.name for m in pkgutil.iter_modules(archs.__path__))


def classifying(arch: Arch) -> Arch:
    """The family with a head for classes: what is outside the base model has other names, or is gone.

    Tables and poolers of the base model stay optional; heads of other tasks are not.
    """
    inside = "" if arch.prefix is None else f"{arch.prefix}."
    kept = [part for part in arch.optional if arch.causal or not part.endswith(".") or part == "pooler."]
    return replace(
        arch,
        task="classify",
        blocks=f"{inside}{arch.blocks}",
        embedding=f"{inside}{arch.embedding}",
        head=None,
        gguf=None,
        optional=tuple(f"{inside}{part}" for part in kept),
        cuts=arch.cuts and arch.cuts.behind(inside),
    )


def arch_for(config: PretrainedConfig) -> Arch:
    """The family of a config, with a head for classes if the model chooses one class of several by it.

    Heads that give a single number, or several classes at once, are left beside the encoder unused.
    """
    arch, kind = arch_of(config.model_type), getattr(config, "problem_type", None)
    if len(config.id2label or ()) < 2 or kind in ("regression", "multi_label_classification"):
        return arch
    names = config.architectures or ()
    return classifying(arch) if any(str(name).endswith(CLASSIFIER) for name in names) else arch


def arch_of(model_type: str) -> Arch:
    """The literal of a family; an unknown one says where to add it."""
    if model_type not in families():
        raise UnsupportedError(
            f"model family {model_type!r} is not known{did_you_mean(model_type, families())} "
            f"To add it, write src/pocketsize/models/archs/{model_type}.py with one Arch literal "
            "(docs/howto/family.md)"
        )
    return importlib.import_module(f"pocketsize.models.archs.{model_type}").ARCH
