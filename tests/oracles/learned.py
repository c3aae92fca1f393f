"""Learned rounding as a graph: torch differentiates through the roundings, torch's Adam takes the steps."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketsize.quantization.codebook_grid import storable
from pocketsize.quantization.grid import QWeight, storable_scale
from pocketsize.quantization.learned import INSIDE, PACE, STEPS, TRAVEL


def learned_slowly(W: Tensor, start: QWeight, gradients: list[Tensor]) -> QWeight:
    """The matrix after one step along each gradient of a loss that is linear in what is stored."""
    scheme, rows = start.scheme, start.scale.shape
    codes = start.codes.float().view(*rows, -1)
    offset = W.view(*rows, -1) / start.scale[..., None] + start.zero[..., None] - codes
    if scheme.table is not None:
        offset = offset_in_table(W.view(*rows, -1) / start.scale[..., None], codes, scheme.table.values)
    place = (codes + offset.clamp(-INSIDE, INSIDE)).requires_grad_()
    grown, raised = (torch.zeros_like(start.scale).requires_grad_() for _ in range(2))
    of_codes = torch.optim.Adam([place], lr=1.0, betas=(0.9, 0.95), eps=1e-20)
    of_grid = torch.optim.Adam([grown, raised], lr=1.0, betas=(0.9, 0.99), eps=1e-20)

    def now() -> tuple[Tensor, Tensor, Tensor]:
        q = through(place, place.round().clamp(0, scheme.top))
        s = start.scale * (1 + grown)
        if scheme.table is not None:
            q = through(q, torch.tensor(scheme.table.values)[q.detach().long()])
            s = through(s, storable(s.detach(), start.scale, scheme))
            return q, s, torch.zeros_like(s)
        s = through(s, storable_scale(s.detach(), scheme.scale_digits))
        if not scheme.float_zeros:
            return q, s, -s * start.zero
        least = start.minimum + start.scale * raised
        return q, s, through(least, least.half().float())

    for step, gradient in enumerate(gradients):
        q, s, least = now()
        loss = ((s[..., None] * q + least[..., None]).view_as(W) * gradient).sum()
        of_codes.zero_grad(), of_grid.zero_grad()
        loss.backward()
        left = 1 - step / len(gradients)
        place.grad = place.grad / start.scale.abs()[..., None]  # the size of a group's scale does not count
        of_codes.param_groups[0]["lr"] = 2 * TRAVEL / max(len(gradients), STEPS) * left
        of_grid.param_groups[0]["lr"] = PACE * left
        of_codes.step(), of_grid.step()
    if scheme.table is not None:
        codes = place.detach().round().clamp(0, scheme.top).to(torch.uint8).view_as(start.codes)
        return QWeight(codes, now()[1].detach(), start.zero, scheme)
    q, s, least = (T.detach() for T in now())
    zero = -least / s if scheme.float_zeros else start.zero
    return QWeight(q.to(torch.uint8).view_as(start.codes), s, zero, scheme)


def offset_in_table(x: Tensor, codes: Tensor, values: tuple[float, ...]) -> Tensor:
    """How far each x lies from its entry, a half being the middle towards the next, one by one."""
    found = []
    for one, code in zip(x.flatten().tolist(), codes.flatten().int().tolist(), strict=True):
        up = one > values[code]
        other = code + 1 if up else code - 1
        if not 0 <= other < len(values):  # beyond an end: as far as to the entry on the other side
            other = code - 1 if up else code + 1
        found.append((one - values[code]) / abs(values[other] - values[code]))
    return torch.tensor(found).view(x.shape)


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    return value + (rounded - value).detach()
