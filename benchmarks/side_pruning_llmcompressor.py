"""SparseGPT or Wanda by llm-compressor, as they come; METHOD and PATTERN say which."""

from __future__ import annotations

import os
from importlib.metadata import version

import numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from meter import metered
from side_llmcompressor import loaded
from transformers import AutoTokenizer
from worker import hand_over, read_job


def main() -> None:
    job = read_job()
    model, one_by_one = loaded(job)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = np.load(job.calibration)[: job.sequences]
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[os.environ["METHOD"]]
    pattern = os.environ["PATTERN"]
    mask = "0:0" if pattern == "unstructured" else pattern
    linears = [
        name for name, m in model.named_modules() if type(m).__name__ == "Linear" and name != "lm_head"
    ]
    with metered() as cost:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_dict(rows),
            recipe=modifier(sparsity=0.5, mask_structure=mask, targets=["Linear"], ignore=["lm_head"]),
            num_calibration_samples=job.sequences,
            max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False,
            batch_size=job.batch,
            sequential_targets=one_by_one,
        )
    weights = {f"{name}.weight": model.get_submodule(name).weight for name in linears}
    versions = {name: version(name) for name in ("llmcompressor", "transformers")}
    hand_over(job, cost, weights, scale_bits=0, zero_bits=0, versions=versions)


if __name__ == "__main__":
    main()
