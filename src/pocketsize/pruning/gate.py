"""Gates: what a token may leave out as the model runs, how that is decided, and the work it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import UsageError, did_you_mean

KINDS = ("inputs", "channels", "layers", "exit")
CONFIDENCES = ("probability", "entropy", "saturation", "probe")
# Tokens are told apart up to a factor of e^FACTOR either way; what costs nearly nothing counts as FLOOR.
FACTOR, FLOOR = 1.5, 0.05
# How many levels are tried where one is looked for among all values.
TRIES = 1000
_NONE: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Gates:
    """Which gates a model has, and the numbers by which they decide for each token.

    `values` has a tensor for each gate, by the path of what it stands at:

    - `inputs`: one threshold for each input of linears that read one tensor, under the first of them;
      an input takes part if |x_i| f > t_i. `maps` may have a line `PATH:line`, whose exponential is f there
      and at the gates behind, up to the next line: how much this token has to lose; f is 1 without;
    - `channels`: one threshold for each inner channel of a block, under its MLP; a channel takes part if
      |act(gate_i)| > t_i;
    - `layers`: slopes and offset of a line, under a block's attention or MLP, which is left out if
      the line is below 0 at what it reads;
    - `exit`: under a block, the least `confidence` at which a token leaves behind it. `maps` may have
      what then stands for the blocks that are left out: `PATH:in`, `PATH:out` and `PATH:bias`, and for the
      confidence `probe` the line `PATH:probe`.
    """

    kind: str
    values: Mapping[str, Float[Tensor, "*n"]]
    confidence: str | None = None
    maps: Mapping[str, Float[Tensor, "*n"]] = field(default_factory=lambda: _NONE)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"gates: unknown kind {self.kind!r}{did_you_mean(self.kind, KINDS)}")
        if not self.values:
            raise UsageError(f"gates of kind {self.kind}: there is none; calibrate them with the step gate")
        known = CONFIDENCES if self.kind == "exit" else (None,)
        if self.confidence not in known:
            said = f"one of {', '.join(CONFIDENCES)}" if self.kind == "exit" else "for the kind exit alone"
            raise UsageError(f"gates of kind {self.kind}: confidence is {said}; got {self.confidence!r}")
        for name, value in (*self.values.items(), *self.maps.items()):
            if bool(value.isnan().any()):
                raise UsageError(f"gates: {name}: holds NaN")


@dataclass(slots=True)
class Tally:
    """Operations (two for each multiplication with its addition) of the tokens that went through.

    `blocks` and `head` are what a model without gates does; what gates saved of either, less what they
    cost themselves, is beside them.
    """

    tokens: int = 0
    blocks: float = 0.0
    head: float = 0.0
    saved_blocks: float = 0.0
    saved_head: float = 0.0

    @property
    def share(self) -> float:
        """What is saved of everything."""
        return (self.saved_blocks + self.saved_head) / max(self.blocks + self.head, 1.0)

    @property
    def share_of_blocks(self) -> float:
        """What is saved of the blocks, the head not counted."""
        return self.saved_blocks / max(self.blocks, 1.0)


def quantile_threshold(scores: Float[Tensor, "*n"], share: float) -> float:
    """The score that this share of all scores does not exceed (CATS, arXiv:2404.08763, section 3.2)."""
    ranked = scores.flatten().sort().values
    count = round(share * len(ranked))
    return float(ranked[count - 1]) if count else float("-inf")


def budget_level(scores: Sequence[Float[Tensor, "*n"]], prices: Sequence[float], budget: float) -> float:
    """The one level that saves a budget where everything below it, anywhere, is left out.

        least l  with   sum_s price_s * share(scores_s <= l) >= budget

    With scores that say what it costs to leave out a unit of work, this is the allocation of least
    cost: at the end one more unit costs as much everywhere. Infinity where no level saves as much.
    """
    values = torch.cat([s.flatten() for s in scores])
    pairs = zip(scores, prices, strict=True)
    worth = torch.cat([torch.full((s.numel(),), price / s.numel()).double() for s, price in pairs])
    ranked, order = values.sort()
    saved = worth[order].cumsum(0)
    place = int(torch.searchsorted(saved, budget * (1 - 1e-9)))
    return float(ranked[place]) if place < len(ranked) else float("inf")


def sensitivity(x: Float[Tensor, "t n"], slopes: Float[Tensor, "t n"]) -> Float[Tensor, "n"]:
    """How much KL rises for each squared unit that is missing of input i, to second order: E[g_i^2] / 2.

    `slopes` are gradients of the negative log-likelihood of tokens that the model drew itself; their mean
    square is the Fisher information. `x` only says where an input is always zero, which costs nothing.
    """
    return 0.5 * slopes.double().square().mean(0).float() * (x != 0).any(0)


def thresholds(weights: Float[Tensor, "n"], level: float, work: float) -> Float[Tensor, "n"]:
    """The magnitudes up to which an operation saved costs at most `level`:  w_i a_i^2 / work <= level."""
    free = weights <= 0
    safe = torch.where(free, torch.ones_like(weights), weights)
    return torch.where(free, torch.inf, (level * work / safe).sqrt()).to(torch.float32)


def confidence_of(kind: str, logits: Float[Tensor, "*t vocab"]) -> Float[Tensor, "*t"]:
    """How sure a distribution is, from 0 to 1: its largest probability, or 1 - entropy / log(size)."""
    log_p = logits.float().log_softmax(-1)
    if kind == "probability":
        return log_p.amax(-1).exp()
    if kind == "entropy":
        entropy = -(log_p.exp() * log_p).sum(-1)
        return 1 - entropy / torch.log(torch.tensor(float(logits.shape[-1])))
    raise UsageError(f"confidence {kind!r} is not read off logits; it is probability or entropy")


def line(values: Float[Tensor, "n+1"], x: Float[Tensor, "*t n"]) -> Float[Tensor, "*t"]:
    """The line with these slopes, the offset last, at each x."""
    return x @ values[:-1].to(x.dtype) + values[-1].to(x.dtype)


def token_factor(values: Float[Tensor, "n+1"], x: Float[Tensor, "*t n"]) -> Float[Tensor, "*t 1"]:
    """How much more a token has to lose than others do, as a factor of magnitudes, within bounds."""
    return line(values, x).clamp(-FACTOR, FACTOR).exp()[..., None]


def fit_factor(
    x: Float[Tensor, "t n"], relative: Float[Tensor, "t"], ridge: float = 1.0
) -> Float[Tensor, "n+1"]:
    """The line of `token_factor` for tokens that cost so much relative to the mean, fitted to the logarithm.

    Its square is scaled to be 1 in the mean, as what it stands for is.
    """
    values = 0.5 * fit_line(x, (relative + FLOOR * relative.mean()).log(), ridge)
    values[-1] -= 0.5 * token_factor(values, x).square().mean().log()
    return values


def fit_line(x: Float[Tensor, "t n"], y: Float[Tensor, "t"], ridge: float = 1e-2) -> Float[Tensor, "n+1"]:
    """The line from x to y by ridge regression; `ridge` is a fraction of the mean variance of an input."""
    x, y = x.double(), y.double()
    mx, my = x.mean(0), y.mean()
    A = (x - mx).T @ (x - mx) / len(x)
    A.diagonal().add_(ridge * A.diagonal().mean() + 1e-12)
    slopes = torch.linalg.solve(A, (x - mx).T @ (y - my) / len(x))
    return torch.cat([slopes, (my - mx @ slopes)[None]]).float()


def fit_map(
    X: Float[Tensor, "t n"], Y: Float[Tensor, "t n"], rank: int, ridge: float = 1e-2
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r n"], Float[Tensor, "n"]]:
    """A, B, b of  Y ~ X + (X A) B + b  with `rank` columns: ridge regression cut to the rank that fits best.

    A lens for hidden states (arXiv:2303.08112) in closed form. Reduced-rank regression: what the
    full map predicts is projected on its leading principal directions.
    """
    X, D = X.double(), (Y - X).double()
    mx, md = X.mean(0), D.mean(0)
    A = (X - mx).T @ (X - mx) / len(X)
    A.diagonal().add_(ridge * A.diagonal().mean() + 1e-12)
    W = torch.linalg.solve(A, (X - mx).T @ (D - md) / len(X))
    V = torch.linalg.eigh(W.T @ A @ W).eigenvectors[:, -rank:]
    left, right = W @ V, V.T
    return left.float(), right.float(), (md - mx @ left @ right).float()


def mapped(
    h: Float[Tensor, "*t n"], A: Float[Tensor, "n r"], B: Float[Tensor, "r n"], b: Float[Tensor, "n"]
) -> Float[Tensor, "*t n"]:
    """What `fit_map` says of h."""
    return h + (h @ A) @ B + b


def exits_at(confidence: Float[Tensor, "e t"], level: float) -> Bool[Tensor, "e t"]:
    """For each exit the tokens that leave there: the first at which they are sure enough."""
    sure = confidence >= level
    return sure & (sure.cumsum(0) == 1)


def agreed_level(confidence: Float[Tensor, "e t"], agrees: Bool[Tensor, "e t"], wished: float) -> float:
    """The lowest level at which, and above which, the share of tokens that stay right is at least `wished`.

    A token is right if it never leaves, or `agrees` where it does. Infinity where no level is low
    enough to let any token leave.
    """
    best = float("inf")
    for level in _levels(confidence):
        wrong = exits_at(confidence, level) & ~agrees
        if 1 - float(wrong.sum()) / confidence.shape[1] < wished:
            break
        best = level
    return best


def saving_level(
    confidence: Float[Tensor, "e t"],
    saves: Float[Tensor, "e"],
    asks: Float[Tensor, "e"],
    reads: float,
    wished: float,
) -> float:
    """The highest level at which a token saves this much work, mean over tokens; infinity where none does.

    `saves` is what each exit saves, `asks` what it costs every token that comes there, `reads` what it
    costs beside that to one that stays (reading logits, which one that leaves needs anyway).
    """
    for level in _levels(confidence):
        leaves = exits_at(confidence, level)
        comes = leaves.cumsum(0) - leaves.long() == 0
        net = leaves * saves[:, None] - comes * asks[:, None] - (comes & ~leaves) * reads
        if float(net.sum(0).mean()) >= wished:
            return level
    return float("inf")


def _levels(confidence: Float[Tensor, "e t"]) -> list[float]:
    """Levels worth trying, falling: values that occur, at most `TRIES` of them."""
    values = confidence.flatten().unique().flip(0)
    count = min(len(values), TRIES)
    return values[torch.linspace(0, len(values) - 1, count).round().long()].tolist()
