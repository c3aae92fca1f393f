"""How the learning rate goes over a training."""

from __future__ import annotations

import math


def rate(done: float, *, warmup: float, floor: float) -> float:
    """The share of the peak rate after the share `done` of a training, both from 0 to 1.

    Linear up to 1 over the first `warmup`, then half a cosine down to `floor`.
    """
    if done < warmup:
        return done / warmup
    rest = min(1.0, (done - warmup) / max(1e-12, 1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest))
