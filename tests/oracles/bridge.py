"""What `bridge` says: one direction after the other, then Newton's iteration to the polar factor."""

from __future__ import annotations

import numpy as np


def bridge_slow(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """The directions of most by power iteration; the turn is the orthogonal factor of x^T y among them."""
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (student, teacher))
    rest, found = y.copy(), []
    for _ in range(x.shape[1]):
        direction = rest[np.argmax((rest**2).sum(1))].copy()
        for _ in range(5000):
            direction = rest.T @ (rest @ direction)
            direction /= np.linalg.norm(direction)
        found.append(direction)
        rest = rest - np.outer(rest @ direction, direction)
    most = np.stack(found, axis=1)
    turn = x.T @ (y @ most)
    for _ in range(200):
        turn = (turn + np.linalg.inv(turn).T) / 2
    return most @ turn.T
