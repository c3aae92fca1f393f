"""Out of memory, while a recipe runs: which phase, how much was asked for, and what would fit."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pocketsize.errors import ResourceError
from pocketsize.measurement.memory import available_bytes
from pocketsize.models.device import working_device
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.recipes.recipe import Data

# What torch's allocators say; they raise RuntimeError.
_SAID = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
# What oneDNN says, of this and of other things: it counts where little memory is left.
_HINTED, _LITTLE_BYTES = "could not create a primitive", 128 << 20
_ASKED = (re.compile(r"allocate (\d+) bytes"), re.compile(r"allocate ([\d.]+) ([KMGT])iB"))
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Of the memory that is left, the share that calibration may count on: the block and its statistics need room.
_SHARE = 0.4


@contextmanager
def memory_explained(phase: Callable[[], str], data: Data, model: Model | None = None) -> Iterator[None]:
    """Turns a failed allocation into a ResourceError that says what would fit in this phase."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_shortage(error):
            raise
        # Read before anything is let go: the traceback still holds what was allocated.
        asked, left = asked_bytes(str(error)), _left_on_gpu() if "CUDA" in str(error) else left_bytes()
        words = [f"out of memory in phase {phase()}"]
        if asked:
            words.append(
                f"{_mb(asked)} more were asked for" + ("" if left is None else f", {_mb(left)} were left")
            )
        raise ResourceError(f"{': '.join(words)}; {_way_out(phase(), data, model, asked, left)}") from error


def is_shortage(error: Exception) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if _HINTED in str(error):
        return (left_bytes() or _LITTLE_BYTES) < _LITTLE_BYTES
    return isinstance(error, MemoryError) or bool(_SAID.search(str(error)))


def asked_bytes(said: str) -> int | None:
    """How much was asked for, as torch or numpy says it; None where it is not said."""
    if found := _ASKED[0].search(said):
        return int(found[1])
    if found := _ASKED[1].search(said):
        return int(float(found[1]) * _UNITS[found[2]])
    return None


def left_bytes() -> int | None:
    """What this process may still allocate: the machine, its container and its own limit allow it."""
    known = [] if (machine := available_bytes()) is None else [machine]
    limit, statm = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit != resource.RLIM_INFINITY and statm.exists():
        known.append(max(0, limit - int(statm.read_text().split()[0]) * resource.getpagesize()))
    return min(known, default=None)


def _left_on_gpu() -> int | None:
    """What is free on the GPU that works."""
    return torch.cuda.mem_get_info(working_device())[0] if working_device().type == "cuda" else None


def sequences_that_fit(data: Data, model: Model, asked: int, left: int) -> int:
    """About how many calibration sequences there is room for, all of them waiting inside one block.

    Unless it was the hidden states between blocks that were asked for, those are held already.
    """
    hidden, widest = int(model.config.hidden_size), max(max(model.matrix_shape(n)) for n in model.linears)
    tokens, item = min(data.length, model.positions), forward_dtype().itemsize
    states = data.sequences * tokens * hidden * item
    room = left + (0 if asked == states else states)
    one = tokens * (4 * hidden + 2 * widest) * item
    return min(data.sequences - 1, int(_SHARE * room / one))


def _way_out(phase: str, data: Data, model: Model | None, asked: int | None, left: int | None) -> str:
    kept = "what was finished is kept: with more memory the same command goes on"
    if phase == "write":
        return f"let the model write no text (--written 0; in a recipe data: written: 0), or {kept}"
    if model is None or phase in ("load", "measure", "export", "latency", "verify"):
        return f"close other programs, or use a machine with more; {kept}"
    fit = (
        data.sequences // 2 if asked is None or left is None else sequences_that_fit(data, model, asked, left)
    )
    if fit < 1:
        return f"not one sequence of {data.length} tokens fits; use a shorter --length, or {kept}"
    return (
        f"about {fit} of the {data.sequences} sequences of {data.length} tokens would fit: --sequences {fit} "
        f"(in a recipe data: sequences); or {kept}"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
