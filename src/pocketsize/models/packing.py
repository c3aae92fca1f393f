"""How the weights of a folder that is quantized already are packed, as its config says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pocketsize.errors import DataError, UnsupportedError

# Where a config.json says that its weights are quantized.
KEYS = ("quantization_config", "compression_config")
_WAY_OUT = "give the model it was made from"
# Floats of 4 bits in compressed-tensors: the format, and the inputs of a group.
_FP4 = {"nvfp4-pack-quantized": ("nvfp4", 16), "mxfp4-pack-quantized": ("mxfp4", 32)}
# What is not zero, and bits that say where it is.
SPARSE = "sparse-bitmask"
# Forms of compressed-tensors in which codes of 8 bits lie as they are.
_PLAIN = ("int-quantized", "float-quantized")


@dataclass(frozen=True, slots=True)
class Prequantized:
    """How the weights of a folder are packed: the bits and groups that occur; group None is a row.

    `shifted`: GPTQ's zeros are stored less one. `plain`: codes of 8 bits lie under the weight's own name.
    `rounds`: the model was made to round what its linears read, which is not done to what is read here.
    """

    method: str
    bits: tuple[int, ...]
    groups: tuple[int | None, ...]
    shifted: bool = False
    plain: bool = False
    rounds: bool = False

    @property
    def layout(self) -> str:
        """Which of the layouts the tensors are in."""
        return f"{self.method} plain" if self.plain else self.method

    def __str__(self) -> str:
        """As people say it: `gptq 4 bits group 128`."""
        if self.method == SPARSE and not self.bits:
            return "zeros left out"
        along = " or ".join("one scale a row" if g is None else f"group {g}" for g in self.groups)
        said = f"{self.method} {'/'.join(map(str, self.bits))} bits {along}"
        return f"{said}, its inputs not rounded here" if self.rounds else said


def sparse_said(sparsity: Mapping[str, object]) -> dict[str, object]:
    """What a config says of weights that lie with their zeros left out, as compressed-tensors says it."""
    said = {
        "format": SPARSE,
        "targets": ["Linear"],
        "ignore": [],
        "global_sparsity": sparsity["share"],
        "sparsity_structure": sparsity["structure"],
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "sparsity_config": said,
        }
    }


def recognise(raw: Mapping[str, Any], path: Path) -> Prequantized | None:
    """How the weights beside the config `raw` are packed; None: they are not. `path` is for errors."""
    found = next((raw[key] for key in KEYS if raw.get(key)), None)
    if found is None:
        return None
    method = found.get("quant_method", "unnamed") if isinstance(found, dict) else found
    reader = _METHODS.get(str(method))
    if reader is None or not isinstance(found, dict):
        known = ", ".join(_METHODS)
        raise UnsupportedError(
            f"{path}: already quantized ({str(method)[:80]}), and only {known} are read; {_WAY_OUT}"
        )
    return reader(found, path)


def _read_gptq(said: Mapping[str, Any], path: Path) -> Prequantized:
    layout = str(said.get("checkpoint_format") or said.get("format") or "gptq")
    if layout not in ("gptq", "gptq_v2") or said.get("is_marlin_format") or said.get("dynamic"):
        odd = "dynamic" if said.get("dynamic") else layout
        raise UnsupportedError(f"{path}: already quantized (gptq, {odd[:80]}), which is not read; {_WAY_OUT}")
    return Prequantized(
        "gptq",
        (_bits(said.get("bits"), (2, 3, 4, 8), path),),
        (_group(said.get("group_size"), path),),
        layout == "gptq",
    )


def _read_awq(said: Mapping[str, Any], path: Path) -> Prequantized:
    layout = str(said.get("version") or said.get("format") or "gemm").lower()
    if layout != "gemm" or said.get("zero_point", True) is not True:
        raise UnsupportedError(
            f"{path}: already quantized (awq, {layout[:80]}), which is not read; {_WAY_OUT}"
        )
    bits = _bits(said.get("bits", said.get("w_bit")), (4,), path)
    return Prequantized("awq", (bits,), (_group(said.get("group_size", said.get("q_group_size")), path),))


def _read_compressed_tensors(said: Mapping[str, Any], path: Path) -> Prequantized:
    if (said.get("sparsity_config") or {}).get("format") == SPARSE and not said.get("config_groups"):
        return Prequantized(SPARSE, (), (None,))
    groups = said.get("config_groups")
    listed: list[Any] = list(groups.values()) if isinstance(groups, dict) else []
    schemes = [g["weights"] for g in listed if isinstance(g, dict) and isinstance(g.get("weights"), dict)]
    if not schemes or len(schemes) != len(listed):
        raise DataError(f"{path}: quantization_config has no config_groups that say how weights are stored")
    plain = said.get("format") in _PLAIN
    odd = {
        str(said.get("format"))[:80]: not plain and said.get("format") not in ("pack-quantized", *_FP4),
        "with zeros": plain and not all(scheme.get("symmetric") is True for scheme in schemes),
        "sparse": (said.get("sparsity_config") or {}).get("format", "dense") != "dense",
        "with activations": not plain and any(g.get("input_activations") for g in listed),
        "with its cache": bool(said.get("kv_cache_scheme")),
    }
    if any(odd.values()):
        word = next(word for word, found in odd.items() if found)
        raise UnsupportedError(
            f"{path}: already quantized (compressed-tensors, {word}), which is not read; {_WAY_OUT}"
        )
    if said.get("format") in _FP4:
        method, group = _FP4[said["format"]]
        return Prequantized(method, (4,), (group,))
    known = (8,) if plain else tuple(range(2, 9))
    bits = sorted({_bits(scheme.get("num_bits"), known, path) for scheme in schemes})
    if plain:
        along = {scheme.get("strategy") for scheme in schemes}
        if not along <= {"channel", "tensor"}:
            word = f"{said['format']} by {min(map(str, along - {'channel', 'tensor'}))[:80]}"
            raise UnsupportedError(
                f"{path}: already quantized (compressed-tensors, {word}), which is not read; {_WAY_OUT}"
            )
        rounds = any(g.get("input_activations") for g in listed)
        return Prequantized("compressed-tensors", tuple(bits), (None,), plain=True, rounds=rounds)
    groups = dict.fromkeys(_group(_height(scheme), path) for scheme in schemes)
    return Prequantized("compressed-tensors", tuple(bits), tuple(groups))


def _read_bitsandbytes(said: Mapping[str, Any], path: Path) -> Prequantized:
    odd = {
        "8 bits": not said.get("load_in_4bit"),
        str(said.get("bnb_4bit_quant_type"))[:80]: said.get("bnb_4bit_quant_type") != "nf4",
        "double quantization": bool(said.get("bnb_4bit_use_double_quant")),
        "storage": said.get("bnb_4bit_quant_storage", "uint8") != "uint8",
    }
    if any(odd.values()):
        word = next(word for word, found in odd.items() if found)
        raise UnsupportedError(
            f"{path}: already quantized (bitsandbytes, {word}), which is not read; {_WAY_OUT}"
        )
    return Prequantized("bitsandbytes", (4,), (64,))


def _read_sparse(said: Mapping[str, Any], path: Path) -> Prequantized:
    """Ours: what is not zero is quantized as well."""
    listed: Any = said.get("weights")
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise DataError(f"{path}: quantization_config has no weights that say how they are stored")
    bits = sorted({_bits(one.get("num_bits"), (2, 3, 4, 5, 8), path) for one in listed})
    groups = dict.fromkeys(_group(one.get("group_size"), path) for one in listed)
    return Prequantized(SPARSE, tuple(bits), tuple(groups))


def _height(scheme: Mapping[str, Any]) -> object:
    """How many inputs have one scale, -1 for all; blocks are ours, for matrices stored inputs first."""
    if scheme.get("strategy") == "block":
        structure = scheme.get("block_structure")
        return structure[0] if isinstance(structure, list) and structure[1:] == [1] else None
    return scheme.get("group_size") or -1


def _bits(value: object, known: tuple[int, ...], path: Path) -> int:
    if value not in known or isinstance(value, bool):
        raise UnsupportedError(f"{path}: {str(value)[:80]} bits; known here: {', '.join(map(str, known))}")
    return int(str(value))


def _group(value: object, path: Path) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise DataError(
            f"{path}: group_size is {str(value)[:80]}; a whole number, or -1 for a row, is needed"
        )
    return None if value == -1 else value


_METHODS: Mapping[str, Callable[[Mapping[str, Any], Path], Prequantized]] = MappingProxyType(
    {
        "gptq": _read_gptq,
        "awq": _read_awq,
        "compressed-tensors": _read_compressed_tensors,
        "bitsandbytes": _read_bitsandbytes,
        SPARSE: _read_sparse,
    }
)
