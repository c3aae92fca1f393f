"""How far a student's distribution over the vocabulary is from its teacher's, with its slope.

Each divergence comes with the gradient for the student's logits in closed form: a vocabulary is wide, and
what autograd would keep of it would fill the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "t vocab"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence of p (teacher) and q (student), both softmax(logits / `temperature`).

    forward_kl          KL(p || q)                      every token the teacher allows counts
    reverse_kl          KL(q || p)                      the student may leave some of them out
    skew_kl             KL(p || a q + (1 - a) p)        a = 1 - `mix`    (DistiLLM, arXiv:2402.03898)
    skew_reverse_kl     KL(q || a p + (1 - a) q)        a = 1 - `mix`
    js                  b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = `mix`
                        (GKD, arXiv:2306.13649, eq. 1)

    `mix` None stands for 0.1 of the skewed ones and 0.5 of js. Losses are multiplied by the temperature's
    square, which keeps the size of gradients (arXiv:1503.02531, section 2).
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    mix: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.kind!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.mix is not None and not 0 < self.mix < 1:
            raise ValueError(f"mix must lie between 0 and 1, got {self.mix}")

    @property
    def share(self) -> float:
        """`mix`, or what stands for it."""
        return self.mix if self.mix is not None else 0.5 if self.kind == "js" else 0.1


def divergence(student: Rows, teacher: Rows, how: Divergence) -> tuple[Float[Tensor, "t"], Rows]:
    """The divergence at each position in nats, and its gradient for the student's logits; both float32.

    `student` and `teacher` are logits; they are left untouched.
    """
    T = how.temperature
    log_q, log_p = (
        torch.log_softmax(x.float() if T == 1 else x.float() / T, dim=-1) for x in (student, teacher)
    )
    found, slope = DIVERGENCES[how.kind](log_p, log_q, how.share)
    # d/dx of f(q), q = softmax(x / T):  q (f' - <q, f'>) / T.
    return (found, slope) if T == 1 else (found * T**2, slope.mul_(T))


def cross_entropy(student: Rows, targets: Tensor) -> tuple[Float[Tensor, "t"], Rows]:
    """-log q of the true tokens, and the gradient for the logits: q less one at the token itself."""
    log_q = torch.log_softmax(student.float(), dim=-1)
    found = -log_q.gather(1, targets[:, None])[:, 0]
    slope = log_q.exp_()
    slope.scatter_add_(1, targets[:, None], torch.full_like(slope[:, :1], -1.0))
    return found, slope


def _forward_kl(log_p: Rows, log_q: Rows, _: float) -> tuple[Float[Tensor, "t"], Rows]:
    apart, p = log_p - log_q, log_p.exp_()
    return torch.linalg.vecdot(p, apart), log_q.exp_().sub_(p)


def _reverse_kl(log_p: Rows, log_q: Rows, _: float) -> tuple[Float[Tensor, "t"], Rows]:
    q, apart = log_q.exp(), log_q - log_p
    return torch.linalg.vecdot(q, apart), _through_softmax(q, apart)


def _skew_kl(log_p: Rows, log_q: Rows, share: float) -> tuple[Float[Tensor, "t"], Rows]:
    p, q = log_p.exp(), log_q.exp()
    m = p * share + q * (1 - share)
    found = torch.linalg.vecdot(p, log_p - _log(m))
    return found, _through_softmax(q, p.div_(_positive(m)).mul_(share - 1))


def _skew_reverse_kl(log_p: Rows, log_q: Rows, share: float) -> tuple[Float[Tensor, "t"], Rows]:
    p, q = log_p.exp(), log_q.exp()
    m = q * share + p * (1 - share)
    apart = log_q - _log(m)
    return torch.linalg.vecdot(q, apart), _through_softmax(q, apart.sub(q / _positive(m), alpha=share))


def _js(log_p: Rows, log_q: Rows, share: float) -> tuple[Float[Tensor, "t"], Rows]:
    p, q = log_p.exp(), log_q.exp()
    log_m = _log(p * share + q * (1 - share))
    apart = log_q - log_m
    found = torch.linalg.vecdot(p, log_p - log_m) * share + torch.linalg.vecdot(q, apart) * (1 - share)
    return found, _through_softmax(q, apart.mul_(1 - share))


def _through_softmax(q: Rows, slope: Rows) -> Rows:
    """The gradient for logits from that for probabilities: q (slope - <q, slope>)."""
    return slope.sub(torch.linalg.vecdot(q, slope)[:, None]).mul_(q)


def _positive(m: Rows) -> Rows:
    """Probabilities so small that float32 has no number for them count as its smallest one."""
    return m.clamp_min(torch.finfo(torch.float32).tiny)


def _log(m: Rows) -> Rows:
    return _positive(m).log_()


DIVERGENCES: Mapping[str, Callable[[Rows, Rows, float], tuple[Float[Tensor, "t"], Rows]]] = MappingProxyType(
    {
        "forward_kl": _forward_kl,
        "reverse_kl": _reverse_kl,
        "skew_kl": _skew_kl,
        "skew_reverse_kl": _skew_reverse_kl,
        "js": _js,
    }
)
