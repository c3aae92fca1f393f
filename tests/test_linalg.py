"""Sums that a whole calibration goes into keep their digits."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile

from pocketsize.linalg import Gram, feedback_factor, inverse, is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_is_kept_in_float32_whatever_the_inputs_are(dtype: torch.dtype) -> None:
    gram, row = Gram.zeros(4), torch.ones(1, 4, dtype=dtype)
    for _ in range(3000):  # bfloat16 would stand still at 256, float16 at 2048
        gram.update(row)
    assert gram.total.dtype == torch.float32 and float(gram.total[0, 3]) == 3000.0
    large = Gram.zeros(4)
    for _ in range(40):
        large.update(torch.full((1, 4), 60.0, dtype=dtype))  # 144,000 is beyond float16
    assert float(large.total[0, 0]) == 144_000.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_inputs_that_go_together_are_not_rounded(dtype: torch.dtype, device: str) -> None:
    """Rounded to 16 bits they are no Gram matrix any more: no damping asked for would do."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 4, generator=generator) @ torch.randn(4, 300, generator=generator)
    X = X.to(device, dtype)
    gram = Gram.zeros(300, X.device)
    gram.update(X)
    wanted = (X.double().T @ X.double() / 64).cpu()
    torch.testing.assert_close(gram.mean().double().cpu(), wanted, rtol=1e-5, atol=1e-4)
    assert feedback_factor(gram.mean(), 1e-3).escalations == 0
    rounded = (X.T @ X).float() / 64
    assert feedback_factor(rounded, 1e-3).escalations > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    assert is_finite(torch.empty(0, dtype=dtype)) and is_finite(torch.tensor(3.0, dtype=dtype))
    T = torch.full((40, 50), torch.finfo(dtype).max, dtype=dtype)  # whose sum is infinite
    assert is_finite(T) and is_finite(-T.T)
    for value in (float("nan"), float("inf"), -float("inf")):
        for at in ((0, 0), (17, 31), (39, 49)):
            spoilt = T.clone()
            spoilt[at] = value
            assert not is_finite(spoilt)


def test_looking_for_them_copies_nothing() -> None:
    T = torch.ones(1000, 1000, dtype=torch.bfloat16)
    with profile(profile_memory=True) as seen:
        assert is_finite(T)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in seen.key_averages()) < 1000


@pytest.mark.parametrize("n", [1, 7, 256, 257, 600])
def test_an_inverse_by_halves_is_the_inverse(n: int) -> None:
    X = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(0))
    X[:, 0] *= 30
    A = X.T @ X / len(X) + 0.1 * torch.eye(n)
    before = A.clone()
    exact = torch.linalg.inv(A.double())
    found = inverse(A)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
    assert torch.equal(A, before)
    assert torch.allclose(found, found.T, atol=1e-6)
    with pytest.raises(torch.linalg.LinAlgError):
        inverse(-A)
