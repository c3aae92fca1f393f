"""What `principal` says, one direction after the other by power iteration."""

from __future__ import annotations

import numpy as np


def principal_slow(vectors: np.ndarray, width: int) -> np.ndarray:
    """Take the direction of the largest spread, project it out, and so on; then scale to mean square 1."""
    rest = vectors - vectors.mean(0)
    found = []
    for _ in range(width):
        direction = rest[np.argmax((rest**2).sum(1))].copy()
        for _ in range(5000):
            direction = rest.T @ (rest @ direction)
            direction /= np.linalg.norm(direction)
        found.append(rest @ direction)
        rest = rest - np.outer(rest @ direction, direction)
    table = np.stack(found, axis=1)
    return table / np.sqrt((table**2).mean())
