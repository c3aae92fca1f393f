from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pocketsize.data.written import continued
from pocketsize.models import attention
from pocketsize.models.attention import CausalPanels, GroupedRows, LearningPanels, causal
from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise
from tiny import write_tiny


def heads(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 16, generator=g).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("length", [129, 256, 300])
def test_panels_are_causal_attention(length: int) -> None:
    Q, K, V = heads(length, torch.float32)
    expected = F.scaled_dot_product_attention(Q, K, V, is_causal=True)
    assert torch.allclose(causal(Q, K, V), expected, atol=1e-5)
    scaled = F.scaled_dot_product_attention(Q, K, V, is_causal=True, scale=0.1)
    assert torch.allclose(causal(Q, K, V, scale=0.1), scaled, atol=1e-5)


def test_only_plain_causal_bfloat16_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(
        "pocketsize.models.attention.causal",
        lambda Q, K, V, scale: taken.append(Q.shape[-2]) or causal(Q, K, V, scale=scale),
    )
    with CausalPanels():
        F.scaled_dot_product_attention(*heads(256, torch.float32), is_causal=True)
        F.scaled_dot_product_attention(*heads(64, torch.bfloat16), is_causal=True)
        F.scaled_dot_product_attention(*heads(256, torch.bfloat16))
        mine = F.scaled_dot_product_attention(*heads(200, torch.bfloat16), is_causal=True)
        Q, K, V = heads(200, torch.bfloat16)
        F.scaled_dot_product_attention(Q, K[:, :1], V[:, :1], is_causal=True, enable_gqa=True)
    assert taken == [200, 200]
    exact = F.scaled_dot_product_attention(*heads(200, torch.float32), is_causal=True)
    assert float((mine.float() - exact).abs().mean()) < 0.01


def test_grouped_queries_share_keys() -> None:
    Q, K, V = heads(200, torch.bfloat16)
    Q = torch.cat((Q, Q.flip(0)), dim=1)
    expected = F.scaled_dot_product_attention(
        *(x.float() for x in (Q, K, V)), is_causal=True, enable_gqa=True
    )
    with CausalPanels():
        mine = F.scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=True)
    assert float((mine.float() - expected).abs().max()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "keys"), [(9, 3), (8, 1), (4, 4)])
def test_one_token_by_rows_is_what_torch_makes_of_it(dtype, heads, keys):
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(5, heads, 1, 16, generator=generator).to(dtype)
    K, V = (torch.randn(5, keys, 37, 16, generator=generator).to(dtype) for _ in "KV")
    true = F.scaled_dot_product_attention(Q, K, V, enable_gqa=True, scale=0.3)
    with GroupedRows():
        found = F.scaled_dot_product_attention(Q, K, V, enable_gqa=True, scale=0.3)
    assert found.shape == true.shape
    torch.testing.assert_close(found, true)


def test_what_has_a_mask_or_several_tokens_is_left_to_torch():
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(2, 4, 3, 8, generator=generator)
    K, V = (torch.randn(2, 2, 3, 8, generator=generator) for _ in "KV")
    mask = torch.tensor([[True, False, True]])
    calls = (
        lambda: F.scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=True),
        lambda: F.scaled_dot_product_attention(Q[:, :, :1], K, V, attn_mask=mask, enable_gqa=True),
    )
    for call in calls:
        true = call()
        with GroupedRows():
            assert torch.equal(call(), true)


def test_a_real_decoder_writes_through_rows(tmp_path, monkeypatch):
    asked = []
    own = attention._one_token
    monkeypatch.setattr(attention, "_one_token", lambda *a: asked.append(own(*a)) or asked[-1])
    module = materialise(load(write_tiny(tmp_path / "m", "llama"))).eval()
    ids = torch.tensor([[3], [5]])
    continued(module, ids, 6, torch.Generator().manual_seed(0))
    assert any(asked)


@pytest.mark.parametrize(("heads", "keys"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("length", [65, 128, 150])
def test_panels_that_learn_have_the_slopes_of_torch(heads: int, keys: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(count: int) -> torch.Tensor:
        return torch.randn(2, count, length, 8, generator=generator).requires_grad_(True)

    given, slope = (
        [made(heads), made(keys), made(keys)],
        torch.randn(2, heads, length, 8, generator=generator),
    )
    call = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=heads != keys, scale=0.4)
    true = call(*(x.double() for x in given))
    slopes = torch.autograd.grad(true, given, slope.double())
    with LearningPanels():
        found = call(*given)
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-5)
    for own, other in zip(torch.autograd.grad(found, given, slope), slopes, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_panels_that_learn_are_float32_inside_and_of_the_type_they_were_given() -> None:
    given = [x.requires_grad_(True) for x in heads(100, torch.bfloat16)]
    exact = [x.detach().float().requires_grad_(True) for x in given]
    true = F.scaled_dot_product_attention(*exact, is_causal=True)
    true.square().sum().backward()
    with LearningPanels(), torch.autocast("cpu", torch.bfloat16):
        found = F.scaled_dot_product_attention(*given, is_causal=True)
    found.float().square().sum().backward()
    # Of numbers that were rounded once; scores in bfloat16 would be off by more.
    assert (found == true.to(torch.bfloat16)).double().mean() > 0.99
    for x, y in zip(given, exact, strict=True):
        assert x.grad.dtype == torch.bfloat16
        assert float((x.grad - y.grad).norm() / y.grad.norm()) < 0.004


@pytest.mark.parametrize(
    "options",
    [{"is_causal": False}, {"is_causal": True, "dropout_p": 0.5}, {"attn_mask": torch.ones(100, 100).bool()}],
    ids=["not causal", "dropout", "a mask"],
)
def test_panels_that_learn_leave_the_rest_to_torch(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("taken over")

    monkeypatch.setattr(attention.Attended, "apply", never)
    given = heads(100, torch.float32)
    with LearningPanels():
        F.scaled_dot_product_attention(*given, **options)
        F.scaled_dot_product_attention(*heads(attention.LEARNING, torch.float32), is_causal=True)
    with LearningPanels(), pytest.raises(AssertionError, match="taken over"):
        F.scaled_dot_product_attention(*given, is_causal=True)
