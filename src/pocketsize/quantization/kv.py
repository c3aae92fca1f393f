"""The cache of keys and values in fewer bits: what attention reads from it, and the bytes it takes.

Two ways. `Blockwise` is what llama.cpp does with `--cache-type-k` and `--cache-type-v`: every key and
value is rounded as it is stored, in blocks of 32 of its own entries, after a Hadamard rotation of its
head. `Kivi` (arXiv:2402.02750) rounds keys per channel, over groups of tokens, and values per token, over
groups of channels; the latest tokens stay as they are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.linalg import hadamard
from pocketsize.quantization.kv_blocks import BITS, BLOCK, rounded

WIDTHS = (2, 3, 4, 8)
# Queries at a time: bounds the memory for weights of attention.
PANEL = 256

Heads = Float[Tensor, "batch heads tokens width"]


@dataclass(frozen=True, slots=True)
class Blockwise:
    """llama.cpp's cache: types for keys and for values, all tokens alike.

    Where the type has fewer than 16 bits and 64 divides a head, llama.cpp rotates heads by Hadamard
    matrices before they are stored, and queries are rounded to 8 bits for the product with keys.
    `neighbours` says that in the runtime's heads rotary pairs lie side by side, which decides what
    shares a block.
    """

    keys: str = "q8_0"
    values: str = "q8_0"
    neighbours: bool = False

    def __post_init__(self) -> None:
        for kind in (self.keys, self.values):
            if kind not in BITS:
                raise UsageError(f"unknown cache type {kind!r}{did_you_mean(kind, BITS)}")

    @property
    def name(self) -> str:
        """`q8_0`, or `q8_0/q4_0` where keys and values differ."""
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    @property
    def flash(self) -> bool:
        """Whether llama.cpp runs flash attention: values in fewer bits need it, float32 does without."""
        return (self.keys, self.values) != ("f32", "f32")

    @property
    def flags(self) -> str:
        """The options of llama.cpp's programs that make this cache."""
        return f"-ctk {self.keys} -ctv {self.values} -fa {'on' if self.flash else 'off'}"

    def bits(self, tokens: int, width: int) -> float:
        """Bits for the keys and values of one head after so many tokens."""
        self.require(width)
        return tokens * width * (BITS[self.keys] + BITS[self.values])

    def require(self, width: int) -> None:
        """Refuse heads that no whole number of blocks fills."""
        if min(BITS[self.keys], BITS[self.values]) < 16 and width % BLOCK:
            raise UnsupportedError(
                f"cache {self.name}: heads of {width} are no whole number of blocks of {BLOCK}; llama.cpp "
                "refuses them too. Ask for f16, or for a kivi cache with a group that divides them"
            )

    def attend(
        self, Q: Heads, K: Heads, V: Heads, attention: Callable[[Heads, Heads, Heads], Heads]
    ) -> Heads:
        """What `attention` gives where it reads this cache; the heads of Q may be a multiple of K's."""
        width = K.shape[-1]
        self.require(width)
        if self.neighbours:
            Q, K = (_interleaved(x) for x in (Q, K))
        if _is_rotated(self.keys, width):
            Q, K = (_rotated(x, _largest_power(width)) for x in (Q, K))
        turned = _is_rotated(self.values, V.shape[-1])
        V = rounded(_rotated(V, 64) if turned else V, self.values)
        Q = rounded(Q, "q8_0") if BITS[self.keys] < 16 else Q
        out = attention(Q, rounded(K, self.keys), V)
        return _rotated(out, 64) if turned else out


