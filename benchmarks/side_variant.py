"""A recipe step of Pocketsize, as the variable VARIANT says it: `{"step": {...}, "export": [...]}`."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from meter import metered
from transformers import PreTrainedTokenizerBase
from worker import hand_over, read_job

from pocketsize.data.text import Corpus, Document
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.products import quick_products
from pocketsize.quantization.scheme import named
from pocketsize.recipes.grids import Quantizer, block_scheme
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.recipe import parse_step
from pocketsize.recipes.step import Context


def main() -> None:
    job, variant = read_job(), json.loads(os.environ["VARIANT"])
    model = load(job.model)
    ids = torch.from_numpy(np.load(job.calibration)[: max(1, job.sequences)])
    ((kind, options),) = variant["step"].items()
    own = named(options.get("scheme", ""))  # says all of a grid by its name
    grid = {} if own else {"scheme": f"W{job.bits}A16", "group": job.group, "symmetric": False}
    options |= {"embeddings": None, **grid}
    step = parse_step({kind: options}).resolve(model, tuple(variant["export"]))
    assert isinstance(step, Quantizer)
    with tempfile.TemporaryDirectory() as room:
        with metered() as cost, quick_products():
            journal = open_journal(Path(room) / "work", {})
            context = Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)
            context.corpus = corpus_of(ids, tokenizer_of(model))
            done = step.apply(model, context)
        weights = {name: weight.dequantize() for name, weight in done.quantized.items()}
        weights |= {name: done.weight(name) for name in done.changed}
    scales, zeros = 16, 16 if block_scheme(step).float_zeros else job.bits
    if own is not None and own.group is not None:
        job, zeros = replace(job, group=own.group), 0
        scales = round((own.bits_per_weight(own.group) - job.bits) * own.group)
    versions = {name: version(name) for name in ("transformers", "numba")}
    hand_over(job, cost, weights, scale_bits=scales, zero_bits=zeros, versions=versions)


def corpus_of(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """The calibration windows as text, for steps that train: nothing but what calibrates teaches."""
    texts = [str(tokenizer.decode(window, skip_special_tokens=False)) for window in ids]
    return Corpus("windows", tuple(Document(f"window {i}", text) for i, text in enumerate(texts)))


if __name__ == "__main__":
    main()
