"""A matrix and inputs that go together, as in models: correlated, some of them much stronger."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(rows: int = 24, columns: int = 64, *, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W and H = E[x x^T]."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    strength = torch.exp(torch.randn(columns, generator=generator))
    X = torch.randn(tokens, columns, generator=generator) @ mix * strength
    return W, X.T @ X / tokens
