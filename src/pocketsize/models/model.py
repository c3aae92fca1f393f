"""A model: a checkpoint on disk, and the weights that replace some of its tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PretrainedConfig

from pocketsize.io.checkpoint import Checkpoint
from pocketsize.models.arch import Arch, Linears
from pocketsize.pruning.pattern import Pattern, pattern_of
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import Scheme

# What a config calls the pattern of a model's zeros; stock loaders leave it alone.
SPARSITY = "sparsity"
# What a model that is made of another keeps of where that came from.
_HANDED_ON = ("name", "licence", "revision", "dequantized_from")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model came from.

    `source_bytes` is the size of the weights as they were downloaded, `bf16_bytes` two bytes for
    each parameter. `dequantized_from` names the format of an already quantized source; every
    quality figure is then relative to its dequantized weights.
    """

    name: str
    sha256: str
    parameters: int
    source_bytes: int
    bf16_bytes: int
    licence: str = "unknown"
    revision: str = ""
    dequantized_from: str | None = None


@runtime_checkable
class Schemed(Protocol):
    """Quantized weights that stay on disk: their schemes are known without reading them."""

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of each weight."""
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """A model: the tensors of a checkpoint, some of them replaced by quantized ones.

    Tensors stay on disk until they are asked for. `quantized` is keyed by parameter name
    (`model.layers.0.mlp.up_proj.weight`), and so is `changed`: vectors that a step gave new values.
    `dtype` is what a folder stores all but the quantized ones in.
    """

    folder: Path
    config: PretrainedConfig
    arch: Arch
    origin: Origin
    checkpoint: Checkpoint
    quantized: Mapping[str, QWeight] = field(default_factory=lambda: MappingProxyType({}))
    changed: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    dtype: torch.dtype = torch.bfloat16

    @property
    def blocks(self) -> list[str]:
        """Paths of the blocks, in running order: `model.layers.0`, ..."""
        return [f"{self.arch.blocks}.{i}" for i in range(self.config.num_hidden_layers)]

    @property
    def groups(self) -> tuple[Linears, ...]:
        """The linears of a block that read the same tensor, in running order, expert by expert."""
        return self.arch.groups_with(getattr(self.config, "num_experts", 0) if self.arch.experts else 0)

    def linears_of(self, block: str) -> list[str]:
        """Parameter names of the weights of a block that steps may compress, in running order."""
        return [f"{block}.{name}.weight" for group in self.groups for name in group.names]

    @property
    def linears(self) -> list[str]:
        """Parameter names of all weights that steps may compress, in running order."""
        names = self.linears_of("")
        return [f"{block}{name}" for block in self.blocks for name in names]

    @property
    def linear_parameters(self) -> int:
        """How many weights the linears have together."""
        return sum(math.prod(self.matrix_shape(name)) for name in self.linears)

    @property
    def ends(self) -> list[str]:
        """Parameter names of the embedding and of the head, unless that is the embedding."""
        head = self.arch.head
        return [self.arch.embedding, *([] if head is None or self.tied else [head])]

    @property
    def positions(self) -> int:
        """How many tokens the model can read at once."""
        return int(self.config.max_position_embeddings) - self.arch.offset

    @property
    def head_width(self) -> int:
        """How many values each head of attention has."""
        own = getattr(self.config, "head_dim", None)
        return int(own or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def outlined(self) -> bool:
        """Whether it is only promised by a step: numbers stand in, and the tokenizer is the teacher's."""
        return not self.checkpoint.entries[self.arch.embedding].file

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding matrix."""
        return self.arch.head is not None and self.arch.head not in self.checkpoint.entries

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """How each quantized parameter is stored, by name; those on disk are not read for it."""
        if isinstance(self.quantized, Schemed):
            return self.quantized.schemes
        return {name: weight.scheme for name, weight in self.quantized.items()}

    @property
    def pattern(self) -> Pattern | None:
        """Where the linears have zeros that later steps keep (config key `sparsity`), else None."""
        known = getattr(self.config, SPARSITY, None)
        if known is None or known.get("rank"):
            return None
        found = pattern_of(str(known["structure"]), float(known["share"]))
        return replace(found, uneven=bool(known.get("uneven")))

    @property
    def low_rank(self) -> bool:
        """Whether the linears are sums of a sparse matrix and one of low rank (step `oats`)."""
        return bool((getattr(self.config, SPARSITY, None) or {}).get("rank"))

    def mask(self, name: str) -> Bool[Tensor, "out in"]:
        """Which weights of a linear are not zero: those that may change in a pruned model."""
        return self.as_stored(name, self.kept(name)) != 0

    @property
    def rounds(self) -> dict[str, Scheme]:
        """The linears that round what they read, by parameter name, each with its scheme."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme.activations}

    def original(self, name: str) -> Tensor:
        """The tensor as the checkpoint has it, float32."""
        return self.checkpoint.read(name).to(torch.float32)

    def kept(self, name: str) -> Tensor:
        """A tensor that is not quantized: as a step changed it, else as the checkpoint has it."""
        return self.changed[name] if name in self.changed else self.checkpoint.read(name)

    def weight(self, name: str) -> Tensor:
        """The tensor as this model has it, float32: dequantized where it is quantized."""
        if name not in self.quantized:
            return self.kept(name).to(torch.float32)
        return self.as_stored(name, self.quantized[name].dequantize())

    def matrix(self, name: str) -> Float[Tensor, "out in"]:
        """The original tensor with a row for each output, however the family stores it."""
        return self.as_stored(name, self.original(name))

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """The shape of `matrix`."""
        shape = self.checkpoint.entries[name].shape
        return shape[::-1] if self.arch.is_transposed(name) else shape

    def as_stored(self, name: str, W: Tensor) -> Tensor:
        """A matrix with a row for each output as the family stores it, and the other way round."""
        return W.T.contiguous() if self.arch.is_transposed(name) else W

    def with_sparsity(self, said: Mapping[str, object]) -> Model:
        """This model, whose config says this of the zeros of its linears."""
        config = copy.deepcopy(self.config)
        setattr(config, SPARSITY, dict(said))
        return replace(self, config=config)

    def made_from(self, source: Model) -> Model:
        """This model, read from a folder that a step filled, as what was made of `source`."""
        facts = {key: getattr(source.origin, key) for key in _HANDED_ON}
        return replace(self, origin=replace(self.origin, **facts), dtype=source.dtype)

    def with_quantized(
        self, quantized: Mapping[str, QWeight], changed: Mapping[str, Tensor] | None = None
    ) -> Model:
        """This model with these quantized weights, and these changed vectors, instead of its own."""
        return replace(self, quantized=quantized, changed=changed or {})
