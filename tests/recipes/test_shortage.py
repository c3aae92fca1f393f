"""A failed allocation is told from other errors, and what would fit is computed from it."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketsize.errors import ResourceError
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.load import load
from pocketsize.recipes import shortage
from pocketsize.recipes.recipe import Data
from pocketsize.recipes.shortage import asked_bytes, is_shortage, memory_explained, sequences_that_fit
from tiny import write_tiny


def test_what_torch_and_numpy_say_is_understood() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 46, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 46, dtype=np.uint8)
    assert is_shortage(of_torch.value) and asked_bytes(str(of_torch.value)) == 1 << 46
    assert is_shortage(of_numpy.value) and asked_bytes(str(of_numpy.value)) == 1 << 46
    assert is_shortage(OSError(errno.ENOMEM, "Cannot allocate memory")) and is_shortage(MemoryError())
    assert asked_bytes("CUDA out of memory. Tried to allocate 1.50 GiB.") == 3 << 29
    assert not is_shortage(RuntimeError("shapes differ")) and not is_shortage(OSError(errno.ENOSPC, "full"))


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), memory_explained(lambda: "gptq", Data()):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("load", "close other programs"),
        ("write", "--written 0"),
        ("measure", "the same command goes on"),
    ],
)
def test_the_way_out_is_that_of_the_phase(phase: str, words: str) -> None:
    told = pytest.raises(ResourceError, match=f"out of memory in phase {phase}.*{words}")
    with told, memory_explained(lambda: phase, Data()):
        raise MemoryError


def test_on_a_gpu_its_own_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "working_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7_000_000, 8_000_000))
    told = pytest.raises(ResourceError, match=r"1610\.6 MB more were asked for, 7\.0 MB were left")
    with told, memory_explained(lambda: "measure", Data()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has ...")


def test_less_room_fits_fewer_sequences(tmp_path: Path) -> None:
    model, data = load(write_tiny(tmp_path / "m", "llama")), Data(sequences=512, length=256)
    states = 512 * 256 * 64 * forward_dtype().itemsize
    fits = [sequences_that_fit(data, model, states, left) for left in (0, 10_000_000, 100_000_000, 1 << 40)]
    assert fits == sorted(fits) and fits[0] == 0 and fits[-1] == 511 and 0 < fits[1] < fits[2] < 511
    for asked in (1000, 1 << 40):
        held = sequences_that_fit(data, model, asked, 10_000_000)
        assert held > fits[1]  # what lies between blocks already is room too
