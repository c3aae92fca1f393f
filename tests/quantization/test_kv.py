"""Caches of keys and values: equal to decoding token by token, exact in bytes, clear in what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oracles.kv import block_slow, decode_blockwise, decode_kivi
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.linalg import hadamard
from pocketsize.quantization.kv import Blockwise, Kivi, attend, bits_per_token, parse_cache
from pocketsize.quantization.kv_blocks import BITS, rounded

QUANTIZED = [kind for kind, bits in BITS.items() if bits < 16]


def heads(tokens: int, width: int, queries: int = 1) -> list[torch.Tensor]:
    """Queries, keys and values; keys have channels that stand out, as real ones have."""
    g = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(1, n, tokens, width, generator=g) for n in (queries, 1, 1))
    return [Q, K * (1 + 4 * torch.rand(width, generator=g)), V]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks_are_stored_as_ggml_stores_them(kind: str) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) ** 3
    x[0] = 0
    got = rounded(x, kind).numpy()
    wanted = np.stack([block_slow(row, kind) for row in x[1:].numpy()])
    assert not got[0].any() and np.allclose(got[1:], wanted, rtol=1e-6, atol=1e-7)


def test_float_types_are_casts() -> None:
    x = torch.randn(4, 32)
    assert torch.equal(rounded(x, "f16"), x.half().float())
    assert torch.equal(rounded(x, "bf16"), x.bfloat16().float())
    assert rounded(x, "f32").equal(x)


@pytest.mark.parametrize("sink,residual,group", [(0, 8, 4), (0, 8, 8), (3, 8, 4), (2, 16, 8)])
@pytest.mark.parametrize("tokens", [5, 16, 41])
def test_kivi_of_a_window_is_decoding(tokens: int, sink: int, residual: int, group: int) -> None:
    Q, K, V = heads(tokens, 16)
    cache = Kivi(2, 3, group, residual, sink)
    got = attend(cache, Q, K, V, scale=0.2)[0, 0]
    wanted = decode_kivi(
        *(x[0, 0].double().numpy() for x in (Q, K, V)),
        bits=(2, 3),
        group=group,
        residual=residual,
        sink=sink,
        scale=0.2,
    )
    assert np.allclose(got.numpy(), wanted, atol=2e-5)


@pytest.mark.parametrize(
    "kinds,width", [(("q8_0", "q4_0"), 32), (("q4_1", "iq4_nl"), 32), (("q4_0", "q5_1"), 64)]
)
def test_blockwise_of_a_window_is_decoding(kinds: tuple[str, str], width: int) -> None:
    Q, K, V = heads(20, width)
    got = attend(Blockwise(*kinds), Q, K, V, scale=0.1)[0, 0]
    rotation = hadamard(64).double().numpy() if width == 64 else None
    wanted = decode_blockwise(
        *(x[0, 0].double().numpy() for x in (Q, K, V)), kinds=kinds, rotation=rotation, scale=0.1
    )
    # An entry that lies between two codes may fall to either side.
    assert np.abs(got.numpy() - wanted).mean() < 2e-4 and np.abs(got.numpy() - wanted).max() < 0.05


@pytest.mark.parametrize("cache", [Kivi(2, 2, 16, 32), Blockwise("q4_0", "q4_0"), None])
def test_heads_masks_and_caps(cache: Blockwise | Kivi | None) -> None:
    Q, K, V = heads(300, 32, queries=3)
    plain = attend(cache, Q, K, V, scale=0.1)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    least = torch.zeros(1, 1, 300, 300).masked_fill(~mask, torch.finfo(torch.float32).min)
    repeated = [x.repeat(1, 3, 1, 1) for x in (K, V)]
    for other in (
        attend(cache, Q, K, V, scale=0.1, mask=mask),
        attend(cache, Q, K, V, scale=0.1, mask=least),
        attend(cache, Q, *repeated, scale=0.1),
        attend(cache, Q, K, V, scale=0.1, cap=1e5),
    ):
        assert torch.allclose(other, plain, atol=1e-3)
    assert not torch.allclose(attend(cache, Q, K, V, scale=0.1, cap=0.5), plain, atol=1e-2)
    if cache is None:
        wanted = F.scaled_dot_product_attention(Q, *repeated, is_causal=True, scale=0.1)
        assert torch.allclose(plain, wanted, atol=1e-5)


def test_nothing_is_rounded_within_the_residual_window() -> None:
    Q, K, V = heads(64, 32)
    exact = attend(None, Q, K, V, scale=0.2)
    kivi = attend(Kivi(2, 2, residual=32), Q, K, V, scale=0.2)
    assert torch.allclose(kivi[..., :32, :], exact[..., :32, :], atol=1e-6)
    assert not torch.allclose(kivi[..., 33:, :], exact[..., 33:, :], atol=1e-3)


def test_what_comes_later_changes_nothing_before() -> None:
    Q, K, V = heads(96, 32)
    for cache in (Kivi(2, 2, residual=32), Kivi(4, 2, 32, 32, sink=4), Blockwise("q4_0", "q4_0")):
        whole = attend(cache, Q, K, V, scale=0.2)
        part = attend(cache, *(x[..., :50, :] for x in (Q, K, V)), scale=0.2)
        assert torch.allclose(whole[..., :50, :], part, atol=1e-6)


def test_more_bits_keep_more_and_channels_that_stand_out_favour_kivi() -> None:
    Q, K, V = heads(256, 64)
    exact = attend(None, Q, K, V, scale=0.125)
    error = {
        name: float((attend(parse_cache(name), Q, K, V, scale=0.125) - exact).square().mean())
        for name in ("kivi-2-r32", "kivi-4-r32", "kivi-8-r32", "q4_0", "q8_0")
    }
    assert error["kivi-8-r32"] < error["kivi-4-r32"] / 10 < error["kivi-2-r32"] / 100
    assert error["q8_0"] < error["q4_0"] / 20


def test_bits_count_scales_minima_and_what_waits() -> None:
    assert Blockwise("q8_0", "q4_0").bits(10, 64) == 10 * 64 * 13
    kivi = Kivi(2, 4, 32, 128)
    assert kivi.bits(128, 64) == 64 * (128 * (2 + 1) + 128 * 16)
    assert kivi.bits(200, 64) == 64 * (128 * 3 + 72 * 16 + 72 * 5 + 128 * 16)
    assert Kivi(2, 2, 32, 128, sink=4).bits(100, 64) == 64 * 100 * 32
    assert bits_per_token(kivi, 64) == 64 * (3 + 5) and bits_per_token(Blockwise(), 64) == 64 * 17


@pytest.mark.parametrize("name", ["q8_0", "q8_0/q4_0", "f16", "kivi-2", "kivi-k4v2", "kivi-3-g64-r64-s4"])
def test_names_are_read_as_they_are_said(name: str) -> None:
    assert parse_cache(name).name == name


@pytest.mark.parametrize(
    "name,said",
    [
        ("q8_O", "did you mean 'q8_0'"),
        ("kivi", "write kivi-2"),
        ("kivi-5", "bits must be one of"),
        ("kivi-2-g32-r100", "no multiple"),
        ("kivi-2-g0", "no multiple"),
        ("", "unknown cache type"),
    ],
)
def test_names_that_mean_nothing(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_cache(name)


def test_heads_that_no_blocks_fill() -> None:
    Q, K, V = heads(8, 48)
    with pytest.raises(UnsupportedError, match="48 are no whole number"):
        attend(Blockwise(), Q, K, V, scale=1)
    with pytest.raises(UnsupportedError, match="kivi-2-g16"):
        attend(Kivi(), Q, K, V, scale=1)
    assert attend(Blockwise("f16", "f16"), Q, K, V, scale=1).shape == Q.shape
