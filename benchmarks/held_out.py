"""Little text for comparing variants of one method: what calibrates, and KL on what calibrated nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from corpus import domains, first_windows, pick_windows, token_streams
from torch import Tensor

from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise

LENGTH, SEQUENCES, WINDOWS, CHUNK = 512, 16, 4, 256


def texts(folder: Path, downloads: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows that calibrate, and windows of each domain that evaluate."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def streams(found: Sequence[str]) -> list[np.ndarray]:
        return token_streams(found, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    both = domains(downloads)
    joined = [np.concatenate(streams(domain.calibrate)) for domain in both]
    held_out = {d.name: torch.from_numpy(first_windows(streams(d.evaluate), WINDOWS, LENGTH)) for d in both}
    return torch.from_numpy(pick_windows(joined, 128, LENGTH, 0)[:SEQUENCES]), held_out


@torch.inference_mode()
def states(model: Model, evaluate: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The last hidden states of every window, and the head; blocks in bfloat16 autocast."""
    module = materialise(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = {
            name: torch.cat([module.model(w[None]).last_hidden_state[0].float() for w in windows])
            for name, windows in evaluate.items()
        }
    return found, module.lm_head.weight


@torch.inference_mode()
def divergence(
    before: tuple[dict[str, Tensor], Tensor], after: tuple[dict[str, Tensor], Tensor], name: str
) -> float:
    """KL(before || after), nats per token of one domain."""
    found = []
    for a, b in zip(before[0][name].split(CHUNK), after[0][name].split(CHUNK), strict=True):
        p, q = ((x @ head.T).log_softmax(-1) for x, head in ((a, before[1]), (b, after[1])))
        found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())
