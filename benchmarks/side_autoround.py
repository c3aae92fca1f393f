"""SignRound by AutoRound, asymmetric: ITERATIONS sign-gradient steps a block (its default is 200)."""

from __future__ import annotations

import os
from importlib.metadata import version

import numpy as np
import torch
from auto_round import AutoRound
from meter import metered
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker import BITS_OF, hand_over, read_job


def main() -> None:
    job = read_job()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = torch.from_numpy(np.load(job.calibration)[: job.sequences])
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    tuner = AutoRound(
        model,
        tokenizer,
        bits=job.bits,
        group_size=job.group,
        sym=False,
        iters=int(os.environ["ITERATIONS"]),
        nsamples=job.sequences,
        seqlen=ids.shape[1],
        dataset=rows,
        batch_size=job.batch,
        low_gpu_mem_usage=False,
        device_map="cpu",
    )
    blocks = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    blocks.discard("lm_head.weight")
    with metered() as cost:
        tuned, _ = tuner.quantize()
    weights = {name: W for name, W in tuned.named_parameters() if name in blocks}
    versions = {name: version(name) for name in ("auto-round", "transformers")}
    hand_over(job, cost, weights, scale_bits=BITS_OF[torch.float16], zero_bits=job.bits, versions=versions)


if __name__ == "__main__":
    main()
