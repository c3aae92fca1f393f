"""How far models with other weights laid over them are from the original, on held-out windows.

One evaluator for every side: blocks in bfloat16 autocast, head and softmax in float32, KL at
every position, perplexity of the next token within each window. Candidates come in groups, so
that the original's logits are made once for all of them and never kept.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from meter import cpu_seconds, write_json
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

BATCH, CHUNK = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help="an .npz: one array of token ids per domain")
    parser.add_argument("reference", type=Path, help="where the original's last states are kept")
    parser.add_argument("stems", type=Path, nargs="+", help="STEM.safetensors -> STEM.score.json")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cpu = cpu_seconds()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    windows = {name: torch.from_numpy(ids) for name, ids in np.load(options.windows).items()}
    norms = {n: W.detach().clone() for n, W in model.model.named_parameters(prefix="model") if W.ndim == 1}
    with torch.inference_mode():
        if not options.reference.exists():
            partial = options.reference.with_suffix(".partial.npz")
            np.savez(partial, **states(model, windows))
            partial.replace(options.reference)
        original = dict(np.load(options.reference))
        candidates = []
        for stem in options.stems:
            lay_over(model, stem.with_suffix(".safetensors"), norms)
            candidates.append(states(model, windows))
        scores = compare(model, windows, original, candidates)
    for stem, domains in zip(options.stems, scores, strict=True):
        spent = round((cpu_seconds() - cpu) / len(options.stems), 1)
        write_json(stem.with_suffix(".score.json"), {"score_cpu_s": spent, "domains": domains})


def states(model: torch.nn.Module, windows: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What the head reads, float32, for every window of every domain."""
    found = {}
    for name, ids in windows.items():
        with torch.autocast("cpu", torch.bfloat16):
            parts = [model.model(x).last_hidden_state.float() for x in ids.split(BATCH)]
        found[name] = torch.cat(parts).numpy()
    return found


def lay_over(model: torch.nn.Module, path: Path, norms: dict[str, Tensor]) -> None:
    """Put the matrices of a file in place of the model's, and norms that it changed."""
    own, weights = dict(model.model.named_parameters(prefix="model")), load_file(path)
    blocks = {name for name, W in own.items() if W.ndim == 2 and ".layers." in name}
    if {name for name, W in weights.items() if W.ndim == 2} != blocks:
        raise SystemExit(f"{path}: {sorted(set(weights) ^ blocks)[:3]} are in the file or the model alone")
    for name, W in norms.items():
        own[name].copy_(W)  # as they were: another candidate may have changed them
    for name, W in weights.items():
        if own[name].shape != W.shape:
            raise SystemExit(f"{path}: {name} has shape {tuple(W.shape)}, the model {tuple(own[name].shape)}")
        own[name].copy_(W)


def compare(
    model: torch.nn.Module,
    windows: dict[str, Tensor],
    original: dict[str, np.ndarray],
    candidates: list[dict[str, np.ndarray]],
) -> list[dict[str, object]]:
    """The figures of each candidate, by domain."""
    scores: list[dict[str, object]] = [{} for _ in candidates]
    for name, ids in windows.items():
        following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1).flatten()
        # Filled in place: small results kept between large temporaries would fragment the heap.
        kl, same, loss = (torch.empty(len(candidates), ids.numel()) for _ in range(3))
        own_loss = torch.empty(ids.numel())
        streams = [torch.from_numpy(one[name]).flatten(0, 1) for one in (original, *candidates)]
        for a in range(0, ids.numel(), CHUNK):
            part = slice(a, min(a + CHUNK, ids.numel()))
            log_p = F.log_softmax(model.lm_head(streams[0][part]), dim=-1)
            p, best, y = log_p.exp(), log_p.argmax(dim=-1), following[part, None]
            own_loss[part] = -log_p.gather(1, y)[:, 0]
            for i, stream in enumerate(streams[1:]):
                log_q = F.log_softmax(model.lm_head(stream[part]), dim=-1)
                same[i, part] = (log_q.argmax(dim=-1) == best).float()
                loss[i, part] = -log_q.gather(1, y)[:, 0]
                kl[i, part] = torch.linalg.vecdot(p, log_p - log_q)
        for i, score in enumerate(scores):
            score[name] = summary(kl[i], same[i], loss[i], own_loss, ids.shape[1])
    return scores


def summary(kl: Tensor, same: Tensor, loss: Tensor, own_loss: Tensor, length: int) -> dict[str, object]:
    """The figures of one domain; the last position of a window has no next token to predict."""
    by_window = kl.double().view(-1, length).mean(dim=1)

    def perplexity(one: Tensor) -> float:
        return math.exp(one.double().view(-1, length)[:, :-1].mean().item())

    return {
        "tokens": kl.numel(),
        "kl_mean": by_window.mean().item(),
        "kl_p99": kl.quantile(0.99).item(),
        "kl_windows": [round(value, 6) for value in by_window.tolist()],
        "top1": same.double().mean().item(),
        "perplexity": perplexity(loss),
        "perplexity_original": perplexity(own_loss),
    }


if __name__ == "__main__":
    main()
