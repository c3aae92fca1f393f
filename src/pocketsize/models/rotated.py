"""A model seen through rotations: the same function, other matrices, turned as they are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
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


def rotated(model: Model, *, values: bool = True, residual: bool = False, seed: int = 0) -> Model:
    """The model with its heads' values turned (R2), its residual stream (R1), or both.

    R1 moves the gains of norms into the matrices behind them. A tied head cannot take up the last norm's gain
    and stay the embedding: it becomes a matrix of its own, which costs its bytes. Tensors are turned when
    they are read, in float64; they count as float32.
    """
    turns = _Turns(model, {})
    if values:
        _turn_values(turns, rotation(model.head_width, seed))
    head: Mapping[str, Packed] = {}
    if residual:
        R = rotation(int(model.config.hidden_size), seed + 1)
        head = _turn_residual(turns, R)
    return _seen(model, turns.steps, head)


def _turn_values(turns: _Turns, R: Float[Tensor, "d d"]) -> None:
    model = turns.model
    pair = next(
        (
            (group.fed_by, group.names[0])
            for group in model.groups
            if group.fed_by and group.fed_by.endswith("v_proj")
        ),
        None,
    )
    if pair is None:
        raise UnsupportedError(
            f"{model.folder}: a {model.config.model_type} has no matrix of values of its own; its values "
            "cannot be turned"
        )
    for block in model.blocks:
        for end in ("weight", "bias"):
            turns.add(f"{block}.{pair[0]}.{end}", partial(turned_outputs, R=R))
        turns.add(f"{block}.{pair[1]}.weight", partial(turned_inputs, R=R))


def _turn_residual(turns: _Turns, R: Float[Tensor, "h h"]) -> Mapping[str, Packed]:
    """The turns of everything that touches the residual stream; a tied head as a tensor of its own."""
    model = turns.model
    if model.config.model_type not in RESIDUAL:
        raise UnsupportedError(
            f"{model.folder}: the residual stream of a {model.config.model_type} cannot be turned; known for "
            f"{', '.join(RESIDUAL)}"
        )
    for block, group in ((block, group) for block in model.blocks for group in model.groups):
        if group.fed_by and group.fed_by.endswith("layernorm"):
            gain = model.original(f"{block}.{group.fed_by}.weight")
            turns.add(f"{block}.{group.fed_by}.weight", torch.ones_like)
            for name in group.names:
                turns.add(f"{block}.{name}.weight", partial(turned_inputs, R=R, gain=gain))
        elif group.names[0] in _WRITERS:
            for end in ("weight", "bias"):
                turns.add(f"{block}.{group.names[0]}.{end}", partial(turned_outputs, R=R))
    gain, head = model.original(_LAST_NORM), str(model.arch.head)
    turns.add(_LAST_NORM, torch.ones_like)
    turns.add(model.arch.embedding, partial(turned_inputs, R=R))
    turn_head = partial(turned_inputs, R=R, gain=gain)
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
    return replace(model, checkpoint=checkpoint, config=config)


def _turned(model: Model, name: str, turns: tuple[Turn, ...]) -> Tensor:
    """A tensor of the original, turned."""
    W = model.matrix(name) if model.arch.is_transposed(name) else model.original(name)
    for turn in turns:
        W = turn(W)
    return model.as_stored(name, W)
