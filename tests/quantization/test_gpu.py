"""The kernels for a GPU: interpreted, they give what the CPU gives; and they compile for real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocketsize.linalg import feedback_factor
from pocketsize.quantization import gptq as cpu
from pocketsize.quantization.drift import pulled_back
from pocketsize.quantization.scheme import FLOAT_ZEROS, INTEGER_ZEROS, SYMMETRIC, Scheme
from quantization.test_gptq import layer, loss

pytest.importorskip(
    "triton", reason="triton is not installed: it comes with torch for CUDA, or with the extra `gpu`"
)

Sweep = Callable[..., tuple[Tensor, Tensor, Tensor]]
CASES = [
    *((4, 32, INTEGER_ZEROS, True), (3, 64, SYMMETRIC, True), (2, 96, INTEGER_ZEROS, True)),
    *((4, None, SYMMETRIC, True), (8, 64, SYMMETRIC, False)),
    *((4, 32, FLOAT_ZEROS, True), (2, 96, FLOAT_ZEROS, True), (5, None, FLOAT_ZEROS, False)),
]


def swept(sweep: Sweep, scheme: Scheme, device: str, *, search: bool, beta: float) -> tuple[Tensor, float]:
    """The codes of a layer, and what its error costs."""
    columns = 192 if scheme.group == 96 else 128
    W, H = layer(rows=33, columns=columns)
    factor = pulled_back(feedback_factor(H.to(device), 0.01), beta)
    codes, scale, zero = (T.cpu() for T in sweep(W.T.contiguous().to(device), factor, scheme, search=search))
    width = scheme.width(columns)
    scale, zero = (T.repeat_interleave(width, dim=0) for T in (scale, zero))
    return codes, loss(W, (scale * (codes - zero)).T, H)


def agree(sweep: Sweep, case: tuple[int, int | None, int, bool], device: str, *, beta: float = 0.0) -> None:
    """As `test_equals_the_slow_version`: a weight on the edge between two codes may fall on either side."""
    bits, group, grid, search = case
    scheme = Scheme(bits, group, grid == SYMMETRIC, float_zeros=grid == FLOAT_ZEROS)
    theirs, ours = (
        swept(how, scheme, where, search=search, beta=beta)
        for how, where in ((cpu.sweep, "cpu"), (sweep, device))
    )
    assert float((theirs[0] == ours[0]).all(dim=0).float().mean()) >= 0.9
    assert ours[1] == pytest.approx(theirs[1], rel=0.02)


def test_in_the_interpreter_kernels_give_what_the_cpu_gives() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    run(__file__, TRITON_INTERPRET="1")


def run(*command: str, **variables: str) -> None:
    """Python on something, with the path of this process."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pocketsize.quantization import gpu

POINTERS = {"codes": "*u8"} | dict.fromkeys(("V", "W", "N", "E", "d", "scale", "zero"), "*fp32")
WHOLE = dict.fromkeys(("rows", "width", "n"), "i32")

def build(kernel, capability, **constants):
    kinds = POINTERS | WHOLE | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "fp32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

for capability in (80, 90):
    build(gpu._round, capability, BLOCK=gpu.BLOCK, LANES=gpu.LANES)
    for grid in range(3):
        build(gpu._fit, capability, GRID=grid, STEPS=8, TURNS=3, TILE=gpu.TILE, LANES=gpu.LANES)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for CUDA comes for Linux only")
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    run("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))


def test_the_benchmark_runs_on_a_processor_too() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"
    run(str(script), "--device", "cpu", "--shapes", "tiny", "--tokens", "512")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that CUDA sees")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_kernels_give_what_the_cpu_gives(case: tuple[int, int | None, int, bool]) -> None:
    from pocketsize.quantization import gpu

    agree(gpu.sweep, case, "cuda")
    agree(gpu.sweep, case, "cuda", beta=0.2)


if __name__ == "__main__":
    from pocketsize.quantization import gpu

    for one in CASES:
        agree(gpu.sweep, one, "cpu")
    agree(gpu.sweep, CASES[0], "cpu", beta=0.2)
