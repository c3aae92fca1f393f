"""Linear algebra that quantization and pruning share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import NumericalError

ESCALATIONS = 5
# A Gram matrix this wide is summed in panels; below that one product is quicker.
WIDE, PANELS = 256, 6
# Up to here a positive definite matrix is inverted at once; wider ones by halves, whose products are quicker.
HALVED = 256
ONEDNN: Any = torch.backends.mkldnn


@contextmanager
def narrow_products(dtype: torch.dtype) -> Iterator[None]:
    """Within the block factors of float32 products are rounded to `dtype` where matrix units multiply that.

    Those of Intel's processors (AMX) multiply bfloat16 and add up in float32: 270 GFLOP/s of one core where
    float32 has 100. What comes out is float32, and of factors that are bfloat16 already as exact as ever.
    Elsewhere, and for float32, nothing changes.
    """
    units = dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    with multiplied_in("bf16" if units and ONEDNN.is_available() else asked()):
        yield


def asked() -> str:
    """What oneDNN is asked to multiply float32 matrices in."""
    return str(ONEDNN.matmul.fp32_precision)


@contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """Within the block oneDNN is asked for this, which gives it products that torch would not."""
    before, parent = asked(), ONEDNN.fp32_precision
    ONEDNN.matmul.fp32_precision = precision
    try:
        yield
    finally:
        # What was asked for may have been inherited, and stays so.
        ONEDNN.matmul.fp32_precision = "none" if before == parent else before


def is_finite(T: Float[Tensor, "..."]) -> bool:
    """Whether all values are finite; nothing as large as the tensor is made for it.

    `isfinite` makes three such: an embedding would take twice its bytes more just to be looked at.
    """
    return not T.numel() or all(math.isfinite(end) for end in T.aminmax())


def _panels(n: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows; of a symmetric product only what lies from each range's diagonal on is computed."""
    count = PANELS if n >= WIDE else 1
    return itertools.pairwise(n * i // count for i in range(count + 1))


@dataclass(slots=True)
class Gram:
    """Running X^T X of a layer's inputs, multiplied and summed in float32. Sums across ranks by addition.

    Rounded to bfloat16, even once for each batch, products of inputs that go together are no longer those of
    any inputs: of 28 matrices of SmolLM2 and 16 windows, 5 could not be factorised with a damping of 0.01.
    Inputs that are bfloat16 already are multiplied as such by GPUs and matrix units, which add up in float32.
    Below its diagonal panels `total` is not filled; `mean` mirrors it.
    """

    total: Float[Tensor, "in in"]
    tokens: int = 0

    @classmethod
    def zeros(cls, columns: int, device: torch.device | None = None) -> Gram:
        """An empty sum for a layer with `columns` inputs."""
        return cls(torch.zeros(columns, columns, dtype=torch.float32, device=device))

    def update(self, X: Float[Tensor, "*batch in"], mask: Bool[Tensor, "*batch"] | None = None) -> None:
        """Add the rows of X; rows where `mask` is False (padding) do not count."""
        rows = X.detach().flatten(0, -2)
        if mask is not None and not bool(mask.all()):
            rows = rows[mask.flatten()]
        product = _wide if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16) else _plain
        own, rows = rows.dtype, rows if product is _wide else rows.to(torch.float32)
        with narrow_products(own):
            for a, b in _panels(rows.shape[1]):
                self.total[a:b, a:] += product(rows[:, a:b], rows[:, a:])
        self.tokens += rows.shape[0]

    def add(self, other: Gram) -> None:
        """Count in what another sum has counted."""
        self.total += other.total
        self.tokens += other.tokens

    def without(self, other: Gram) -> Gram:
        """What is left of this sum without a part of it."""
        return Gram(self.total - other.total, self.tokens - other.tokens)

    def mean(self) -> Float[Tensor, "in in"]:
        """E[x x^T]."""
        if not self.tokens:
            raise NumericalError("no calibration token reached this layer; give more calibration text")
        mean = self.total / self.tokens
        for a, b in _panels(mean.shape[0]):
            mean[b:, a:b] = mean[a:b, b:].T
        return mean


def _plain(X: Float[Tensor, "t a"], Y: Float[Tensor, "t b"]) -> Float[Tensor, "a b"]:
    """X^T Y."""
    return X.T @ Y


