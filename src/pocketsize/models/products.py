"""Which library multiplies float32 matrices on this processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from pocketsize.linalg import ONEDNN, asked, multiplied_in

# What rounding to bfloat16 inside a product would exceed by far: of float32 the error is 4e-7 here.
EXACT = 1e-5
# Rows, inner and columns of products that are tried: tall ones, small ones, and many at once.
_TRIED = ((1, 256, 512, 384), (1, 33, 96, 64), (4, 64, 48, 80))


@contextmanager
def quick_products() -> Iterator[None]:
    """Within the block float32 matrices are multiplied by the library that is quick here.

    Torch takes MKL, which leaves AVX-512 unused on processors that are not Intel's: 105 GFLOP/s on a core of
    AMD's fifth EPYC, where oneDNN has 235 with the same float32. Torch asks oneDNN only if it may round
    inside a product; a processor without matrix units does not, and `_exact` makes sure. Elsewhere nothing
    changes. The processor alone decides, so that results do not differ from run to run.
    """
    with multiplied_in("bf16" if is_quicker() else asked()):
        yield


@contextmanager
def stock_products() -> Iterator[None]:
    """Within the block products are what torch makes of them by default: for times that others will see."""
    with multiplied_in("none"):
        yield


@cache
def is_quicker() -> bool:
    """Whether oneDNN multiplies float32 on this processor quicker than MKL, and as exactly."""
    flags = torch.cpu.get_capabilities()
    others = bool(flags.get("avx512_f")) and str(flags.get("cpu_name", "")).startswith("AMD")
    if not (others and ONEDNN.is_available()):
        return False
    with multiplied_in("bf16"):
        return _exact()


def _exact() -> bool:
    """Whether products are as near to those in float64 as float32 can be."""
    generator = torch.Generator().manual_seed(0)
    for count, rows, inner, columns in _TRIED:
        a = torch.randn(count, rows, inner, generator=generator)
        b = torch.randn(count, inner, columns, generator=generator)
        true = a.double() @ b.double()
        for found in (a @ b, torch.stack([x @ y for x, y in zip(a, b, strict=True)])):
            if float((found - true).abs().max() / true.abs().max()) > EXACT:
                return False
    return True
