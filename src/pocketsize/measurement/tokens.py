"""What two language models say of each token of the same windows, in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor, nn

from pocketsize.data.calibration import Windows
from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.models.cached import cache_for, reading
from pocketsize.models.device import working_device
from pocketsize.models.inputs import round_inputs
from pocketsize.models.model import Model
from pocketsize.models.stream import Read, stream, without_blocks
from pocketsize.quantization.kv import Cache

# Tokens per forward pass, logits held at once per model, and bytes of hidden states that wait between two
# blocks: all bound memory, none the result.
BATCH_TOKENS = 2048
LOGITS = 2**23
STATES = 2**28


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
    p: Float[Tensor, "t vocab"],
    q: Float[Tensor, "t vocab"],
    targets: Int64[Tensor, "t"],
    work: Float[Tensor, "t vocab"],
) -> tuple[Float[ndarray, "t"], Float[ndarray, "2 t"], Bool[ndarray, "t"]]:
    """KL, both negative log-likelihoods and agreement at each position, from the logits of both models.

        KL = sum_v exp(log p(v)) (log p(v) - log q(v)),     terms in float32, sum in float64

    `p`, `q` and `work` are used up: new memory for each chunk of logits would pile up in the heap.
    """
    agrees = p.argmax(-1) == q.argmax(-1)
    nll = torch.stack([-_log_softmax(x, work).gather(1, targets[:, None])[:, 0].double() for x in (p, q)])
    torch.sub(p, q, out=q)
    torch.exp(p, out=work).mul_(q)
    if work.device.type == "cpu":  # numpy sums rows of float32 in float64 without a copy of them
        kl = work.numpy().sum(-1, dtype=np.float64)
    else:
        kl = work.sum(-1, dtype=torch.float64).cpu().numpy()
    return kl, nll.cpu().numpy(), agrees.cpu().numpy()


def _log_softmax(x: Float[Tensor, "t vocab"], work: Float[Tensor, "t vocab"]) -> Float[Tensor, "t vocab"]:
    """log softmax of the rows of x, in x."""
    x -= x.amax(-1, keepdim=True)
    x -= torch.exp(x, out=work).sum(-1, keepdim=True).log()
    return x


@torch.no_grad()
def compare(
    original: Model,
    compressed: Model,
    windows: Windows,
    dtype: torch.dtype,
    shared: Int64[Tensor, "tokens"] | None = None,
) -> TokenScores:
    """Both models over all windows, one block in memory at a time; `dtype` is that of the blocks' matrices.

    A model compared with itself runs once. `shared` has the original's number of each token of a compressed
    model that has fewer, in whose tokens the windows then are.
    """
    _comparable(original, compressed, windows, shared)
    reads = [_reading(original, dtype, lambda name: None)]
    modules = [without_blocks(original, reads[0])]
    if compressed is not original:
        reads.append(_reading(compressed, dtype, _shared(original, modules[0], compressed)))
        modules.append(without_blocks(compressed, reads[1]))
    for module, model in zip(modules, (original, compressed), strict=False):
        round_inputs(module, model.rounds)
    counted, device = windows.mask[:, 1:] & windows.mask[:, :-1], working_device()
    scores, room, at = _empty(counted), _room(compressed), 0
    for ids, mask, here in _rounds(windows, counted, int(original.config.hidden_size)):
        read_as = (ids if shared is None else shared[ids], ids)
        states = [
            _hidden(module, model, read, own.to(device), mask.to(device), dtype)[:, :-1][here.to(device)]
            for module, model, read, own in zip(modules, (original, compressed), reads, read_as, strict=False)
        ]
        _score(modules, states, ids[:, 1:][here].to(device), room, (scores, at), shared)
        at += len(states[0])
    _require_finite(scores)
    return scores


@torch.no_grad()
def compare_caches(
    model: Model, caches: Sequence[Cache], windows: Windows, dtype: torch.dtype
) -> list[TokenScores]:
    """A model with each cache of keys and values against itself with all of them as they are."""
    _comparable(model, model, windows)
    fitting = [cache_for(model, cache) for cache in caches]
    read = _reading(model, dtype, lambda name: None)
    module = without_blocks(model, read)
    round_inputs(module, model.rounds)
    counted, device = windows.mask[:, 1:] & windows.mask[:, :-1], working_device()
    scores, room, at = [_empty(counted) for _ in caches], _room(model), 0
    for ids, mask, here in _rounds(windows, counted, int(model.config.hidden_size)):
        targets = ids[:, 1:][here].to(device)

        def states(part: tuple[Tensor, ...] = (ids, mask, here)) -> Float[Tensor, "t hidden"]:
            tokens, real, kept = (x.to(device) for x in part)
            return _hidden(module, model, read, tokens, real, dtype)[:, :-1][kept]

        own = states()
        for cache, into in zip(fitting, scores, strict=True):
            with reading(module, cache):
                small = states()
            _score([module, module], [own, small], targets, room, (into, at))
        at += len(own)
    for found in scores:
        _require_finite(found)
    return scores


def _empty(counted: Bool[Tensor, "n t"]) -> TokenScores:
    """Scores to be filled in place: small arrays kept between large ones would pin those in the heap."""
    total = int(counted.sum())
    return TokenScores(
        window=counted.nonzero()[:, 0].numpy(),
        kl=np.empty(total),
        nll=np.empty((2, total)),
        agrees=np.empty(total, dtype=bool),
    )


def _room(model: Model) -> Float[Tensor, "3 rows vocab"]:
    vocabulary = int(model.config.vocab_size)
    return torch.empty(3, max(1, LOGITS // vocabulary), vocabulary, device=working_device())


def _rounds(
    windows: Windows, counted: Bool[Tensor, "n s"], width: int
) -> Iterator[tuple[Int64[Tensor, "n s"], Bool[Tensor, "n s"], Bool[Tensor, "n t"]]]:
    """The windows in parts whose hidden states, and those they started with, have room in memory."""
    length = windows.input_ids.shape[1]
    size = max(1, STATES // (2 * 4 * width * length))
    return zip(*(x.split(size) for x in (windows.input_ids, windows.mask, counted)), strict=True)


def _comparable(
    original: Model, compressed: Model, windows: Windows, shared: Int64[Tensor, "tokens"] | None = None
) -> None:
    for model in (original, compressed):
        if model.arch.task != "generate":
            raise UnsupportedError(f"{model.folder}: is no causal language model; it has no perplexity")
    sizes = [int(model.config.vocab_size) for model in (original, compressed)]
    if shared is None and sizes[0] != sizes[1]:
        raise UnsupportedError(
            f"{compressed.folder}: has {sizes[1]} tokens, {original.folder} has {sizes[0]}; "
            "only models with the same tokenizer can be compared token by token"
        )
    if (top := int(windows.input_ids.max())) >= sizes[1]:
        raise UnsupportedError(
            f"{original.folder}: the tokenizer gives token {top}, the model knows {sizes[1]}"
        )


def _shared(original: Model, loaded: nn.Module, compressed: Model) -> Callable[[str], Tensor | None]:
    """The tensors around the blocks of `loaded` that both models have from the same checkpoint."""
    if original.checkpoint is not compressed.checkpoint:
        return lambda name: None
    here = {name: tensor for name, tensor in loaded.named_parameters() if not tensor.is_meta}
    changed = {name for m in (original, compressed) for name in (*m.quantized, *m.changed)}
    return lambda name: here[name].detach() if name in here and name not in changed else None


def _reading(model: Model, dtype: torch.dtype, shared: Callable[[str], Tensor | None]) -> Read:
    """Weights as they are measured: the matrices of the blocks in `dtype`, everything else float32.

    Under autocast that gives the same numbers as float32 matrices, in half the memory.
    """
    matrices = set(model.linears)

    def read(name: str) -> Tensor:
        held = shared(name)
        return (
            held if held is not None else model.weight(name).to(dtype if name in matrices else torch.float32)
        )

    return read


def _hidden(
    module: nn.Module,
    model: Model,
    read: Read,
    ids: Int64[Tensor, "n s"],
    mask: Bool[Tensor, "n s"],
    dtype: torch.dtype,
) -> Float[Tensor, "n s hidden"]:
    """The last hidden states of all windows, block by block, float32."""
    body = module.get_submodule(cast(str, module.base_model_prefix))
    size = max(1, BATCH_TOKENS // ids.shape[1])

    def forward(part: Int64[Tensor, "b s"], real: Bool[Tensor, "b s"]) -> Float[Tensor, "b s hidden"]:
        attend = None if bool(real.all()) else real.long()
        return body(input_ids=part, attention_mask=attend, use_cache=False).last_hidden_state.float()

    batches = zip(ids.split(size), mask.split(size), strict=True)
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat(stream(module, model, read, [partial(forward, *batch) for batch in batches]))


def _score(
    modules: list[nn.Module],
    states: list[Float[Tensor, "t hidden"]],
    targets: Int64[Tensor, "t"],
    room: Float[Tensor, "3 rows vocab"],
    into: tuple[TokenScores, int],
    shared: Int64[Tensor, "tokens"] | None = None,
) -> None:
    """The scores of a batch, written from a place on; so many positions at a time as there is room for."""
    scores, start = into
    rows = [slice(None) if shared is None else shared.to(targets.device), slice(None)]
    heads = [cast(Callable[[], nn.Linear], module.get_output_embeddings)() for module in modules]
    weights = [head.weight[own] for head, own in zip(heads, rows, strict=False)]
    for a in range(0, len(targets), room.shape[1]):
        b = min(a + room.shape[1], len(targets))
        p, q, work = room[:, : b - a]
        for logits, module, W, head, own, state in zip(
            (p, q), modules, weights, heads, rows, states, strict=False
        ):
            torch.mm(state[a:b], W.T, out=logits)
            if isinstance(head.bias, Tensor):
                logits += head.bias[own]
            if cap := getattr(module.config, "final_logit_softcapping", None):
                logits.div_(cap).tanh_().mul_(cap)  # Gemma 2 bends its logits
        if len(heads) == 1:
            q.copy_(p)
        part = slice(start + a, start + b)
        scores.kl[part], scores.nll[:, part], scores.agrees[part] = token_scores(p, q, targets[a:b], work)


def _require_finite(scores: TokenScores) -> None:
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