def _wide(X: Float[Tensor, "t a"], Y: Float[Tensor, "t b"]) -> Float[Tensor, "a b"]:
    """X^T Y of 16-bit numbers in float32, which a GPU gives without turning them into it first."""
    return torch.mm(X.T, Y, out_dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Gram matrix as M diag(d) M^T, M unit upper triangular, and how much damping it took."""

    M: Float[Tensor, "in in"]
    d: Float[Tensor, "in"]
    damp: float
    escalations: int


def feedback_factor(H: Float[Tensor, "in in"], damp: float) -> Factor:
    """H + damp * mean(diag H) * I = M diag(d) M^T.

    A row of errors e then costs sum_k d_k (e_k + sum_{j<k} e_j M_jk)^2: what is lost at column k,
    once the columns before it are settled. Rounding w_k + sum_{j<k} e_j M_jk is GPTQ's update
    without the inverse of H (LDLQ: arXiv:2307.13304, theorem 6); with U the paper's Cholesky factor
    of the inverse, d_k = 1 / U_kk^2. It comes from one Cholesky factorisation, J H J = L L^T with J
    the reversal of order: J L J = M diag(d)^(1/2).

    Where the factorisation fails the damping is tripled, at most five times; the count is part
    of the answer, so that nobody is left with a matrix that was quietly regularised away.
    """
    n, mean = len(H), H.diagonal().mean()
    damped = H.to(torch.float32).flip(0, 1)
    del H  # wide matrices are let go of as soon as they are used up
    plain = damped.diagonal().clone()
    used = damp
    for escalation in range(ESCALATIONS + 1):
        used = damp * 3.0**escalation
        damped.diagonal().copy_(plain + used * mean)
        L, info = torch.linalg.cholesky_ex(damped)
        root = L.diagonal().flip(0)
        if int(info) == 0 and bool(torch.isfinite(root).all()):
            del damped
            return Factor(L.flip(0, 1).div_(root), root**2, used, escalation)
    raise NumericalError(
        f"Gram matrix of {n} inputs is not positive definite even with damping {used:g}; "
        "use more calibration tokens or a larger damp"
    )


def inverse(A: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The inverse of a symmetric positive definite matrix.

    By halves: those of the first one and of its Schur complement give the whole by products, of which
    libraries get twice as much out of a processor as of a factorisation.
    """
    if (n := len(A)) <= HALVED:
        return torch.cholesky_inverse(torch.linalg.cholesky(A))
    h = n // 2
    P = inverse(A[:h, :h])
    B = P @ A[:h, h:]
    S = inverse(A[h:, h:] - A[:h, h:].T @ B)
    whole = torch.empty_like(A)
    BS = torch.matmul(B, S, out=whole[:h, h:])
    whole[:h, :h] = torch.addmm(P, BS, B.T)
    BS.neg_()
    whole[h:, :h] = BS.T
    whole[h:, h:] = S
    return whole


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """An orthonormal Hadamard matrix; of a power of two Sylvester's, which is its own inverse.

    Other orders are a power of two times one of Paley's: q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a
    prime q = 1 mod 4. An order without either is a ValueError.
    """
    twos = n & -n if n > 0 else 0
    if n == twos and n:
        H = torch.ones(1, 1)
    else:
        odd = n // twos if twos else 0
        found = (_paley(odd * 2**k) for k in range(2, twos.bit_length()))
        H = next((H for H in found if H is not None), torch.ones(0, 0))
    if not len(H):
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / n**0.5


def _paley(order: int) -> Float[Tensor, "n n"] | None:
    """Paley's matrix of this order, of 1 and -1; None where neither construction has a prime."""
    if _is_prime(q := order - 1) and q % 4 == 3:
        return torch.eye(order) + _conference(q, -1)
    if _is_prime(q := order // 2 - 1) and q % 4 == 1:
        S, one = _conference(q, 1), torch.eye(q + 1)
        return torch.kron(S, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(
            one, torch.tensor([[1.0, -1], [-1, -1]])
        )
    return None


def _conference(q: int, sign: int) -> Float[Tensor, "n n"]:
    """Jacobsthal's matrix of a prime, bordered; symmetric for sign 1, skew for -1."""
    squares = {i * i % q for i in range(1, q)}
    rows = [[0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)] for i in range(q)]
    S = torch.zeros(q + 1, q + 1)
    S[1:, 1:] = torch.tensor(rows, dtype=torch.float32)
    S[0, 1:], S[1:, 0] = 1, sign
    return S


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
