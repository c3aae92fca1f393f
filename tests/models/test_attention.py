from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pocketsize.models.attention import CausalPanels, causal


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