@dataclass(frozen=True, slots=True)
class Kivi:
    """KIVI: keys of `key_bits` per channel, values of `value_bits` per token, in groups, asymmetric.

    The first `sink` tokens are never rounded. Keys after them wait until there are `residual`, and are
    rounded together; a value is rounded once `residual` values came after it. Scale and minimum of a
    group are float16.
    """

    key_bits: int = 2
    value_bits: int = 2
    group: int = 32
    residual: int = 128
    sink: int = 0

    def __post_init__(self) -> None:
        for bits in (self.key_bits, self.value_bits):
            if bits not in WIDTHS:
                raise UsageError(f"kivi: bits must be one of {', '.join(map(str, WIDTHS))}, got {bits}")
        if self.group < 1 or self.residual < 1 or self.residual % self.group:
            raise UsageError(
                f"kivi: a residual of {self.residual} tokens is no multiple of a group of {self.group}"
            )
        if self.sink < 0:
            raise UsageError(f"kivi: sink must not be negative, got {self.sink}")

    @property
    def name(self) -> str:
        """`kivi-2`, `kivi-k4v2`, `kivi-2-g64-r64-s4`: what differs from KIVI's own setting is said."""
        same = self.key_bits == self.value_bits
        word = f"{self.key_bits}" if same else f"k{self.key_bits}v{self.value_bits}"
        own = (("g", self.group, 32), ("r", self.residual, 128), ("s", self.sink, 0))
        return "-".join(("kivi", word, *(f"{letter}{n}" for letter, n, usual in own if n != usual)))

    def rounded_keys(self, tokens: int) -> int:
        """How many keys are rounded once so many tokens are stored; they follow the sink."""
        return max(0, tokens - self.sink) // self.residual * self.residual

    def rounded_values(self, tokens: int) -> int:
        """The same of values."""
        return max(0, tokens - self.sink - self.residual)

    def bits(self, tokens: int, width: int) -> float:
        """Bits for the keys and values of one head after so many tokens; 16 for what is not rounded."""
        self.require(width)
        total = 2 * 16 * tokens * width
        for bits, count in (
            (self.key_bits, self.rounded_keys(tokens)),
            (self.value_bits, self.rounded_values(tokens)),
        ):
            total -= count * width * (16 - bits - 32 / self.group)
        return total

    def require(self, width: int) -> None:
        """Refuse heads that no whole number of groups fills."""
        if width % self.group:
            raise UnsupportedError(
                f"cache {self.name}: a group of {self.group} does not divide heads of {width}; "
                f"add a group that does, such as kivi-{self.key_bits}-g{_largest_power(width)}"
            )

    def keys(self, K: Heads) -> Heads:
        """Keys as they are read once they are rounded; those that never are, as they are."""
        a, b = self.sink, self.sink + self.rounded_keys(K.shape[-2])
        if a == b:
            return K
        middle = affine(K[..., a:b, :].transpose(-1, -2), self.key_bits, self.group).transpose(-1, -2)
        return torch.cat((K[..., :a, :], middle, K[..., b:, :]), dim=-2)

    def values(self, V: Heads) -> Heads:
        """The same of values."""
        a = self.sink
        return torch.cat((V[..., :a, :], affine(V[..., a:, :], self.value_bits, self.group)), dim=-2)


Cache = Blockwise | Kivi


def parse_cache(text: str) -> Cache:
    """A cache by its name: `q8_0`, `q8_0/q4_0` (keys/values), `kivi-2`, `kivi-k4v2-g64-r64-s4`."""
    if not text.startswith("kivi"):
        keys, _, values = text.partition("/")
        return Blockwise(keys, values or keys)
    found = re.fullmatch(r"kivi-(?:(\d+)|k(\d+)v(\d+))(?:-g(\d+))?(?:-r(\d+))?(?:-s(\d+))?", text)
    if found is None:
        raise UsageError(f"cache {text!r} is not understood; write kivi-2, kivi-k4v2 or kivi-2-g32-r128-s0")
    both, key, value, group, residual, sink = (None if n is None else int(n) for n in found.groups())
    given = {"group": group, "residual": residual, "sink": sink}
    widths = (both, both) if both is not None else (key, value)
    return Kivi(*(int(w or 0) for w in widths), **{k: v for k, v in given.items() if v is not None})


def bits_per_token(cache: Cache, width: int) -> float:
    """Bits that a token takes per head once it is as small as it gets."""
    if isinstance(cache, Blockwise):
        return cache.bits(1, width)
    # Between two fillings of the residual window every token has been rounded.
    far = cache.sink + cache.residual * 4
    return (cache.bits(far + cache.residual, width) - cache.bits(far, width)) / cache.residual


def attend(
    cache: Cache | None,
    Q: Heads,
    K: Heads,
    V: Heads,
    *,
    scale: float,
    mask: Tensor | None = None,
    cap: float | None = None,
) -> Heads:
    """Causal attention of a whole window, each query reading what the cache holds when its token comes.

    It equals decoding token by token: the token's own key and value are stored before it attends, and a
    Kivi cache is rounded after it. With `mask` (True or 0 where a key is seen, else False or a large negative
    number) attention is causal as the mask says. `cap` bends scores: cap * tanh(score / cap). Several heads
    of Q share one of K and V where there are more.
    """
    if isinstance(cache, Kivi):
        return _kivi(cache, Q, K, V, _Scores(scale, mask, cap))
    scores = _Scores(scale, mask, cap)
    if cache is None:
        return _plain(Q, K, V, scores)
    return cache.attend(Q, K, V, lambda q, k, v: _plain(q, k, v, scores))


