"""A folder loaded by stock transformers in a process of its own, which knows nothing of Pocketsize."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pocketsize.errors import IntegrityError
from pocketsize.exporting.behaviour import TEXTS, loaded
from pocketsize.exporting.compressed_tensors import stored_value
from pocketsize.models.inputs import round_inputs
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.products import stock_products
from pocketsize.models.skeleton import AUTO

# The same sums in the same order, give or take a thread: far below any difference that matters.
TOLERANCE = 1e-4
_SECONDS = 600
_SCRIPT = """
import io, os, sys, numpy, torch
import transformers
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
folder, auto, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
ids = numpy.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
with torch.no_grad():
    out = torch.cat([model(input_ids=torch.from_numpy(row[None]))[0] for row in ids])
given = io.BytesIO()
numpy.save(given, out.float().numpy())
answer.write(given.getvalue())
answer.close()
"""


def reload_check(model: Model, out: Path) -> tuple[str, ...]:
    """Load the folder in a fresh process and compare what it computes with our own forward.

    The sentence says what was seen; raises IntegrityError when the two differ.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        return (
            "not loaded in transformers: python -m pip install 'pocketsize[transformers]' to check that too",
        )
    ids = _ids(model)
    got = _elsewhere(out, ids, AUTO[model.arch.task].__name__)
    expected = _here(model, ids)
    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        raise IntegrityError(f"{out}: stock transformers computes {tuple(got.shape)}, or no finite numbers")
    worst = float((got - expected).abs().max() / (expected.max() - expected.min()))
    what = "hidden states" if model.arch.task == "embed" else "logits"
    if worst > TOLERANCE:
        raise IntegrityError(f"{out}: stock transformers' {what} are off by {worst:.2g} of their range")
    return (
        f"stock transformers, in a fresh process, gives the same {what} (within {worst:.1g} of their range)",
    )


def _ids(model: Model) -> Tensor:
    """The probe texts, cut to one length."""
    tokenizer = tokenizer_of(model)
    ids = [list(tokenizer(text).input_ids) for text in TEXTS]
    length = min(map(len, ids))
    return torch.tensor([row[:length] for row in ids])


@torch.no_grad()
def _here(model: Model, ids: Tensor) -> Tensor:
    """As the other process multiplies: where inputs are rounded, another last digit becomes another step."""
    module: nn.Module = loaded(model, lambda name: stored_value(model, name))
    round_inputs(module, model.rounds)
    with stock_products():
        return torch.cat([module(input_ids=row[None])[0] for row in ids]).to(torch.float32)


def _elsewhere(out: Path, ids: Tensor, auto: str) -> Tensor:
    """What the other process computes; ids and answer go through pipes, so nothing can be left behind."""
    asked = io.BytesIO()
    np.save(asked, ids.numpy())
    # -P: no module is taken from the folder that we happen to be in.
    command = [sys.executable, "-P", "-c", _SCRIPT, str(out.absolute()), auto, str(torch.get_num_threads())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command, input=asked.getvalue(), capture_output=True, env=environment, timeout=_SECONDS, check=False
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise IntegrityError(f"{out}: stock transformers cannot load it: {reason[:300]}")
    return torch.from_numpy(np.load(io.BytesIO(done.stdout), allow_pickle=False))
