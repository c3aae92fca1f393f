"""GPTQ by GPTQModel, as it comes: asymmetric integer grid, its default group-aware order and damping.

One default is changed in its favour: layers are not offloaded to disk, which costs CPU time.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from meter import metered
from worker import BITS_OF, Job, hand_over, read_job


def main() -> None:
    job = read_job()
    config = QuantizeConfig(bits=job.bits, group_size=job.group, sym=False, offload_to_disk=False)
    model = GPTQModel.load(str(job.model), config, dtype=job.dtype)
    ids = np.load(job.calibration)[: job.sequences]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    with metered() as cost:
        model.quantize(rows, batch_size=job.batch)
    packed = {n: m for n, m in model.model.named_modules() if hasattr(m, "qweight")}
    dequantized = {f"{name}.weight": _dequantized(module, job) for name, module in packed.items()}
    scale_bits = BITS_OF[next(iter(packed.values())).scales.dtype]
    versions = {name: version(name) for name in ("gptqmodel", "transformers")}
    hand_over(job, cost, dequantized, scale_bits=scale_bits, zero_bits=job.bits, versions=versions)


def _dequantized(module: torch.nn.Module, job: Job) -> torch.Tensor:
    """The matrix as its packed codes give it back, in float32. Format v1 stores zeros less one."""
    scale = module.scales.float()
    codes = _unpacked(module.qweight, job.bits)
    zero = _unpacked(module.qzeros.T, job.bits).T[:, : scale.shape[1]] + 1
    group = module.g_idx.long()
    return ((codes - zero[group]) * scale[group]).T


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes down dimension 0 of int32 words: one little-endian stream of bits per column."""
    streams = words.contiguous().numpy().view(np.uint32)
    flat = (streams[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    whole = flat.reshape(-1, streams.shape[1])
    whole = whole[: len(whole) // bits * bits].reshape(-1, bits, streams.shape[1])
    codes = (whole << np.arange(bits, dtype=np.uint32)[None, :, None]).sum(axis=1)
    return torch.from_numpy(codes.astype(np.float32))


if __name__ == "__main__":
    main()
