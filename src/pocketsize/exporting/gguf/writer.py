"""A model as one GGUF file for llama.cpp, streamed to disk one tensor at a time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, size_label
from gguf.gguf_writer import TensorInfo, WriterState
from torch import Tensor

from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.gguf.blocks import BLOCK, block_type, pack
from pocketsize.exporting.gguf.names import ROPE_FACTORS, gguf_name, row_order
from pocketsize.exporting.gguf.vocabulary import add_vocabulary
from pocketsize.io.gguf.rope import llama3_divisors
from pocketsize.io.publish import publish_stream
from pocketsize.models.model import Model
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import Scheme

FLOATS = {"F32": np.float32, "F16": np.float16}
# Types of files that have another name than that of their tensors.
_FILES = {"MXFP4": "MXFP4_MOE"}
# What blocks have besides in the medium mix of a type, and not in the small one.
_MEDIUM = {"Q3_K": "Q4_K", "Q4_K": "Q6_K", "Q5_K": "Q6_K"}
_ALIGNMENT = 32
# What a file is read back on.
SHORTEST_WINDOW = 512

SchemeOf = Callable[[str], Scheme | None]


@dataclass(frozen=True, slots=True)
class Stored:
    """How one parameter is stored: its GGUF name and type, its shape as in the model, its bytes."""

    source: str
    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int


def floats_of(model: Model) -> str:
    """What matrices are stored in that are not quantized: float16, unless all digits are asked for."""
    return "F32" if model.dtype == torch.float32 else "F16"


def write(model: Model, path: Path) -> Artifact:
    """Write the model as the GGUF file `path`.

    Quantized weights keep their own codes and scales, bit for bit; other matrices are stored as `floats_of`
    says, vectors as F32. A tied head is not stored: llama.cpp uses the embedding.
    """
    tensors = plan(model, lambda name: model.quantized[name].scheme if name in model.quantized else None)
    header = _header(model, tensors)

    def stream(out: BinaryIO) -> None:
        out.write(header)
        for stored in tensors:
            data = _data(model, stored)
            out.write(data)
            out.write(bytes(_padded(len(data)) - len(data)))

    digest = publish_stream(path, stream)
    return Artifact(path.name, "gguf", path.stat().st_size, {path.name: digest})


def predict_bytes(model: Model, scheme_of: SchemeOf) -> int:
    """The exact size of the file that `write` would make with these schemes (None: not quantized)."""
    tensors = plan(model, scheme_of)
    return len(_header(model, tensors)) + sum(_padded(stored.bytes) for stored in tensors)


def tensor_bytes(model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The bytes that each parameter takes in the file that `write` would make."""
    return {stored.source: _padded(stored.bytes) for stored in plan(model, scheme_of)}


def plan(model: Model, scheme_of: SchemeOf) -> list[Stored]:
    """Every tensor of the file, in its order: embedding, blocks, final norm, head."""
    tensors = [_stored(model, name, scheme_of(name)) for name in _parameters(model)]
    if (factors := rope_factors(model)) is not None:
        tensors.append(Stored("", ROPE_FACTORS, "F32", tuple(factors.shape), 4 * factors.numel()))
    return tensors


def file_type(tensors: list[Stored]) -> str:
    """The type that holds most weights: the file's type, and the end of its name."""
    return main_kind((stored.name, stored.kind, stored.shape) for stored in tensors)


