"""Where a model can have gates, the work behind each, and the file that keeps them beside its config."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketsize.errors import DataError, PocketsizeError, UnsupportedError, UsageError
from pocketsize.io.source import GATES
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.arch import Linears
from pocketsize.models.model import Model
from pocketsize.pruning.gate import Gates

NAME = GATES
FORMAT = 1
_LIMIT = 1 << 30
# What of a config says that gates are those of another model.
_SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of a token: of each linear by its path, of the head, and of attention for each token seen.

    `attention` is that of one block.
    """

    linears: Mapping[str, int]
    head: int
    attention: int

    def of(self, prefix: str) -> int:
        """What the linears at or below a path take."""
        return sum(
            ops for name, ops in self.linears.items() if name == prefix or name.startswith(prefix + ".")
        )


def work_of(model: Model) -> Work:
    """The operations of a model: two for each weight of its linears, four for each value attended to."""
    shapes = {name.removesuffix(".weight"): model.matrix_shape(name) for name in model.linears}
    ends = model.checkpoint.entries[model.ends[-1]].shape
    heads = int(model.config.num_attention_heads)
    linears = {name: 2 * rows * columns for name, (rows, columns) in shapes.items()}
    return Work(linears, 2 * ends[0] * ends[1], 4 * heads * model.head_width)


def total_work(model: Model, length: int) -> float:
    """Operations of a token of windows of this length, mean over their tokens."""
    work = work_of(model)
    blocks = sum(work.linears.values()) + work.attention * len(model.blocks) * (length + 1) / 2
    return blocks + work.head


def head_path(model: Model) -> str:
    """The path of the head."""
    assert model.arch.head is not None
    return model.arch.head.removesuffix(".weight")


def gated_groups(model: Model) -> dict[str, tuple[str, ...]]:
    """Linears that read one tensor, by the path of the first: those of all blocks, then the head."""
    groups = {
        f"{block}.{group.names[0]}": tuple(f"{block}.{name}" for name in group.names)
        for block in model.blocks
        for group in model.groups
    }
    return groups | {head_path(model): (head_path(model),)}


def mlp_of(model: Model) -> str | None:
    """The path in a block of an MLP whose channels are chosen by its gate; None: it has no gate apart."""
    for group in model.groups:
        parts = {name.rpartition(".")[2] for name in group.names}
        if parts == {"gate_proj", "up_proj"}:
            return group.names[0].rpartition(".")[0]
    return None


def attention_of(model: Model) -> str | None:
    """The path in a block of attention with keys and values of their own; None where they are one matrix."""
    first: Linears = model.groups[0]
    parts = [name.rpartition(".")[2] for name in first.names]
    return first.names[0].rpartition(".")[0] if parts == ["q_proj", "k_proj", "v_proj"] else None


def sites(model: Model, kind: str) -> dict[str, int]:
    """Where gates of a kind may stand, each with the size of its values; refuses what cannot have them."""
    if model.arch.task != "generate":
        raise UnsupportedError(f"{model.folder}: gates are for models that generate; this one does not")
    if model.arch.experts is not None:
        raise UnsupportedError(
            f"{model.folder}: the experts of a {model.config.model_type} are chosen token by token already; "
            "gates are for dense models"
        )
    match kind:
        case "inputs":
            found = {path: names[0] for path, names in gated_groups(model).items()}
            return {path: _inputs(model, name) for path, name in found.items()}
        case "channels":
            inner = model.groups[-1].names[0]
            at = mlp_of(model) or inner
            return {f"{block}.{at}": _inputs(model, f"{block}.{inner}") for block in model.blocks}
        case "layers":
            halves = _halves(model)
            return {f"{b}.{half}": int(model.config.hidden_size) + 1 for b in model.blocks for half in halves}
        case _:
            _halves(model)
            return dict.fromkeys(model.blocks[:-1], 1)


def _inputs(model: Model, path: str) -> int:
    name = model.ends[-1] if path == head_path(model) else f"{path}.weight"
    return model.matrix_shape(name)[1]


