"""What a teacher makes of each token by itself, in as few numbers as a student's embedding has."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray


def principal(
    vectors: Float64[ndarray, "tokens wide"], width: int
) -> tuple[Float64[ndarray, "tokens width"], Float64[ndarray, "wide width"]]:
    """Coordinates of vectors along the directions in which they differ most, at most `width`; and those.

    Coordinates are centred, and scaled together so that their mean square is 1. What the mean of a text's
    tokens tells of it is kept best so (Model2Vec, github.com/MinishLab/model2vec). Vectors that are all the
    same differ along none: a ValueError.
    """
    centred = vectors - vectors.mean(0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    count = min(width, vectors.shape[1], int((values > values[-1] * 1e-10).sum()))
    if not values[-1] > 0:
        raise ValueError("the vectors of all tokens are the same")
    most = np.ascontiguousarray(directions[:, ::-1][:, :count])
    found = centred @ most
    return found / np.sqrt((found**2).mean()), most
