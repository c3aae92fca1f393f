"""Attention on a CPU: causal in panels, without the half that the mask removes; one token's by rows.

Each mode takes over calls of `scaled_dot_product_attention` that it is for, and leaves all others to torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

PANEL = 128
_of_softmax: Callable[..., Tensor] = cast(Any, torch)._softmax_backward_data
# Queries at a time where slopes are taken too: what is made of them stays in a cache.
LEARNING = 64


class _Attention(TorchFunctionMode, ABC):
    """A mode in which some calls of `scaled_dot_product_attention` are computed otherwise."""

    @abstractmethod
    def takes(self, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Whether it is for this call."""

    @abstractmethod
    def instead(self, Q: Tensor, K: Tensor, V: Tensor, scale: float | None) -> Tensor:
        """What the call gives."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and len(args) == 3 and _bare(args[0], options):
            Q, K, V = args
            if self.takes(args, options):
                return self.instead(Q, K, V, options.get("scale"))
        return func(*args, **options)


class CausalPanels(_Attention):
    """While it is entered, plain causal attention in bfloat16 on the CPU runs through `causal`.

    torch's own kernel for it takes nearly twice the time at 512 tokens (34 against 18 ms for 4 x 9 heads
    of 64, one core). Everything else, and whatever has a mask of its own, is left to torch.
    """

    def takes(self, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Whether it is for this call."""
        return args[0].dtype == torch.bfloat16 and _whole(args, options, PANEL)

    def instead(self, Q: Tensor, K: Tensor, V: Tensor, scale: float | None) -> Tensor:
        """Attention of each head on its own keys, in panels."""
        repeat = Q.shape[1] // K.shape[1]  # grouped queries: each key head serves several
        K, V = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (K, V))
        return causal(Q, K, V, scale=scale)


class GroupedRows(_Attention):
    """While it is entered, one token's query heads that share keys are rows of one product.

    Torch reads the keys once for each head: 64 windows of 256 tokens, 9 heads on 3 of keys, take 11.8 ms in
    bfloat16 instead of 2.9, and 14.2 instead of 6.0 in float32 (one core of an EPYC). Softmax and sums are
    torch's own, row by row.
    """

    def takes(self, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Whether it is for this call."""
        return _one_token(args, options)

    def instead(self, Q: Tensor, K: Tensor, V: Tensor, scale: float | None) -> Tensor:
        """Attention of as many tokens as heads share keys, one beside the other."""
        rows = Q.reshape(len(Q), K.shape[1], Q.shape[1] // K.shape[1], Q.shape[-1])
        out = F.scaled_dot_product_attention(rows, K, V, scale=scale)
        return out.reshape(*Q.shape[:-1], V.shape[-1])


class LearningPanels(_Attention):
    """While it is entered, plain causal attention on the CPU runs through `Attended`, forward and backward.

    For 4 windows of 512 tokens, 9 heads of 64 on 3 of keys, torch's own takes 120 ms of one core of an EPYC
    in bfloat16 and 75 in float32, this one 46.
    """

    def takes(self, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Whether it is for this call."""
        return _whole(args, options, LEARNING)

    def instead(self, Q: Tensor, K: Tensor, V: Tensor, scale: float | None) -> Tensor:
        """Attention whose slopes are known."""
        return Attended.apply(Q, K, V, Q.shape[-1] ** -0.5 if scale is None else scale)


class Attended(torch.autograd.Function):
    """softmax(Q K^T * scale, later keys left out) V in float32, in panels of queries.

    Q of the shape [batch, heads, seq, d], K and V [batch, key heads, seq, d], of which each serves as many
    heads as there are more; the result is of Q's type. Heads that share keys are rows of one product. For the
    slopes the weights are computed once more instead of kept.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, *given: Any) -> Tensor:
        Q, K, V, scale = given
        ctx.save_for_backward(Q, K, V)
        ctx.scale = scale
        shape, (q, k, v) = Q.shape, _grouped(Q, K, V)
        out = torch.empty_like(q)
        for a, b in _panels(shape[-2]):
            P = _weights(_rows(q, a, b), k, (a, b), scale)
            out[:, :, a:b] = (P @ v[:, :b]).view(len(q), -1, b - a, shape[-1])
        return out.view(shape).to(Q.dtype)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        given, scale = ctx.saved_tensors, ctx.scale
        q, k, v = _grouped(*given)
        slope = outputs[0].float().reshape(q.shape)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for a, b in _panels(q.shape[-2]):
            own, g = _rows(q, a, b), _rows(slope, a, b)
            P = _weights(own, k, (a, b), scale)
            of_v[:, :b] += P.transpose(1, 2) @ g
            of_scores = _of_softmax(g @ v[:, :b].transpose(1, 2), P, -1, torch.float32)
            of_q[:, :, a:b] = (of_scores @ k[:, :b]).mul_(scale).view(len(q), -1, b - a, q.shape[-1])
            of_k[:, :b] += of_scores.transpose(1, 2) @ own
        slopes = zip((of_q, of_k.mul_(scale), of_v), given, strict=True)
        return *(found.view(T.shape).to(T.dtype) for found, T in slopes), None


def _grouped(Q: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as [batch x key heads, heads that share, seq, d], keys and values [.., seq, d]; float32."""
    k, v = (x.float().reshape(-1, *x.shape[2:]) for x in (K, V))
    return Q.float().reshape(len(k), -1, *Q.shape[2:]), k, v


def _panels(length: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + LEARNING, length)) for a in range(0, length, LEARNING))