def affine(x: Float[Tensor, "*batch n"], bits: int, group: int) -> Float[Tensor, "*batch n"]:
    """x on the grid of each group: minimum + scale * code, both float16, codes 0 .. 2^bits - 1."""
    g = x.float().unflatten(-1, (-1, group))
    least, most, top = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True), 2**bits - 1
    least, scale = least.half().float(), ((most - least) / top).half().float()
    codes = ((g - least) / torch.where(scale == 0, 1, scale)).round().clamp(0, top)
    return (least + scale * codes).flatten(-2).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Scores:
    """How queries and keys become weights."""

    scale: float
    mask: Tensor | None
    cap: float | None

    def weights(self, Q: Heads, K: Heads, first: int) -> Float[Tensor, "batch heads queries keys"]:
        """The weights of the queries from `first` on over all keys up to the last of them."""
        a, b = first, first + Q.shape[-2]
        scores = (Q * self.scale) @ K.transpose(-1, -2)
        if self.cap is not None:
            scores = (scores / self.cap).tanh() * self.cap
        if self.mask is None:
            seen = torch.ones(b - a, b, dtype=torch.bool, device=Q.device).tril(a)
            scores = scores.masked_fill(~seen, float("-inf"))
        elif self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask[..., a:b, :b], torch.finfo(scores.dtype).min)
        else:
            scores = scores + self.mask[..., a:b, :b]
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(Q.dtype)


def _plain(Q: Heads, K: Heads, V: Heads, scores: _Scores) -> Heads:
    K, V = _shared(Q, K, V)
    panels = range(0, Q.shape[-2], PANEL)
    parts = ((scores.weights(Q[..., a : a + PANEL, :], K[..., : a + PANEL, :], a), a) for a in panels)
    return torch.cat([P @ V[..., : a + PANEL, :] for P, a in parts], dim=-2)


def _kivi(cache: Kivi, Q: Heads, K: Heads, V: Heads, scores: _Scores) -> Heads:
    """The queries between two fillings of the residual window read the same rounded keys."""
    cache.require(K.shape[-1])
    small_K, K, loss, V = (*_shared(Q, cache.keys(K), K), *_shared(Q, cache.values(V) - V, V))
    out = torch.empty_like(Q)
    for a, b in _panels(cache, Q.shape[-2]):
        settled = cache.sink + cache.rounded_keys(a)
        keys = torch.cat((small_K[..., :settled, :], K[..., settled:b, :]), dim=-2)
        P = scores.weights(Q[..., a:b, :], keys, a)
        old = _settled_values(cache, a, b, Q.device)
        out[..., a:b, :] = P @ V[..., :b, :] + (P * old) @ loss[..., :b, :]
    return out


def _panels(cache: Kivi, tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries that find the same number of keys rounded, none longer than a panel."""
    edges = {0, tokens, *range(cache.sink, tokens, cache.residual), *range(0, tokens, PANEL)}
    ends = sorted(edge for edge in edges if edge <= tokens)
    return itertools.pairwise(ends)


def _settled_values(cache: Kivi, a: int, b: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Which values each of the queries a .. b finds rounded: t tokens are stored before query t."""
    counts = [cache.sink + cache.rounded_values(t) for t in range(a, b)]
    ends, at = torch.tensor(counts, device=device)[:, None], torch.arange(b, device=device)
    return (at >= cache.sink) & (at < ends)


def _shared(Q: Heads, *heads: Heads) -> tuple[Heads, ...]:
    """Heads of keys or values, each repeated for the queries that share it."""
    return tuple(
        x if x.shape[1] == Q.shape[1] else x.repeat_interleave(Q.shape[1] // x.shape[1], dim=1) for x in heads
    )


def _interleaved(x: Heads) -> Heads:
    """Entry i beside entry i + width/2."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _is_rotated(kind: str, width: int) -> bool:
    return BITS[kind] < 16 and width % 64 == 0


def _rotated(x: Heads, n: int) -> Heads:
    """Every n entries of a head times the Hadamard matrix, which is its own inverse."""
    H = hadamard(n).to(x.device, torch.float32)
    return (x.float().unflatten(-1, (-1, n)) @ H).flatten(-2).to(x.dtype)


def _largest_power(width: int) -> int:
    """The largest power of two that divides a width."""
    return width & -width
