"""What a language model keeps when it runs with its gates, what that saves, and how fast it then is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pocketsize.data.calibration import Windows
from pocketsize.errors import UsageError
from pocketsize.measurement.latency import row
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.quality import Quality, measurements, protocol
from pocketsize.measurement.tokens import TokenScores, token_scores
from pocketsize.models.gated import gated
from pocketsize.models.model import Model
from pocketsize.models.products import stock_products
from pocketsize.models.skeleton import materialise
from pocketsize.pruning.gate import Gates, Tally

SUBJECT, WHOLE = "gated", "without gates"
# Tokens that are read before, and those that are timed, in each of so many rounds, turn about.
READ, TIMED, ROUNDS = 128, 32, 5
# Positions that are scored at once, and logits of windows that run with gates together.
CHUNK, LOGITS = 128, 2**27
_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "kl_mean": "KL(without gates || with them), mean over tokens",
        "kl_p99": "KL(without gates || with them), 99th percentile over tokens",
        "top1": "tokens where the model puts the same token first with its gates and without",
        "perplexity": "exp of the mean negative log-likelihood per token, with gates",
        "perplexity_ratio": "perplexity without gates over that with them",
    }
)


def gated_quality(model: Model, gates: Gates, windows: Windows, *, seed: int) -> Quality:
    """KL, top-1 agreement and perplexity of a model with gates against itself, and the operations saved.

    Everything runs in float32, every token with its gates, as if texts were decoded.
    """
    if windows.generated:
        raise UsageError(f"{windows.name}: holds text that a model wrote; it may calibrate, never evaluate")
    scores, tally = compare_gated(materialise(model), model, gates, windows)
    rows = [
        replace(m, method=_METHODS[m.name], subject=SUBJECT)
        for m in measurements(scores, windows, seed)
        if m.name in _METHODS and m.subject == "compressed"
    ]
    own = [
        said
        for said in protocol(windows, torch.float32, seed)
        if not said.startswith(("KL ", "Bits ", "Matri"))
    ]
    length = windows.input_ids.shape[1]
    said = (
        f"Gates: every token but the first of a window runs with gates of kind {gates.kind}, in float32; "
        f"operations are counted as if windows of {length} tokens were decoded token by token."
    )
    return Quality((*rows, *_saved(tally)), (*own, said))


def _saved(tally: Tally) -> Iterator[Measurement]:
    """The shares that the tally tells."""
    every = "operations left out over all of blocks (linears, attention) and head, counted"
    blocks = "operations left out in blocks over all of theirs, counted; the head aside"
    for name, value, how in (
        ("operations_saved", tally.share, every),
        ("block_operations_saved", tally.share_of_blocks, blocks),
    ):
        yield Measurement(name, value, "share", "higher", how, SUBJECT, samples=tally.tokens)


@torch.no_grad()
def compare_gated(
    module: nn.Module, model: Model, gates: Gates, windows: Windows
) -> tuple[TokenScores, Tally]:
    """Every predicted token without gates and with them, and what they saved."""
    counted = windows.mask[:, 1:] & windows.mask[:, :-1]
    total, at = int(counted.sum()), 0
    scores = TokenScores(
        counted.nonzero()[:, 0].numpy(), np.empty(total), np.empty((2, total)), np.empty(total, dtype=bool)
    )
    total_tally = Tally()
    texts = [ids[real] for ids, real in zip(windows.input_ids, windows.mask, strict=True)]
    together = max(1, LOGITS // (windows.input_ids.shape[1] * int(model.config.vocab_size)))
    for a in range(0, len(texts), together):
        some = texts[a : a + together]
        with gated(module, model, gates) as tally:
            small = [_logits(module, ids) for ids in some]
        for name in ("tokens", "blocks", "head", "saved_blocks", "saved_head"):
            setattr(total_tally, name, getattr(total_tally, name) + getattr(tally, name))
        for ids, q in zip(some, small, strict=True):
            at = _score(_logits(module, ids), q, ids[1:], (scores, at))
    return scores, total_tally


def _score(
    p: Float[Tensor, "t vocab"],
    q: Float[Tensor, "t vocab"],
    targets: Int64[Tensor, "t"],
    into: tuple[TokenScores, int],
) -> int:
    """Write the scores of a window from a place on; the place behind them."""
    scores, at = into
    for own, small, true in zip(p.split(CHUNK), q.split(CHUNK), targets.split(CHUNK), strict=True):
        part = slice(at, at + len(true))
        found = token_scores(own, small, true, torch.empty_like(own))
        scores.kl[part], scores.nll[:, part], scores.agrees[part] = found
        at += len(true)
    return at


def _logits(module: nn.Module, ids: Int64[Tensor, "s"]) -> Float[Tensor, "t vocab"]:
    """What is said of every token of a text but the first."""
    return module(input_ids=ids[None], use_cache=False).logits[0, :-1].float().clone()


@torch.no_grad()
@stock_products()
def gated_speed(
    module: nn.Module,
    model: Model,
    gates: Gates,
    ids: Int64[Tensor, "n s"],
    *,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Decode speed with gates and without, in float32, turn about; medians over all timed tokens.

    Each round reads a part of a window at once, and the tokens after it one by one: real text, since what
    gates leave out depends on it. `module` is the model in memory.
    """
    before = torch.get_num_threads()
    taken: dict[str, list[float]] = {WHOLE: [], SUBJECT: []}
    read = min(READ, ids.shape[1] // 2)
    torch.set_num_threads(threads)
    try:
        for i in range(ROUNDS + 1):
            text = ids[i % len(ids)][None]
            whole = _decoding(module, text, read, clock)
            with gated(module, model, gates):
                own = _decoding(module, text, read, clock)
            if i:  # the first round compiles and warms up
                taken[WHOLE] += whole
                taken[SUBJECT] += own
    finally:
        torch.set_num_threads(before)
    count = len(taken[WHOLE])
    how = (
        f"torch float32, {threads} threads, batch 1, text after {read} tokens, turn about, median of {count}"
    )
    return [
        row("decode_rate", 1 / float(np.median(seconds)), how, subject, count)
        for subject, seconds in taken.items()
    ]


def _decoding(
    module: nn.Module, ids: Int64[Tensor, "1 s"], read: int, clock: Callable[[], float]
) -> list[float]:
    """Seconds of each token after the first ones."""
    out: Any = module(input_ids=ids[:, :read], use_cache=True, logits_to_keep=1)
    seconds: list[float] = []
    for t in range(read, min(read + TIMED, ids.shape[1])):
        start = clock()
        out = module(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        seconds.append(clock() - start)
    return seconds
