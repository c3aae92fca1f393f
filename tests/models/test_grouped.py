"""Grouped convolutions as products of matrices: the numbers of the stock module, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import SqueezeBertModel

from pocketsize.models.grouped import Grouped, regroup
from tiny_configs import tiny_config


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_it_gives_what_the_convolution_gives(n: int, bias: bool, turned: bool) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv1d(8, 12, 1, groups=4, bias=bias))
    ours = nn.Sequential(nn.Conv1d(8, 12, 1, groups=4, bias=bias))
    ours.load_state_dict(stock.state_dict())
    regroup(ours)
    assert isinstance(ours[0], Grouped)
    x = torch.randn(n, 5, 8).transpose(1, 2) if turned else torch.randn(n, 8, 5)
    given = [x.clone().requires_grad_() for _ in range(2)]
    for module, own in zip((stock, ours), given, strict=True):
        module(own).square().sum().backward()
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(given[1].grad, given[0].grad)
    for a, b in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def test_a_whole_encoder_is_the_same_under_the_same_names() -> None:
    torch.manual_seed(0)
    config = tiny_config("squeezebert", tied=True)
    stock, ours = SqueezeBertModel(config).eval(), SqueezeBertModel(config).eval()
    names = list(ours.state_dict())
    regroup(ours)
    assert list(ours.state_dict()) == names
    ours.load_state_dict(stock.state_dict())
    assert sum(isinstance(m, Grouped) for m in ours.modules()) == 2 * 5
    ids = torch.arange(3, 21).view(2, 9)
    torch.testing.assert_close(ours(ids)[0], stock(ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [{"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 1}])
def test_other_convolutions_are_left_alone(other: dict[str, int]) -> None:
    groups = 4 if len(other) == 2 or other["kernel_size"] == 3 else 1
    module = nn.Sequential(nn.Conv1d(8, 8, groups=groups, **other))
    regroup(module)
    assert type(module[0]) is nn.Conv1d
