from __future__ import annotations

import pytest
import torch

from oracles.codebook import best_error, error_of, stored
from oracles.gptq import gptq_slow
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.quantization import gptq as gptq_module
from pocketsize.quantization.codebook import CODEBOOKS, as_e4m3, unit_of, unit_within, whole_power
from pocketsize.quantization.codebook_grid import fit_scales
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme

TABLES = {name: scheme for name, scheme in NAMED.items() if scheme.codebook is not None}
each = pytest.mark.parametrize("name", TABLES)


def weights(rows: int = 6, columns: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g) * 0.05
    W[0, 3] = 0.9  # an outlier
    return W, torch.rand(columns, generator=g) ** 3 * 10 + 1e-3


def gram(columns: int = 256) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    X = torch.randn(2048, columns, generator=g) @ (
        torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    )
    return X.T @ X / 2048


def loss(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> float:
    E = (W - Q).double()
    return float(((E @ H.double()) * E).sum())


@each
@pytest.mark.parametrize("search", [True, False])
def test_scales_reach_the_error_of_the_slow_search(name: str, search: bool) -> None:
    (W, d), scheme = weights(), TABLES[name]
    table = scheme.table
    assert table is not None
    unit, width = unit_of(W, table), scheme.width(256)
    scale = fit_scales(W, scheme, d if search else None)
    d = d if search else torch.ones_like(d)
    for r in range(W.shape[0]):
        for k in range(scale.shape[1]):
            part = slice(width * k, width * (k + 1))
            reached, _ = error_of(W[r, part], d[part], float(scale[r, k]), table)
            assert reached <= best_error(W[r, part], d[part], table, unit, search=search) * (1 + 2e-3)


@each
def test_every_scale_is_stored_exactly(name: str) -> None:
    (W, d), scheme = weights(), TABLES[name]
    table = scheme.table
    assert table is not None
    for scale in (rtn(W, scheme).scale, rtn(W, scheme, weight=d).scale, gptq(W, gram(), scheme).weight.scale):
        again = [stored(float(s), table, unit_within(scale)) for s in scale.flatten()]
        assert torch.equal(torch.tensor(again).view_as(scale), scale)


@each
def test_codes_are_the_nearest_entries(name: str) -> None:
    (W, d), scheme = weights(), TABLES[name]
    table = scheme.table
    assert table is not None
    q = rtn(W, scheme, weight=d)
    grid = q.scale.repeat_interleave(scheme.width(256), 1)[..., None] * torch.tensor(table.values)
    distance = (W[..., None] - grid).abs()
    assert torch.allclose((W - q.dequantize()).abs(), distance.amin(-1), atol=1e-7)
    assert torch.equal(q.dequantize(), grid.gather(-1, q.codes.long()[..., None])[..., 0])
    assert int(q.codes.max()) <= scheme.top and bool((q.zero == 0).all())


@each
def test_the_sweep_equals_the_slow_version(name: str) -> None:
    (W, _), scheme, H = weights(24), TABLES[name], gram()
    done = gptq(W, H, scheme).weight
    codes, Q = gptq_slow(W, H, scheme)
    rows = (done.codes.float() == codes).all(dim=1)
    assert float(rows.float().mean()) >= 0.85
    assert torch.allclose(done.dequantize()[rows], Q[rows], atol=1e-6)
    assert loss(W, done.dequantize(), H) == pytest.approx(loss(W, Q, H), rel=0.03)


@each
def test_search_and_feedback_each_lose_less(name: str) -> None:
    (W, _), scheme, H = weights(24), TABLES[name], gram()
    plain, searched = rtn(W, scheme).dequantize(), rtn(W, scheme, weight=H.diagonal()).dequantize()

    def weighted(Q: torch.Tensor) -> float:
        return float(((W - Q) ** 2 * H.diagonal()).sum())

    assert weighted(searched) <= weighted(plain) * (1 + 1e-5)
    assert loss(W, gptq(W, H, scheme).weight.dequantize(), H) < 0.9 * loss(W, searched, H)


@each
def test_rows_are_independent_and_inputs_untouched(name: str) -> None:
    (W, d), scheme, H = weights(300), TABLES[name], gram()
    before = W.clone(), d.clone(), H.clone()
    a, b = rtn(W, scheme, weight=d), rtn(W.flip(0), scheme, weight=d)
    assert torch.equal(a.codes.flip(0), b.codes) and torch.equal(a.scale.flip(0), b.scale)
    a, b = gptq(W, H, scheme).weight, gptq(W.flip(0), H, scheme).weight
    assert float((a.codes.flip(0) == b.codes).all(1).float().mean()) > 0.98
    assert all(torch.equal(x, y) for x, y in zip((W, d, H), before, strict=True))


@each
@pytest.mark.parametrize("factor", [4.0, 0.125])
def test_a_power_of_two_of_the_weights_is_one_of_the_scales(name: str, factor: float) -> None:
    (W, d), scheme = weights(), TABLES[name]
    a, b = rtn(W, scheme, weight=d), rtn(W * factor, scheme, weight=d)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale * factor, b.scale)


