"""Round to nearest by Pocketsize: the floor that needs no calibration."""

from __future__ import annotations

import torch
from meter import metered
from worker import hand_over, read_job

from pocketsize.models.load import load
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme


def main() -> None:
    job = read_job()
    model = load(job.model)
    scheme = Scheme(job.bits, job.group, symmetric=False)
    with metered() as cost:
        weights = {name: rtn(model.original(name), scheme) for name in model.linears}
    dequantized = {name: weight.dequantize() for name, weight in weights.items()}
    hand_over(
        job, cost, dequantized, scale_bits=16, zero_bits=job.bits, versions={"torch": torch.__version__}
    )


if __name__ == "__main__":
    main()
