"""Fixtures for all tests: subprocess environments, and shapes checked at run time."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Shapes in annotations are checked in the maths, where they carry the meaning.
MATHS = [
    "pocketsize.linalg",
    "pocketsize.quantization.grid",
    "pocketsize.quantization.gptq",
    "pocketsize.quantization.rtn",
    "pocketsize.quantization.unpack",
]
_hook = install_import_hook(MATHS, "beartype.beartype")

# A shell makes what it starts in the background deaf to Ctrl-C; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SRC = Path(__file__).parents[1] / "src"


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four windows of `judged.LENGTH` tokens a batch: sixteen of them teach and judge."""
    from judged import LENGTH
    from pocketsize.models import batches  # behind the hook

    monkeypatch.setattr(batches, "BATCH_TOKENS", 4 * LENGTH)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes in float32, as where no hardware multiplies bfloat16: for what is exact."""
    import torch

    lacking = dict.fromkeys(("amx_bf16", "avx512_bf16", "bf16"), False)
    flags = torch.cpu.get_capabilities() | lacking
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)


@pytest.fixture
def source_env() -> dict[str, str]:
    """The environment for a child process that imports this source tree, offline."""
    path = os.pathsep.join([str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
