"""What two language models say of each token of the same windows, in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor, nn

from pocketsize.data.calibration import Windows
from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.models.model import Model
from pocketsize.models.skeleton import fill, skeleton

# Tokens per forward pass, and logits held at once per model: both bound memory, neither the result.
BATCH_TOKENS = 2048
LOGITS = 2**23


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What each predicted token showed, sums in float64; `window` tells where the token stands.

    `kl` is KL(original || compressed) in nats, `nll` the negative log-likelihood of the true token
    under each model (original first), `agrees` whether both models put the same token first.
    """

    window: Int64[ndarray, "t"]
    kl: Float[ndarray, "t"]
    nll: Float[ndarray, "2 t"]
    agrees: Bool[ndarray, "t"]


def token_scores(
    log_p: Float[Tensor, "t vocab"],
    log_q: Float[Tensor, "t vocab"],
    targets: Int64[Tensor, "t"],
    window: Int64[Tensor, "t"],
) -> TokenScores:
    """The scores of positions, given the log-probabilities of the original (p) and of the compressed (q)."""
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
    nll = torch.stack([-log.gather(1, targets[:, None])[:, 0].double() for log in (log_p, log_q)])
    agrees = log_p.argmax(-1) == log_q.argmax(-1)
    return TokenScores(window.numpy(), kl.numpy(), nll.numpy(), agrees.numpy())


@torch.no_grad()
def compare(original: Model, compressed: Model, windows: Windows, dtype: torch.dtype) -> TokenScores:
    """Both models over all windows, one batch at a time; `dtype` is that of the blocks' matrices.

    A model compared with itself runs once.
    """
    _comparable(original, compressed, windows)
    modules = [_module(original, dtype, lambda name: None)]
    if compressed is not original:
        modules.append(_module(compressed, dtype, _shared(original, modules[0], compressed)))
    size = max(1, BATCH_TOKENS // windows.input_ids.shape[1])
    parts: list[TokenScores] = []
    for a in range(0, len(windows.input_ids), size):
        ids, mask = windows.input_ids[a : a + size], windows.mask[a : a + size]
        hidden = [_hidden(module, ids, mask, dtype) for module in modules]
        number = torch.arange(a, a + len(ids))
        parts += [_finite(part) for part in _chunks(modules, hidden, (ids, mask, number))]
    return TokenScores(
        np.concatenate([part.window for part in parts]),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.nll for part in parts], axis=1),
        np.concatenate([part.agrees for part in parts]),
    )


def _comparable(original: Model, compressed: Model, windows: Windows) -> None:
    for model in (original, compressed):
        if model.arch.task != "generate":
            raise UnsupportedError(f"{model.folder}: is no causal language model; it has no perplexity")
    sizes = [int(model.config.vocab_size) for model in (original, compressed)]
    if sizes[0] != sizes[1]:
        raise UnsupportedError(
            f"{compressed.folder}: has {sizes[1]} tokens, {original.folder} has {sizes[0]}; "
            "only models with the same tokenizer can be compared token by token"
        )
    if (top := int(windows.input_ids.max())) >= sizes[0]:
        raise UnsupportedError(
            f"{original.folder}: the tokenizer gives token {top}, the model knows {sizes[0]}"
        )


def _shared(original: Model, loaded: nn.Module, compressed: Model) -> Callable[[str], Tensor | None]:
    """The tensors of `loaded` that both models have from the same checkpoint."""
    if original.checkpoint is not compressed.checkpoint:
        return lambda name: None
    here = dict(loaded.named_parameters())
    changed = original.quantized.keys() | compressed.quantized.keys()
    return lambda name: here[name].detach() if name in here and name not in changed else None


def _module(model: Model, dtype: torch.dtype, shared: Callable[[str], Tensor | None]) -> nn.Module:
    """The whole model, the matrices of its blocks in `dtype`, everything else float32.

    Under autocast that gives the same numbers as float32 matrices, in half the memory.
    """
    module = skeleton(model)
    blocks = f"{model.arch.blocks}."
    linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)]
    matrices = {f"{name}.weight" for name in linears}

    def read(name: str) -> Tensor:
        held = shared(name)
        return (
            held if held is not None else model.weight(name).to(dtype if name in matrices else torch.float32)
        )

    fill(module, "", read)
    return module.eval().requires_grad_(False)


def _hidden(
    module: nn.Module, ids: Int64[Tensor, "b s"], mask: Bool[Tensor, "b s"], dtype: torch.dtype
) -> Float[Tensor, "b s hidden"]:
    body = module.get_submodule(cast(str, module.base_model_prefix))
    attend = None if bool(mask.all()) else mask.long()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return body(input_ids=ids, attention_mask=attend, use_cache=False).last_hidden_state


def _chunks(
    modules: list[nn.Module],
    hidden: list[Tensor],
    batch: tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"], Int64[Tensor, "b"]],
) -> Iterator[TokenScores]:
    """The scores of a batch, so many positions at a time that the logits stay small."""
    ids, mask, number = batch
    heads = [cast(Callable[[], nn.Linear], module.get_output_embeddings)() for module in modules]
    counted = mask[:, 1:] & mask[:, :-1]
    window = number[counted.nonzero()[:, 0]]
    targets = ids[:, 1:][counted]
    states = [h[:, :-1][counted].float() for h in hidden]
    step = max(1, LOGITS // heads[0].weight.shape[0])
    for a in range(0, len(targets), step):
        part = slice(a, a + step)
        logs = [F.log_softmax(head(s[part]), dim=-1) for head, s in zip(heads, states, strict=True)]
        yield token_scores(logs[0], logs[-1], targets[part], window[part])


def _finite(scores: TokenScores) -> TokenScores:
    for who, values in (
        ("original", scores.nll[0]),
        ("compressed", scores.nll[1]),
        ("compressed", scores.kl),
    ):
        if not np.isfinite(values).all():
            bad = int(scores.window[~np.isfinite(values)][0])
            raise NumericalError(
                f"the {who} model gives NaN or infinite probabilities in evaluation window {bad}"
            )
    return scores
