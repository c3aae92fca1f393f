from __future__ import annotations

import pytest

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.quantization.scheme import Scheme, bits_of, default_group, named


def test_bits_per_weight_counts_scales_and_zeros() -> None:
    assert Scheme(4, 64).bits_per_weight(576) == 4 + 20 / 64
    assert Scheme(4, 32, float_zeros=True).bits_per_weight(576) == 5.0
    assert Scheme(4, 32, symmetric=True).bits_per_weight(576) == 4.5
    assert Scheme(8, None, symmetric=True).bits_per_weight(512) == 8 + 16 / 512


@pytest.mark.parametrize(
    ("widths", "legal", "group"),
    [({576, 1536}, (128, 96, 64, 32), 96), ({384, 1536}, (128, 96, 64, 32), 128), ({576, 1536}, (32,), 32)],
)
def test_default_group_is_the_largest_that_divides_and_is_legal(
    widths: set[int], legal: tuple[int, ...], group: int
) -> None:
    assert default_group(widths, legal) == group


def test_no_group_divides() -> None:
    with pytest.raises(UnsupportedError, match="one scale per row"):
        default_group({100})


@pytest.mark.parametrize("bits", [0, 1, 6, 9])
def test_unknown_widths_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match="bits must be one of"):
        Scheme(bits)


def test_scheme_names() -> None:
    assert bits_of("W3A16") == 3 and Scheme(3).name == "W3A16"
    with pytest.raises(UsageError, match="W4A16"):
        bits_of("W4A4")


def test_a_group_that_does_not_divide_names_both_numbers() -> None:
    with pytest.raises(UnsupportedError, match=r"group 128 .* 576"):
        Scheme(4, 128).width(576)


def test_a_name_says_everything_about_a_grid() -> None:
    assert named("q4_0") == Scheme(4, 32, symmetric=True) and bits_of("Q5_1") == 5
    assert named("W4A16") is None
    with pytest.raises(UsageError, match="did you mean 'Q4_1'"):
        bits_of("Q4_11")
    with pytest.raises(UnsupportedError, match="Q4_2: this type was removed from GGUF; use Q4_0"):
        bits_of("Q4_2")
