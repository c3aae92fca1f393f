"""What this machine can do: hardware, room, packages; and the command that mends what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

from pocketsize.errors import UsageError
from pocketsize.io.source import cache_folder
from pocketsize.measurement.machine import cores, cpu_name, instruction_sets
from pocketsize.measurement.memory import available_bytes, total_bytes

# As in `models.device`, which imports torch.
VARIABLE = "POCKETSIZE_DEVICE"
# What a model of 135 million parameters takes with room to spare; larger ones take more.
MEMORY_BYTES = 2_000_000_000
DISK_BYTES = 2_000_000_000
_IMPORT_SECONDS = 120
ABSENT = "not installed"

# Distribution (with the oldest version that will do): the module it brings.
CORE: Mapping[str, str] = MappingProxyType(
    {
        "torch>=2.9": "torch",
        "transformers>=5.17": "transformers",
        "tokenizers>=0.22": "tokenizers",
        "huggingface_hub>=2.0": "huggingface_hub",
        "httpx2>=2.0": "httpx2",
        "safetensors>=0.6": "safetensors",
        "gguf>=0.19": "gguf",
        "numpy>=2.0": "numpy",
        "numba>=0.61": "numba",
        "click>=8.1": "click",
        "rich>=13.9": "rich",
        "pyyaml>=6.0": "yaml",
        "jinja2>=3.1": "jinja2",
        "greenlet>=3.2": "greenlet",
        "jaxtyping>=0.3": "jaxtyping",
    }
)


@dataclass(frozen=True, slots=True)
class Extra:
    """An optional part: what it is for, and the modules of which one has to import."""

    gives: str
    modules: Mapping[str, str]
    every: bool = False


EXTRAS: Mapping[str, Extra] = MappingProxyType(
    {
        "llamacpp": Extra(
            "GGUF files run in llama.cpp: chat, speed, the check of what was written",
            {"xllamacpp": "xllamacpp", "llama-cpp-python": "llama_cpp"},
        ),
        "transformers": Extra(
            "folders load in stock transformers, and are checked there",
            {"compressed-tensors": "compressed_tensors"},
        ),
        "data": Extra("text in parquet files and in folders of `datasets`", {"pyarrow": "pyarrow"}),
        "gpu": Extra("GPTQ runs on a GPU; torch for CUDA brings it", {"triton": "triton"}),
        "docs": Extra("the documentation site is built", {"mkdocs": "mkdocs"}),
        "dev": Extra(
            "the tests and checks of Pocketsize itself",
            {"pytest": "pytest", "pytest-randomly": "pytest_randomly", "beartype": "beartype"},
            every=True,
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that was looked at; `mend` is the command or the way that helps where it is not ok."""

    name: str
    ok: bool
    needed: bool
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The machine as it is, and what follows for the work."""

    facts: Mapping[str, str | int | None]
    instruction_sets: Mapping[str, bool]
    parts: tuple[Part, ...]

    @property
    def missing(self) -> list[Part]:
        """What the main job cannot do without, and is not there."""
        return [part for part in self.parts if part.needed and not part.ok]


def diagnose(output: Path) -> Diagnosis:
    """Look at this machine; `output` is where the work would be written.

    Packages are imported in a child process, since one built for another processor ends it.
    """
    modules = [*CORE.values(), *(m for extra in EXTRAS.values() for m in extra.modules.values())]
    broken = import_faults(modules)
    torch_works = broken["torch"] is None
    device = _device() if torch_works else None
    parts = [
        _python(),
        *(_package(wanted, broken[module]) for wanted, module in CORE.items()),
        *([device] if device and VARIABLE in os.environ else []),
        _memory(),
        _disk("output", output),
        _disk("cache", cache_folder()),
        *(_extra(name, extra, broken) for name, extra in EXTRAS.items()),
    ]
    facts: dict[str, str | int | None] = {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": total_bytes(),
        "memory_available_bytes": available_bytes(),
        "gpu": _gpu() if torch_works else None,
        "products": _products() if device and device.ok else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "pocketsize")},
    }
    return Diagnosis(facts, instruction_sets() if torch_works else {}, tuple(parts))


def _products() -> str:
    """What matrices are multiplied in, and by which library where that was chosen."""
    from pocketsize.models.dtype import forward_dtype
    from pocketsize.models.products import is_quicker

    blocks = str(forward_dtype()).removeprefix("torch.")
    return f"{blocks} in blocks{'; float32 by oneDNN, quicker here than MKL' if is_quicker() else ''}"


_IMPORTER = """
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps([name]), flush=True)
    try:
        importlib.import_module(name)
        fault = None
    except BaseException as error:
        fault = f"{type(error).__name__}: {error}"
    print(json.dumps([name, fault]), flush=True)