def main_kind(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    """The kind that most elements of the matrices among these names, kinds and shapes have.

    Where that is one that llama.cpp mixes with others, the mix by what the blocks have besides (`Q4_K_M`).
    """
    weights: dict[str, int] = {}
    beside: set[str] = set()
    for name, kind, shape in tensors:
        if len(shape) > 1:
            weights[kind] = weights.get(kind, 0) + math.prod(shape)
            beside |= {kind} if name.startswith("blk.") else set()
    most = max(weights, key=lambda kind: weights[kind])
    if most not in _MEDIUM:
        return most
    return f"{most}_{'M' if _MEDIUM[most] in beside else 'S'}"


def stored_value(model: Model, name: str) -> Tensor:
    """The parameter as the file gives it back, float32, rows in the model's own order."""
    W = model.weight(name)
    halves = floats_of(model) == "F16" and W.ndim > 1 and name not in model.quantized
    return W.to(torch.float16).to(torch.float32) if halves else W


def metadata(model: Model, kind: str) -> dict[str, object]:
    """Every field of the file by its key; `kind` is the type of most weights."""
    writer = GGUFWriter(None, str(model.arch.gguf))
    _add_metadata(writer, model, kind)
    return {key: field.value for key, field in writer.kv_data[0].items()}


def _add_metadata(writer: GGUFWriter, model: Model, kind: str) -> None:
    """Add what llama.cpp has to know besides the tensors."""
    config, origin = model.config, model.origin
    writer.add_type("model")
    writer.add_name(origin.name)
    if origin.licence != "unknown":
        writer.add_license(origin.licence)
    writer.add_size_label(size_label(origin.parameters, 0, 0, 0))
    writer.add_quantized_by("pocketsize")
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{_FILES.get(kind, kind)}"])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(model))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(model.head_width)
    _add_rope(writer, model)
    add_vocabulary(writer, model)


def context_length(model: Model) -> int:
    """How many tokens the file may be run on: within one sliding window full attention is the same."""
    window = getattr(model.config, "sliding_window", None) or model.positions
    if window < min(SHORTEST_WINDOW, model.positions):
        raise UnsupportedError(
            f"sliding_window {window}: llama.cpp's {model.arch.gguf} model has no windows; export folder"
        )
    return min(window, model.positions)


def rope_factors(model: Model) -> Tensor | None:
    """The divisor of each rotary frequency under Llama 3's scaling; None where there is none."""
    rope = _rope(model)
    if rope["rope_type"] != "llama3":
        return None
    return llama3_divisors(
        rope["rope_theta"],
        model.head_width,
        factor=rope["factor"],
        low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
        old=rope["original_max_position_embeddings"],
    )


def refuses(model: Model) -> str | None:
    """Why this model cannot be written as GGUF; None when it can."""
    try:
        _header(model, plan(model, lambda _: None))
    except UnsupportedError as error:
        return str(error)
    odd = [n for n in model.linears if model.checkpoint.entries[n].shape[1] % BLOCK]
    if not odd:
        return None
    return f"{odd[0]}: GGUF blocks hold {BLOCK} weights, its rows are no multiple of that; export folder"


def _add_rope(writer: GGUFWriter, model: Model) -> None:
    rope = _rope(model)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(model: Model) -> dict[str, Any]:
    rope = dict(model.config.rope_parameters)
    odd = rope.get("partial_rotary_factor", 1.0) != 1.0
    if odd or rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UnsupportedError(f"rotary embedding {rope} is not written to GGUF yet; export folder")
    return rope


def _parameters(model: Model) -> list[str]:
    """The names of all stored parameters; refuses families and activations that llama.cpp lacks."""
    if model.arch.gguf is None:
        raise UnsupportedError(f"no GGUF is written for the family {model.config.model_type}; export folder")
    if model.config.hidden_act not in ("silu", "swish"):
        raise UnsupportedError(
            f"hidden_act {model.config.hidden_act!r}: llama.cpp's llama model has silu; export folder"
        )
    blocks = {f"{path}.": i for i, path in enumerate(model.blocks)}

    def place(name: str) -> tuple[int, str]:
        if name == model.arch.embedding:
            return -1, name
        block = next(
            (i for path, i in blocks.items() if name.startswith(path)),
            len(blocks) + (name == model.arch.head),
        )
        return block, name

    names = [n for n in model.checkpoint.entries if not model.arch.is_optional(n)]
    return sorted(names, key=place)


def _stored(model: Model, source: str, scheme: Scheme | None) -> Stored:
    shape = model.checkpoint.entries[source].shape
    name = gguf_name(model, source)
    if scheme is not None:
        kind = block_type(scheme, shape[1], source)
        return Stored(source, name, kind.name, shape, shape[0] * kind.row_bytes(shape[1]))
    word = floats_of(model) if len(shape) > 1 else "F32"
    return Stored(source, name, word, shape, math.prod(shape) * np.dtype(FLOATS[word]).itemsize)


def _data(model: Model, stored: Stored) -> bytes:
    """The bytes of one tensor, rows in GGUF's order."""
    if stored.name == ROPE_FACTORS:
        return cast(Tensor, rope_factors(model)).numpy().tobytes()
    order = row_order(model, stored.source)
    if stored.source in model.quantized:
        weight = model.quantized[stored.source]
        if order is not None:
            weight = QWeight(weight.codes[order], weight.scale[order], weight.zero[order], weight.scheme)
        return pack(weight, stored.source).tobytes()
    W = model.kept(stored.source).to(torch.float32)
    _require_range(stored.source, W, stored.kind)
    return (W if order is None else W[order]).numpy().astype(FLOATS[stored.kind]).tobytes()


def require_range(model: Model, names: Iterable[str]) -> None:
    """Refuses values that a file could not hold in these matrices, which nothing quantizes."""
    for name in names if floats_of(model) != "F32" else ():
        _require_range(name, model.kept(name), floats_of(model))


def _require_range(name: str, W: Tensor, kind: str) -> None:
    lost = ~(W.abs() <= float(np.finfo(FLOATS[kind]).max))
    if lost.any():
        raise NumericalError(
            f"{name}: {int(lost.sum())} of its {W.numel()} values are beyond {kind}, such as "
            f"{float(W[lost][0]):.3g}; use dtype fp32"
        )


def _header(model: Model, tensors: list[Stored]) -> bytes:
    """Everything before the first tensor's bytes."""
    writer = GGUFWriter(None, str(model.arch.gguf))
    _add_metadata(writer, model, file_type(tensors))
    for stored in tensors:
        kind = GGMLQuantizationType[stored.kind]
        writer.tensors[0][stored.name] = TensorInfo(shape=stored.shape, dtype=kind, nbytes=stored.bytes)
    out = io.BytesIO()
    writer.fout, writer.state = [cast(io.BufferedWriter, out)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return out.getvalue() + bytes(_padded(out.tell()) - out.tell())


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
