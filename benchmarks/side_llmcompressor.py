"""GPTQ by llm-compressor, as it comes: asymmetric integer grid, its default order and damping."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from meter import metered
from stock import stock
from transformers import AutoTokenizer, PreTrainedModel
from worker import BITS_OF, Job, hand_over, read_job


def main() -> None:
    job = read_job()
    model, one_by_one = loaded(job)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = np.load(job.calibration)[: job.sequences]
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    weights = {"num_bits": job.bits, "type": "int", "symmetric": False, "strategy": "group"}
    weights["group_size"] = job.group
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    with metered() as cost:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_dict(rows),
            recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
            num_calibration_samples=job.sequences,
            max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False,
            batch_size=job.batch,
            sequential_targets=one_by_one,
        )
    quantized = {
        n: m for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None
    }
    with torch.no_grad():
        dequantized = {f"{name}.weight": _dequantized(module) for name, module in quantized.items()}
    scale = next(iter(quantized.values())).weight_scale
    names = ("llmcompressor", "compressed-tensors", "transformers")
    versions = {name: version(name) for name in names}
    hand_over(job, cost, dequantized, scale_bits=BITS_OF[scale.dtype], zero_bits=job.bits, versions=versions)


def loaded(job: Job) -> tuple[PreTrainedModel, list[str] | None]:
    """The model, and the class of its blocks where llm-compressor does not know it by itself.

    Without the class it calibrates all blocks at once, on inputs that no quantized block has seen.
    """
    model = stock(job)
    return model, None if job.task == "generate" else [type(model.encoder.layer[0]).__name__]


def _dequantized(module: torch.nn.Module) -> torch.Tensor:
    """The matrix as its codes give it back (in float32, whatever the model's dtype)."""
    return fake_quantize(
        module.weight.data.float(),
        module.weight_scale.data.float(),
        module.weight_zero_point.data,
        module.quantization_scheme.weights,
    )


if __name__ == "__main__":
    main()