"""


def import_faults(modules: Sequence[str]) -> dict[str, str | None]:
    """Why each module does not import; None for those that do."""
    faults: dict[str, str | None] = {m: ABSENT for m in modules if not _spec(m)}
    left = [m for m in modules if m not in faults]
    while left:
        said, end = _import(left)
        for name, *fault in said:
            # A name without a verdict is overwritten by its verdict, unless the process died in between.
            faults[name] = fault[0] if fault else f"importing it ends Python ({end})"
        left = [m for m in left if m not in faults]
        if not said:
            return faults | dict.fromkeys(left, f"Python cannot be started ({end})")
    return faults


def _import(modules: Sequence[str]) -> tuple[list[list[str]], str]:
    """What a child process said of each module, and how it ended."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-c", _IMPORTER, *modules]
    try:
        done = subprocess.run(
            call, env=environment, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
        out, end = done.stdout, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        out, end = raw.decode() if isinstance(raw, bytes) else raw, f"no end after {_IMPORT_SECONDS} s"
    return [json.loads(line) for line in out.splitlines() if line.startswith('["')], end


def _spec(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _python() -> Part:
    found, ok = platform.python_version(), sys.version_info >= (3, 11)
    return Part("python", ok, True, found, "" if ok else "install Python 3.11 or later")


def _package(wanted: str, fault: str | None) -> Part:
    name, _, oldest = wanted.partition(">=")
    found = _version(name)
    if fault is None and found and _older(found, oldest):
        fault = f"{found} is older than {oldest}"
    mend = f"python -m pip install --upgrade '{wanted}'"
    return Part(name, fault is None, True, _line(fault) or found or "there", "" if fault is None else mend)


def _extra(name: str, extra: Extra, broken: Mapping[str, str | None]) -> Part:
    faults = {package: broken[module] for package, module in extra.modules.items()}
    working = [package for package, fault in faults.items() if fault is None]
    ok = len(working) == len(faults) if extra.every else bool(working)
    if ok:
        said = ", ".join(f"{package} {_version(package) or ''}".strip() for package in working)
        return Part(f"extra {name}", True, False, f"{said}; {extra.gives}")
    package, fault = next((p, f) for p, f in faults.items() if f is not None)
    said = f"{package}: {_line(fault)}; for: {extra.gives}"
    way = f"'pocketsize[{name}]'" if fault == ABSENT else f"--force-reinstall {package}"
    return Part(f"extra {name}", False, False, said, f"python -m pip install {way}")


def _device() -> Part:
    """The device that works, if it is there."""
    from pocketsize.models.device import working_device

    try:
        return Part("device", True, True, str(working_device()))
    except UsageError as error:
        return Part("device", False, True, str(error).partition(";")[0], f"unset {VARIABLE}")


def _memory() -> Part:
    left = available_bytes()
    if left is None:
        return Part("memory", True, True, f"{_gb(total_bytes())}; how much is available is not known")
    ok = left >= MEMORY_BYTES
    mend = "" if ok else f"close other programs: {_gb(MEMORY_BYTES)} are needed"
    return Part("memory", ok, True, f"{_gb(left)} available of {_gb(total_bytes())}", mend)


def _disk(name: str, folder: Path) -> Part:
    """Room and right to write where `folder` is, or would be made."""
    folder = folder.expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    way = "give another folder with -o" if name == "output" else "set POCKETSIZE_CACHE to another folder"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Part(f"disk for {name}", False, True, f"{there} cannot be written to", way)
    free = shutil.disk_usage(there).free
    ok = free >= DISK_BYTES
    mend = "" if ok else f"free some space ({_gb(DISK_BYTES)} are needed), or {way}"
    return Part(f"disk for {name}", ok, True, f"{_gb(free)} free in {there}", mend)


def _gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        return f"{torch.cuda.get_device_name(0)} ({torch.cuda.device_count()}, {_gb(size)})"
    return "Apple Metal" if torch.backends.mps.is_available() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _older(found: str, oldest: str) -> bool:
    """Whether a version comes before another, by the numbers they begin with."""
    return _numbers(found) < _numbers(oldest)


def _numbers(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for word in text.split("+")[0].split("."):
        digits = word[: len(word) - len(word.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())[:160]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
