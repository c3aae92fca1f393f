"""A model as transformers loads it, for the sides that start from there."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from worker import Job


def stock(job: Job) -> PreTrainedModel:
    """The job's model, with its head if it writes text; an encoder without the pooler that it never uses."""
    if job.task == "generate":
        return AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
    return AutoModel.from_pretrained(job.model, dtype=job.dtype, add_pooling_layer=False)