def _halves(model: Model) -> tuple[str, str]:
    """The two halves of a block that add to what they read; refuses blocks that are made otherwise."""
    attention, mlp = attention_of(model), mlp_of(model)
    before = {group.names[0].rpartition(".")[2]: group.fed_by for group in model.groups}
    plain = before.get("q_proj") and before.get("gate_proj")
    if attention is None or mlp is None or not plain:
        raise UnsupportedError(
            f"{model.folder}: a {model.config.model_type} has no halves to leave out (attention and MLP, "
            "each behind a norm of its own, keys and values apart); use gates of kind inputs or channels"
        )
    return attention, mlp


def require_fitting(model: Model, gates: Gates) -> None:
    """Refuse gates that are not of this model: unknown places, and values of another size."""
    known = sites(model, gates.kind)
    for path, value in gates.values.items():
        if path not in known:
            raise UsageError(f"gates: {path}: the model has no such place for gates of kind {gates.kind}")
        if value.numel() != known[path]:
            raise UsageError(f"gates: {path}: {value.numel()} values, the model needs {known[path]}")
    width = int(model.config.hidden_size)
    for name, value in gates.maps.items():
        path, _, end = name.rpartition(":")
        fits = {
            "in": value.ndim == 2 and len(value) == width,
            "out": value.ndim == 2 and value.shape[1] == width,
            "bias": value.shape == (width,),
            "probe": value.shape == (width + 1,),
            "line": gates.kind == "inputs" and value.shape == (known.get(path, 0) + 1,),
        }
        if path not in gates.values or not fits.get(end, False):
            raise UsageError(f"gates: {name}: {tuple(value.shape)} is no part of such a gate of this model")
    if gates.confidence == "probe" and (bare := [p for p in gates.values if f"{p}:probe" not in gates.maps]):
        raise UsageError(f"gates: {bare[0]}: has no line for the confidence probe")


def gates_json(model: Model, gates: Gates, told: Mapping[str, object]) -> bytes:
    """The file of gates: what they are of, what is told of them, and their numbers (float32, base64)."""
    of = {key: getattr(model.config, key) for key in _SHAPE}
    facts: dict[str, object] = {"format": FORMAT, "kind": gates.kind, "confidence": gates.confidence}
    facts |= {"model": of, "told": dict(told)}
    for part in ("values", "maps"):
        facts[part] = {name: _packed(value) for name, value in getattr(gates, part).items()}
    return (json.dumps(facts, indent=1) + "\n").encode()


def has_gates(folder: Path) -> bool:
    """Whether a folder keeps gates."""
    return (folder / NAME).is_file()


def read_gates(model: Model, path: Path | None = None) -> Gates:
    """The gates in a model's folder, or in a file; refuses damaged ones, and gates of another model."""
    path = path or model.folder / NAME
    if not path.is_file():
        raise UsageError(f"{path.parent}: has no {NAME}; make gates with the recipe step gate")
    raw = read_json_object(path, limit_bytes=_LIMIT)
    try:
        return _checked(raw, model)
    except DataError:
        raise
    except (PocketsizeError, KeyError, TypeError, ValueError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: {said}; calibrate anew with the recipe step gate") from error


def _checked(raw: Mapping[str, Any], model: Model) -> Gates:
    if raw.get("format") != FORMAT:
        raise ValueError(f"format {raw.get('format')!r}; this version reads {FORMAT}")
    for key in _SHAPE:
        own, said = getattr(model.config, key), raw["model"].get(key)
        if own != said:
            raise ValueError(f"is of a model with {key} {said!r}, this one has {own!r}")
    values, maps = ({n: _unpacked(n, v) for n, v in raw[part].items()} for part in ("values", "maps"))
    gates = Gates(raw["kind"], values, raw["confidence"], maps)
    require_fitting(model, gates)
    return gates


def _packed(value: Tensor) -> dict[str, object]:
    data = value.detach().cpu().contiguous().numpy().astype("<f4")
    return {"shape": list(data.shape), "data": base64.b64encode(data.tobytes()).decode()}


def _unpacked(name: str, raw: Mapping[str, Any]) -> Tensor:
    try:
        data = np.frombuffer(base64.b64decode(raw["data"], validate=True), "<f4")
        return torch.from_numpy(data.astype(np.float32).reshape(raw["shape"]))
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: its numbers are damaged ({error})") from error
