"""Token scores from raw logits with Python floats: one position, one token at a time."""

import math


def scores_slow(p_logits: list[list[float]], q_logits: list[list[float]], targets: list[int]):
    """KL(p || q), both negative log-likelihoods and top-1 agreement of each position."""
    rows = []
    for p, q, target in zip(p_logits, q_logits, targets, strict=True):
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        kl = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        rows.append((kl, -log_p[target], -log_q[target], p.index(max(p)) == q.index(max(q))))
    return rows


def _log_softmax(row: list[float]) -> list[float]:
    peak = max(row)
    total = peak + math.log(sum(math.exp(v - peak) for v in row))
    return [v - total for v in row]
