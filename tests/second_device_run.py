"""Run in a process of its own: the whole of quantizing and measuring on a second device, against the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import second_device
from pocketsize.data.calibration import Windows
from pocketsize.data.text import Corpus, Document
from pocketsize.data.written import write_windows
from pocketsize.measurement import quality
from pocketsize.measurement.suite import quality_of
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.quantization import gptq
from pocketsize.recipes.awq import Awq
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.step import Context
from tiny import TEXT, write_tiny


def swept(W: torch.Tensor, factor: gptq.Factor, scheme: gptq.Scheme, *, search: bool) -> object:
    """What Triton would do, here by the compiled loops of the CPU."""
    held = gptq.Factor(factor.M.cpu(), factor.d.cpu(), factor.damp, factor.escalations)
    assert W.device.type == factor.M.device.type == second_device.NAME
    return tuple(T.to(W.device) for T in gptq.sweep(W.cpu(), held, scheme, search=search))


def work_on(device: torch.device) -> None:
    """Make it the device that works, wherever that is asked."""
    for name, module in list(sys.modules.items()):
        if name.startswith("pocketsize.") and hasattr(module, "working_device"):
            module.working_device = lambda: device


def answers(folder: Path, work: Path, device: torch.device, step: Gptq | Awq) -> list[torch.Tensor]:
    """Codes and scales of every matrix, then what was measured and what the model wrote."""
    work_on(device)
    model = load(folder)
    step = step.resolve(model, ("folder",))
    ids = torch.randint(3, 320, (8, 32), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, 20:] = False  # padding
    ctx = Context(ids, mask, open_journal(work, {}), lambda *_: None)
    small = step.apply(model, ctx)
    found = [t for q in small.quantized.values() for t in (q.codes, q.scale, q.zero)]
    found.append(torch.tensor([layer.error for layer in ctx.reports[0].layers]))
    found.append(torch.tensor([m.value for m in measured(model, small, ids)]))
    if model.arch.task == "generate":
        module = materialise(model, torch.float32, device)
        found.append(write_windows(module, tokenizer_of(model), count=2, length=8, seed=0))
    return found


def measured(model: Model, small: Model, ids: torch.Tensor) -> tuple[object, ...]:
    windows = Windows(ids, torch.ones_like(ids, dtype=torch.bool), torch.full((len(ids),), 99), "t", "0", 1)
    lines = [f"{TEXT[i % 3]} This is line number {i} of them all." for i in range(40)]
    corpus = Corpus("t", (Document("t", "\n\n".join(lines)),))
    return quality_of(model, small, windows, corpus, seed=0).measurements


def main() -> None:
    out = Path(sys.argv[1])
    device = second_device.install()
    gptq._gpu_sweep = lambda: swept
    quality.forward_dtype = lambda: torch.float32  # autocast has no rules for the second device
    for family in sys.argv[2:]:
        folder = write_tiny(out / family, family)
        for step in (Gptq(embeddings=8), Awq(embeddings=8)):
            there = answers(folder, out / f"{family}-{step.kind}-cpu", torch.device("cpu"), step)
            here = answers(folder, out / f"{family}-{step.kind}-second", device, step)
            assert len(here) == len(there)
            for i, (a, b) in enumerate(zip(here, there, strict=True)):
                same = a.device.type == "cpu" and torch.allclose(a.float(), b.float(), rtol=1e-3)
                assert same, (family, step.kind, i)
        print(family, len(here))


if __name__ == "__main__":
    main()