def _rows(x: Tensor, a: int, b: int) -> Tensor:
    """Positions a .. b of all heads that share keys, one after another."""
    return x[:, :, a:b].reshape(len(x), -1, x.shape[-1])


def _weights(q: Tensor, k: Tensor, panel: tuple[int, int], scale: float) -> Tensor:
    """What each position of a panel gives to those up to it."""
    a, b = panel
    scores = (q * scale) @ k[:, :b].transpose(1, 2)
    scores.view(len(q), -1, b - a, b)[..., a:] += torch.full((b - a, b - a), float("-inf")).triu(1)
    return torch.softmax(scores, -1)


def causal(
    Q: Float[Tensor, "batch heads seq d"],
    K: Float[Tensor, "batch heads seq d"],
    V: Float[Tensor, "batch heads seq d"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch heads seq d"]:
    """softmax(Q K^T * scale, later keys left out) V; inside, the softmax is taken in float32."""
    length, factor = Q.shape[-2], Q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(Q)
    later = torch.full((PANEL, PANEL), float("-inf"), dtype=Q.dtype).triu(1)
    for a in range(0, length, PANEL):
        b = min(a + PANEL, length)
        scores = (Q[..., a:b, :] * factor) @ K[..., :b, :].transpose(-1, -2)
        scores[..., a:b] += later[: b - a, : b - a]
        out[..., a:b, :] = F.softmax(scores, dim=-1) @ V[..., :b, :]
    return out


def _bare(Q: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether a call is on the CPU, without a mask of its own and without chance."""
    return options.get("attn_mask") is None and not options.get("dropout_p") and Q.device.type == "cpu"


def _whole(args: Sequence[Any], options: Mapping[str, Any], panel: int) -> bool:
    """Whether a window of more than a panel looks at itself, causally."""
    Q, K, V = args
    return (
        bool(options.get("is_causal"))
        and Q.dtype in (torch.float32, torch.bfloat16)
        and Q.ndim == K.ndim == 4
        and len(Q) == len(K)
        and Q.shape[-2] > panel
        and K.shape == V.shape
        and Q.shape[-2:] == K.shape[-2:]
        and (Q.shape[1] == K.shape[1] or bool(options.get("enable_gqa")))
    )


def _one_token(args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a token looks at all keys, and several of its heads at the same."""
    Q, K, _ = args
    return (
        bool(options.get("enable_gqa"))
        and not options.get("is_causal")
        and Q.shape[-2] == 1
        and Q.shape[1] > K.shape[1]
    )
