"""HQQ by its own library, as it comes: scales and float zeros in 16 bits, no data."""

from __future__ import annotations

from importlib.metadata import version

import torch
from hqq.core.quantize import Quantizer
from meter import metered
from stock import stock
from worker import hand_over, read_job


def main() -> None:
    job = read_job()
    model = stock(job)
    linears = {
        f"{name}.weight": m.weight.data
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    }
    weights = {}
    with metered() as cost:
        for name, W in linears.items():
            packed, meta = Quantizer.quantize(
                W,
                nbits=job.bits,
                group_size=job.group,
                axis=1,
                compute_dtype=torch.float32,
                device="cpu",
                optimize=True,
            )
            for key in ("scale", "zero"):  # as 16-bit metadata stores them
                meta[key] = meta[key].half().float()
            weights[name] = Quantizer.dequantize(packed, meta)
    versions = {name: version(name) for name in ("hqq", "transformers")}
    hand_over(job, cost, weights, scale_bits=16, zero_bits=16, versions=versions)


if __name__ == "__main__":
    main()
