"""Where the work is done: on the processor, on a GPU that is asked for, and on a device that is neither."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pocketsize.distributed.world import own_gpus
from pocketsize.errors import UsageError
from pocketsize.models.device import CPU, VARIABLE, working_device
from pocketsize.models.dtype import forward_dtype

SCRIPT = Path(__file__).parents[1] / "second_device_run.py"


def test_without_a_gpu_it_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert working_device() == CPU
    monkeypatch.setenv(VARIABLE, "cpu")
    assert working_device() == CPU


def test_a_gpu_works_where_there_is_one_unless_the_processor_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert working_device() == torch.device("cuda", 0) and forward_dtype() == torch.float32
    monkeypatch.setenv(VARIABLE, "cuda:1")
    assert working_device() == torch.device("cuda", 1)
    monkeypatch.setenv(VARIABLE, "cpu")
    assert working_device() == CPU


def test_processes_that_train_together_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    found = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(working_device().index)
    assert found == [0, 1, 0] and not own_gpus()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_gpus()
    monkeypatch.setenv(VARIABLE, "cuda:1")
    with pytest.raises(
        UsageError, match="cuda:1 would be all processes' of torchrun; cuda gives each its own"
    ):
        working_device()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("cuda", "cuda is not there, torch sees 0 GPUs"),
        ("cuda:3", "cuda:3 is not there"),
        ("tpu", "unknown device 'tpu'; it is cpu, cuda or cuda:NUMBER"),
        ("cuda:x", "unknown device 'cuda:x'"),
    ],
)
def test_what_is_not_there_is_an_error_and_no_other_device_steps_in(
    asked: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError) as caught:
        working_device()
    assert str(caught.value).startswith(f"{VARIABLE}: {said}")


@pytest.mark.slow
def test_nothing_is_left_on_the_processor_when_another_device_works(tmp_path: Path) -> None:
    """Quantizing, measuring and writing, on a device that refuses whatever is not its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    families = ("llama", "gpt2", "gemma3_text", "qwen3_moe", "mpnet")
    command = [sys.executable, str(SCRIPT), str(tmp_path), *families]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(families)
