"""What a student's blocks give beside what its teacher's give: hidden states and attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

States = Float[Tensor, "batch seq width"]
Heads = Float[Tensor, "batch heads seq d"]
Mask = Bool[Tensor, "batch seq"]


def layer_map(student: int, teacher: int) -> tuple[int, ...]:
    """For each block of a student the number of the teacher's block that it should give the same as.

    Evenly spaced, the last always the last: block m (from 1) of M stands for round(m N / M) of N
    (TinyBERT, arXiv:1909.10351, section 3.1).
    """
    if not 0 < student <= teacher:
        raise ValueError(f"a student of {student} blocks cannot follow a teacher of {teacher}")
    return tuple(round((m + 1) * teacher / student) - 1 for m in range(student))


def even_blocks(kept: int, of: int) -> tuple[int, ...]:
    """The numbers of `kept` blocks, evenly spaced, the first and the last always among them.

    DistilBERT (arXiv:1910.01108, section 3) starts from every other block of its teacher.
    """
    if not 0 < kept <= of:
        raise ValueError(f"{kept} of {of} blocks cannot be kept")
    if kept == 1:
        return (0,)
    return tuple(round(i * (of - 1) / (kept - 1)) for i in range(kept))


def hidden_distance(student: States, teacher: States, mask: Mask) -> Float[Tensor, ""]:
    """Mean squared difference of hidden states over real tokens, over the teacher's mean square.

    The teacher's scale differs from block to block and from model to model; the quotient does not.
    """
    kept = mask[..., None]
    apart = ((student - teacher) ** 2 * kept).sum()
    return apart / (teacher**2 * kept).sum().clamp_min(_EPS)


def cosine_distance(student: States, teacher: States, mask: Mask) -> Float[Tensor, ""]:
    """1 - cosine of hidden states, mean over real tokens (DistilBERT, arXiv:1910.01108, section 2)."""
    apart = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (apart * mask).sum() / mask.sum().clamp_min(1)


def relation_distance(
    student: tuple[Heads, Heads], teacher: tuple[Heads, Heads], mask: Mask
) -> Float[Tensor, ""]:
    """KL of the teacher's relation of tokens from the student's, mean over real rows and heads.

        softmax(A B^T / sqrt(d)) of each, for queries and keys the attention itself
        (MiniLM v1 and v2, arXiv:2002.10957 section 3, arXiv:2012.15828 section 3.1)

    A and B of the two models may have other widths, not other numbers of heads: cut both into as many
    (`as_heads`). Columns of padding are left out, as attention does.
    """
    (a, b), (c, d) = student, teacher
    if a.shape[1] != c.shape[1]:
        raise ValueError(f"relations of {a.shape[1]} heads cannot follow relations of {c.shape[1]}")
    log_q, log_p = (_relation(left, right, mask) for left, right in ((a, b), (c, d)))
    apart = (log_p.exp() * (log_p - log_q)).masked_fill(~mask[:, None, None, :], 0.0).sum(-1)
    rows = mask[:, None, :]
    return (apart * rows).sum() / (rows.sum() * a.shape[1]).clamp_min(1)


def as_heads(states: States, heads: int) -> Heads:
    """Queries, keys or values as so many heads, whatever number the model itself has."""
    batch, length, width = states.shape
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    return states.view(batch, length, heads, width // heads).transpose(1, 2)


def pair_distance(student: Float[Tensor, "n a"], teacher: Float[Tensor, "n b"]) -> Float[Tensor, ""]:
    """Mean squared difference of the cosine similarities of all pairs of a batch.

    The widths may differ: what is compared is which texts are near each other (RKD, arXiv:1904.05068).
    """
    x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    n = len(x)
    if n < 2:
        return student.sum() * 0.0
    return ((x @ x.T - y @ y.T) ** 2).sum() / (n * (n - 1))


def _relation(left: Heads, right: Heads, mask: Mask) -> Float[Tensor, "batch heads seq seq"]:
    scores = left @ right.transpose(-1, -2) / left.shape[-1] ** 0.5
    return torch.log_softmax(scores.masked_fill(~mask[:, None, None, :], _FAR), dim=-1)


_EPS, _FAR = 1e-12, -1e9
