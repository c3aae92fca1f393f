"""From a student's embeddings to those of a teacher of another width, without bending what is near what."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bridge(student: Float[Tensor, "n a"], teacher: Float[Tensor, "n b"]) -> Float[Tensor, "b a"]:
    """W of orthonormal columns (rows, where the student is the wider) for which W x points where y points.

    It spans the directions in which the teacher's embeddings of these texts have most, so that a student
    can say nearly all there is to say, and turns them until the student's own come as near as they can
    (orthogonal Procrustes, Schönemann, 1966). Of a student no wider than its teacher it keeps all angles, so
    what makes W x like y makes the student's texts as near to each other as the teacher's are.
    Float64 inside, float32 out.
    """
    x, y = (F.normalize(rows.detach().double(), dim=-1) for rows in (student, teacher))
    least = min(x.shape[1], y.shape[1])
    _, directions = torch.linalg.eigh(y.T @ y)
    most = directions[:, -least:]
    u, _, vh = torch.linalg.svd(x.T @ (y @ most), full_matrices=False)
    return (most @ (u @ vh).T).float()
