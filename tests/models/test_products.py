"""Products of float32 matrices are quick and exact, and torch is left as it was found."""

from __future__ import annotations

import math

import pytest
import torch

from pocketsize.linalg import narrow_products
from pocketsize.models import products
from pocketsize.models.products import is_quicker, quick_products, stock_products

MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def _fresh():
    is_quicker.cache_clear()
    yield
    is_quicker.cache_clear()


def _as_if(monkeypatch: pytest.MonkeyPatch, name: str, **flags: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name} | flags)


def _error() -> float:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, m, generator=generator) for n, m in ((300, 700), (700, 200)))
    true = a.double() @ b.double()
    return float((a @ b - true).abs().max() / true.abs().max())


def test_products_are_exact_whichever_library_makes_them():
    with quick_products():
        assert _error() < products.EXACT


def test_torch_is_left_as_it_was():
    before = MATMUL.fp32_precision
    with quick_products(), stock_products():
        assert MATMUL.fp32_precision == "none"
    assert MATMUL.fp32_precision == before
    with pytest.raises(ZeroDivisionError), quick_products():
        _ = 1 / 0
    assert MATMUL.fp32_precision == before


@pytest.mark.parametrize(
    ("name", "flags"), [("Intel Xeon", {"avx512_f": True}), ("AMD EPYC", {"avx2": True}), ("Apple M3", {})]
)
def test_other_processors_multiply_as_torch_does(monkeypatch, name, flags):
    _as_if(monkeypatch, name, **flags)
    assert not is_quicker()
    before = MATMUL.fp32_precision
    with quick_products():
        assert MATMUL.fp32_precision == before


def test_a_processor_that_rounds_inside_a_product_is_left_alone(monkeypatch):
    _as_if(monkeypatch, "AMD EPYC", avx512_f=True)
    monkeypatch.setattr(products, "EXACT", 1e-12)  # as if errors were those of bfloat16
    assert not is_quicker()
    monkeypatch.setattr(products, "EXACT", math.inf)
    is_quicker.cache_clear()
    assert is_quicker() == torch.backends.mkldnn.is_available()


def test_what_was_inherited_is_inherited_afterwards():
    before = torch.backends.mkldnn.fp32_precision
    torch.backends.fp32_precision = "ieee"
    try:
        with quick_products():
            pass
    finally:
        torch.backends.fp32_precision = "none"
    assert torch.backends.mkldnn.fp32_precision == before and MATMUL.fp32_precision == "none"


@pytest.mark.parametrize(
    ("amx", "dtype", "narrow"),
    [(True, torch.bfloat16, True), (True, torch.float32, False), (False, torch.bfloat16, False)],
)
def test_factors_are_rounded_by_matrix_units_alone(monkeypatch, amx, dtype, narrow):
    _as_if(monkeypatch, "Intel Xeon", amx_bf16=amx)
    before = MATMUL.fp32_precision
    with narrow_products(dtype):
        assert (MATMUL.fp32_precision == "bf16") == (narrow and torch.backends.mkldnn.is_available())
    assert MATMUL.fp32_precision == before


def test_rounded_factors_give_float32_that_is_as_near_as_bfloat16_allows():
    with narrow_products(torch.bfloat16):
        assert _error() < 2**-8