@each
@pytest.mark.parametrize("value", [0.0, 1e-30, 3.5, -3.5])
def test_constant_rows_stay_finite_and_close(name: str, value: float) -> None:
    W, scheme = torch.full((2, 256), value), TABLES[name]
    for weight in (None, torch.ones(256)):
        out = rtn(W, scheme, weight=weight).dequantize()
        assert bool(torch.isfinite(out).all())
        assert torch.allclose(out, W, rtol=0.15, atol=1e-3)


@each
def test_outputs_are_divided_by_powers_of_two_as_far_as_scales_allow(name: str) -> None:
    (W, d), scheme = weights(), TABLES[name]
    table = scheme.table
    assert table is not None
    q = rtn(W, scheme, weight=d)
    by = torch.minimum(q.most, torch.tensor(2.0**6))
    by[::2] = 2.0**-6
    shrunk = q.divided(by)
    assert torch.equal(shrunk.dequantize() * by[:, None], q.dequantize())
    again = [stored(float(s), table, unit_within(shrunk.scale)) for s in shrunk.scale.flatten()]
    assert torch.equal(torch.tensor(again).view_as(shrunk.scale), shrunk.scale)


def test_bits_per_weight_are_those_of_the_formats() -> None:
    widths = {name: scheme.bits_per_weight(512) for name, scheme in TABLES.items()}
    assert widths == {
        "NF4": 4.5,
        "IQ4_NL": 4.5,
        "NVFP4": 4.5,
        "MXFP4": 4.25,
        "TERNARY": 2 + 16 / 512,
        "TQ2_0": 2.0625,
        "TQ1_0": 1.6875,
    }


def test_tables_rise_and_float4_is_what_its_bits_say() -> None:
    for table in CODEBOOKS.values():
        assert list(table.values) == sorted(set(table.values)) and len(table.values) <= 16
    for name in ("mxfp4", "nvfp4"):
        table = CODEBOOKS[name]
        assert table.stored is not None
        for value, bits in zip(table.values, table.stored, strict=True):
            sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
            size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
            assert value == (-size if sign else size)


def test_nf4_is_quantiles_of_a_normal_distribution() -> None:
    """Appendix E of the paper: even steps of probability on either side, 8 above zero and 7 below."""
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((below, torch.zeros(1), above.flip(0))) / above.max()
    assert torch.allclose(values, torch.tensor(CODEBOOKS["nf4"].values, dtype=torch.float64), atol=2e-6)


def test_float8_and_powers_of_two_are_the_nearest() -> None:
    s = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3
    for unit in (2.0**-7, 2.0**-9):
        expected = [stored(float(x), CODEBOOKS["nvfp4"], unit) for x in s]
        assert torch.equal(as_e4m3(s, unit), torch.tensor(expected))
    expected = [stored(float(x), CODEBOOKS["mxfp4"], 1.0) for x in s]
    assert torch.equal(whole_power(s), torch.tensor(expected))


def test_the_unit_of_part_of_a_matrix_holds_its_scales_as_well() -> None:
    W, _ = weights(64)
    W[:32] /= 2**9
    scale = rtn(W, TABLES["NVFP4"]).scale
    for part in (scale[:32], scale[32:], scale[5:9]):
        assert torch.equal(as_e4m3(part, unit_within(part)), part)


def test_plain_ternary_is_the_mean_magnitude() -> None:
    W, _ = weights()
    q = rtn(W, TABLES["TERNARY"])
    mean = W.abs().mean(1, keepdim=True)
    assert torch.allclose(q.scale, mean, rtol=2**-8)
    assert torch.equal(q.codes.float() - 1, (W / q.scale).round().clamp(-1, 1))


def test_what_is_no_codebook_is_refused() -> None:
    with pytest.raises(UsageError, match="codebook must be one of nf4"):
        Scheme(4, 64, symmetric=True, codebook="nf5")
    with pytest.raises(UsageError, match="symmetric: true"):
        Scheme(4, 64, codebook="nf4")
    with pytest.raises(UnsupportedError, match="group 256 does not divide"):
        rtn(torch.zeros(2, 64), TABLES["TQ2_0"])


def test_a_gpu_refuses_them_with_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match="has no codebook NF4: set POCKETSIZE_DEVICE=cpu"):
        gptq_module._require_gpu_grid(TABLES["NF4"])


def test_a_scheme_without_a_codebook_is_told_as_ever() -> None:
    plain = Scheme(4, 64).facts()
    assert [*plain] == ["bits", "group", "symmetric", "scale_digits", "float_zeros"]
    assert Scheme(**plain) == Scheme(4, 64)
    for name, scheme in TABLES.items():
        assert scheme.name == name and Scheme(**scheme.facts()) == scheme
    assert Scheme(4, 32, symmetric=True).name == "W4A16"
