"""A model seen through rotations: the same function, other matrices, turned as they are read."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.io.checkpoint import Entry, Packed
from pocketsize.models.model import Model
from pocketsize.quantization.rotate import rotation, turned_inputs, turned_outputs

# Families whose residual stream is read through RMS norms alone, and written by these two.
RESIDUAL = ("llama", "mistral", "qwen2", "qwen3", "phi3")
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_LAST_NORM = "model.norm.weight"

Turn = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class _Turns:
    """What becomes of each parameter, one turn after the other."""

    model: Model
    steps: dict[str, list[Turn]]

    def add(self, name: str, turn: Turn) -> None:
        """One more turn of a parameter, if the checkpoint has it (biases it may lack)."""
        if name in self.model.checkpoint.entries:
            self.steps.setdefault(name, []).append(turn)


class _Rotation:
    """A rotation that is made when the first tensor is turned by it: shapes are known without."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed

    @cached_property
    def matrix(self) -> Float[Tensor, "n n"]:
        """R."""
        return rotation(self.n, self.seed)

    def outputs(self, W: Tensor) -> Tensor:
        """What gives turned outputs."""
        return turned_outputs(W, self.matrix)

    def inputs(self, W: Tensor, model: Model, gain: str | None = None) -> Tensor:
        """What reads turned inputs, scaled by the gain of this name."""
        return turned_inputs(W, self.matrix, None if gain is None else model.original(gain))


def rotated(model: Model, *, values: bool = True, residual: bool = False, seed: int = 0) -> Model:
    """The model with its heads' values turned (R2), its residual stream (R1), or both.

    R1 moves the gains of norms into the matrices behind them. A tied head cannot take up the last norm's gain
    and stay the embedding: it becomes a matrix of its own, which costs its bytes. Tensors are turned when
    they are read, in float64; they count as float32. Nothing is read before that.
    """
    turns = _Turns(model, {})
    if values:
        _turn_values(turns, seed)
    head = _turn_residual(turns, seed + 1) if residual else {}
    return _seen(model, turns.steps, head)


def _turn_values(turns: _Turns, seed: int) -> None:
    model = turns.model
    attending = {name for group in model.groups if group.attends for name in group.names}
    pair = next(((g.fed_by, g.names[0]) for g in model.groups if g.fed_by in attending), None)
    if pair is None:
        raise UnsupportedError(
            f"{model.folder}: a {model.config.model_type} has no matrix of values of its own; its values "
            "cannot be turned"
        )
    R = _Rotation(model.head_width, seed)
    for block in model.blocks:
        for end in ("weight", "bias"):
            turns.add(f"{block}.{pair[0]}.{end}", R.outputs)
        turns.add(f"{block}.{pair[1]}.weight", partial(R.inputs, model=model))


def _turn_residual(turns: _Turns, seed: int) -> Mapping[str, Packed]:
    """The turns of everything that touches the residual stream; a tied head as a tensor of its own."""
    model = turns.model
    if model.config.model_type not in RESIDUAL or model.arch.head is None:
        kind = f"a {model.config.model_type}" + ("" if model.arch.head else " without a head for tokens")
        raise UnsupportedError(
            f"{model.folder}: the residual stream of {kind} cannot be turned; known for {', '.join(RESIDUAL)}"
        )
    R = _Rotation(int(model.config.hidden_size), seed)
    for block, group in ((block, group) for block in model.blocks for group in model.groups):
        if group.fed_by and group.fed_by.endswith("layernorm"):
            gain = f"{block}.{group.fed_by}.weight"
            turns.add(gain, torch.ones_like)
            for name in group.names:
                turns.add(f"{block}.{name}.weight", partial(R.inputs, model=model, gain=gain))
        elif group.names[0] in _WRITERS:
            for end in ("weight", "bias"):
                turns.add(f"{block}.{group.names[0]}.{end}", R.outputs)
    head = model.arch.head
    turns.add(_LAST_NORM, torch.ones_like)
    turns.add(model.arch.embedding, partial(R.inputs, model=model))
    turn_head = partial(R.inputs, model=model, gain=_LAST_NORM)
    if not model.tied:
        turns.add(head, turn_head)
        return {}
    file = model.checkpoint.entries[model.arch.embedding].file
    return {head: Packed(lambda: turn_head(model.original(model.arch.embedding)), (file,))}


def _seen(model: Model, steps: Mapping[str, list[Turn]], head: Mapping[str, Packed]) -> Model:
    """The model with these tensors turned as they are read."""
    base = model.checkpoint
    entries, packed = dict(base.entries), dict(base.packed)
    for name, turns in steps.items():
        entry = base.entries[name]
        entries[name] = replace(entry, dtype="F32", packed_as="rotated")
        packed[entry.name] = Packed(partial(_turned, model, name, tuple(turns)), (entry.file,))
    config = model.config
    for name, whole in head.items():
        embedding = base.entries[model.arch.embedding]
        entries[name] = Entry(name, embedding.file, "F32", embedding.shape, 0, 0, "rotated")
        packed[name] = whole
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    checkpoint = replace(base, entries=MappingProxyType(entries), packed=MappingProxyType(packed))
    parameters = sum(math.prod(entry.shape) for entry in entries.values())
    origin = replace(model.origin, parameters=parameters, bf16_bytes=2 * parameters)
    return replace(model, checkpoint=checkpoint, config=config, origin=origin)


def _turned(model: Model, name: str, turns: tuple[Turn, ...]) -> Tensor:
    """A tensor of the original, turned."""
    W = model.matrix(name) if model.arch.is_transposed(name) else model.original(name)
    for turn in turns:
        W = turn(W)
    return model.as_stored(name, W)
