"""What the workers of every side share: their arguments, and how they hand over a result.

Imported in the peers' environments too: Python, torch and safetensors only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from meter import Cost, write_json
from safetensors.torch import save_file

BITS_OF = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}


@dataclass(frozen=True, slots=True)
class Job:
    """One quantization: the first `sequences` rows of `calibration`, `bits` and `group` for every linear."""

    model: Path
    calibration: Path
    out: Path
    bits: int
    group: int
    sequences: int
    dtype: torch.dtype
    task: str
    threads: int
    batch: int


def read_job() -> Job:
    """The job of the command line."""
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "out"):
        parser.add_argument(name, type=Path)
    for name in ("bits", "group", "sequences", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--task", choices=("generate", "embed"), default="generate")
    parser.add_argument("--batch", type=int, default=1)
    options = vars(parser.parse_args())
    options["dtype"] = getattr(torch, options["dtype"])
    torch.set_num_threads(options["threads"])
    return Job(**options)


def hand_over(
    job: Job,
    cost: Cost,
    weights: Mapping[str, torch.Tensor],
    *,
    scale_bits: int,
    zero_bits: int,
    versions: Mapping[str, str],
) -> None:
    """Write the dequantized matrices as float32, then the figures; the JSON says the run is whole.

    Bits per weight are codes, scales and zeros as this side's format stores them; of a job without bits, all
    that are not zero as bfloat16.
    """
    whole = {name: W.detach().to(torch.float32).contiguous() for name, W in weights.items()}
    largest = max(_levels(W, job.group) for W in whole.values() if W.ndim > 1) if job.bits else 0
    if job.bits and largest > 2**job.bits:
        raise SystemExit(f"{largest} values in one group of {job.group}; {job.bits} bits allow {2**job.bits}")
    save_file(whole, job.out.with_suffix(".safetensors"))
    figures = {
        **cost.as_dict(),
        "bits_per_weight": job.bits + (scale_bits + zero_bits) / job.group if job.bits else 16,
        "zeros": sum(int((W == 0).sum()) for W in whole.values() if W.ndim > 1),
        "matrices": sum(W.ndim > 1 for W in whole.values()),
        "weights": sum(W.numel() for W in whole.values() if W.ndim > 1),
        "versions": {"torch": torch.__version__, **versions},
    }
    write_json(job.out.with_suffix(".json"), figures)


def _levels(W: torch.Tensor, group: int) -> int:
    """The most distinct values in any group of the first 64 rows."""
    groups = W[:64].reshape(-1, group).sort(dim=1).values
    return int((groups.diff(dim=1) != 0).sum(dim=1).max()) + 1
