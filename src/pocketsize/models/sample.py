"""Some of the tokens that linears read, for what a Gram matrix does not tell: how each token is rounded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of the tokens that linears read, and the largest magnitude of each input over all of them.

    `held` are of windows that are held out, `rows` and `peak` of the others.
    """

    rows: Float[Tensor, "t in"]
    held: Float[Tensor, "h in"]
    peak: Float[Tensor, "in"]


@dataclass(slots=True)
class Sampler:
    """Takes evenly spaced tokens out of each batch, at most so many, held out and not."""

    each: int
    taken: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    peak: Tensor | None = None

    def take(self, X: Float[Tensor, "*batch in"], taught: Tensor, held: Bool[Tensor, "*batch"]) -> None:
        """Take from a batch, of whose positions `taught` and `held` are real."""
        for rows, mask in zip(self.taken, (taught, held), strict=True):
            at = mask.flatten().nonzero()[:, 0]
            pick = torch.linspace(0, len(at) - 1, min(len(at), self.each), device=at.device).round().long()
            rows.append(X.flatten(0, -2)[at[pick]].to(torch.float32))
        own = X[taught].abs().to(torch.float32)
        if len(own):
            most = own.amax(0)
            self.peak = most if self.peak is None else torch.maximum(self.peak, most)

    def sample(self) -> Sample | None:
        """What was taken; None where no token was, or none was held out."""
        rows, held = (torch.cat(part) for part in self.taken)
        if self.peak is None or not len(held):
            return None
        return Sample(rows, held, self.peak)
