from __future__ import annotations

import pytest
import torch

from pocketsize.linalg import Gram
from pocketsize.models.walk import Site
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.quantize import Gptq, quantize_site


def site(*, first: bool) -> Site:
    """One matrix, what it reads, and (in quite another direction) what first positions read."""
    g = torch.Generator().manual_seed(0)
    gram, loud = Gram.zeros(64), Gram.zeros(64)
    gram.update(torch.randn(512, 64, generator=g))
    loud.update(torch.randn(1, 64, generator=g).repeat(8, 1) * 4)
    W = torch.randn(16, 64, generator=g)
    return Site("block", ("w",), (W,), gram, last=True, first=loud if first else None)


@pytest.mark.parametrize("sink", [0.0, 0.5, 3.0])
def test_first_positions_count_as_much_as_sink_says(sink: float) -> None:
    scheme, one = Scheme(3, 32), site(first=True)
    assert one.first is not None
    ((_, weight, report),) = quantize_site(one, scheme, Gptq("W3A16", sink=sink))
    objective = one.gram.mean() + sink * one.first.mean()
    assert torch.equal(weight.codes, gptq(one.weights[0], objective, scheme).weight.codes)
    E, H = one.weights[0] - weight.dequantize(), one.gram.mean()
    whole = ((one.weights[0] @ H) * one.weights[0]).sum()
    assert report.error == pytest.approx(float(((E @ H) * E).sum() / whole), rel=1e-3)


def test_an_error_at_first_positions_falls_and_elsewhere_sink_changes_nothing() -> None:
    one = site(first=True)
    assert one.first is not None
    X = one.first.mean()

    def error(sink: float) -> float:
        ((_, weight, _),) = quantize_site(one, Scheme(3, 32), Gptq("W3A16", sink=sink))
        E = one.weights[0] - weight.dequantize()
        return float(((E @ X) * E).sum())

    assert error(1.0) < 0.25 * error(0.0)
    codes = [
        next(quantize_site(site(first=False), Scheme(3, 32), Gptq("W3A16", sink=s)))[1].codes for s in (0, 3)
    ]
    assert torch.equal(*codes)
