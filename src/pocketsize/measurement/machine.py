"""What ran the measurements: processor, memory, versions, and what this process has used."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pocketsize.measurement.memory import total_bytes

# Instruction sets that decide how fast small models run here, as torch names them.
_OF_NOTE = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "dot",
    "i8mm",
    "bf16",
    "sve",
)
_FAMILIES = {
    "avx2": ("avx2",),
    "avx512": ("avx512_f",),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "vnni": ("avx512_vnni", "avx_vnni", "dot"),
    "amx": ("amx_tile", "amx_int8", "amx_bf16"),
}
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "numba",
    "compressed-tensors",
    "xllamacpp",
)


def machine() -> dict[str, str | int | float | bool]:
    """The machine, as the record keeps it. `load` is how many processes wanted to run in the last minute."""
    import torch

    flags = torch.cpu.get_capabilities()
    return {
        "cpu": cpu_name(str(flags.get("cpu_name", ""))),
        "cores": int(flags.get("num_physical_cores", 0)) or cores(),
        "usable_cores": cores(),
        "instruction_sets": " ".join(name for name in _OF_NOTE if flags.get(name, False)),
        "memory_bytes": total_bytes(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
    }


def versions() -> dict[str, str]:
    """Versions of the packages that can change a result; those that are not installed are left out."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_rss_bytes() -> int:
    """The most memory this process has held at once."""
    # ru_maxrss is inherited from the process that started this one; VmHWM is not.
    if (told := _status("VmHWM")) is not None:
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The memory this process holds now; where the system does not say, the most it has held."""
    told = _status("VmRSS")
    return peak_rss_bytes() if told is None else told


def _status(key: str) -> int | None:
    """A size that Linux tells of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields[key].split()[0]) * 1024 if key in fields else None


def cpu_seconds() -> float:
    """User and system seconds of this process and of its finished children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def load_average() -> float:
    """How many processes wanted to run, averaged over the last minute; timings depend on it."""
    return round(os.getloadavg()[0], 2)


def instruction_sets() -> dict[str, bool]:
    """The families of instruction sets that decide how fast small models run, and whether they are here.

    On ARM `bf16` is what it says, and `vnni` stands for the dot products there.
    """
    import torch

    flags = torch.cpu.get_capabilities()
    return {name: any(flags.get(flag, False) for flag in of) for name, of in _FAMILIES.items()}


def cores() -> int:
    """How many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def cpu_name(fallback: str = "") -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return fallback or platform.processor() or platform.machine()
