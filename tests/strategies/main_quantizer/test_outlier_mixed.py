"""Outlier-driven mixed precision: which channels get more bits, and that a fit's loop keeps them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loraq.strategies.main_quantizer.outlier_mixed import OutlierMixed
from loraq.strategies.main_quantizer.rtn import Rtn
from torch import Tensor

from loraq import rounding
from loraq.composite_formats import INT3_MIXED, INT4_MIXED
from loraq.factors import deviation
from matrices import calibrated_context, context, seeded, weights_OI

UNEVEN = seeded(40, 130, seed=1) * torch.logspace(-1, 1, 40).unsqueeze(1)


@given(weight=weights_OI(), order=st.sampled_from(["error", "kurtosis"]), known=st.booleans())
def test_it_is_never_worse_than_equal_widths(weight: Tensor, order: str, known: bool) -> None:
    given = calibrated_context(weight.shape[1]) if known else context()
    coded = OutlierMixed(order=order).encode(weight, given)  # type: ignore[arg-type]
    equal = rounding.searched(weight, INT4_MIXED.grids[1], 64)
    assert deviation(weight - coded.decode(), given) <= deviation(weight - equal.decode(), given) * (1 + 1e-6)
    widths = INT4_MIXED.widths(coded)
    assert (widths == 0).sum() == (widths == 2).sum()


def test_uneven_channels_gain_much_at_the_same_bits() -> None:
    for format in (INT3_MIXED, INT4_MIXED):
        mixed = OutlierMixed(weight=format).encode(UNEVEN, context())
        equal = Rtn(weight=format.grids[1]).round(UNEVEN)
        assert (UNEVEN - mixed.decode()).norm() < 0.7 * (UNEVEN - equal.decode()).norm()


def test_the_largest_channels_get_more_bits() -> None:
    widths = INT4_MIXED.widths(OutlierMixed().encode(UNEVEN, context()))
    moved = int((widths == 2).sum())
    assert moved > 5
    assert (widths[-moved:] == 2).all()
    assert (widths[:moved] == 0).all()


def test_kurtosis_moves_the_channels_with_outliers() -> None:
    weight = seeded(20, 256, seed=2)
    weight[[4, 11], 7] = 30.0
    widths = INT4_MIXED.widths(OutlierMixed(order="kurtosis").encode(weight, context()))
    assert widths[[4, 11]].tolist() == [2, 2]
    assert int((widths == 2).sum()) == 2


def test_where_the_input_is_known_its_large_channels_decide() -> None:
    """Rows 0 to 4 are rough in columns that never had an input: only the weight's error asks for more bits there."""
    weight, known = seeded(20, 64, seed=3), calibrated_context(64)
    weight[:5, 2] = 40.0  # the channel without input, see matrices.correlated
    weight[5:10] *= 8
    blind = INT4_MIXED.widths(OutlierMixed().encode(weight, context()))
    informed = INT4_MIXED.widths(OutlierMixed().encode(weight, known))
    assert (informed[5:10] == 2).all()
    assert not torch.equal(blind, informed)


def test_a_fit_s_loop_keeps_the_split_and_follows_the_weight() -> None:
    quantizer = OutlierMixed()
    guess = quantizer.round(UNEVEN)
    moved = UNEVEN.flip(0) * 1.01
    coded = quantizer.round(moved, guess)
    assert torch.equal(coded.parts["widths"], guess.parts["widths"])
    assert not torch.equal(quantizer.round(moved).parts["widths"], guess.parts["widths"])
    near = quantizer.round(UNEVEN * 1.02, guess)
    fresh = quantizer.round(UNEVEN * 1.02)
    assert (UNEVEN * 1.02 - near.decode()).norm() < 1.05 * (UNEVEN * 1.02 - fresh.decode()).norm()


def test_the_loop_rounds_each_row_as_its_own_format_does() -> None:
    quantizer, moved = OutlierMixed(), UNEVEN * 1.03
    guess = quantizer.round(UNEVEN)
    integers, _, _ = INT4_MIXED.integer_view(quantizer.round(moved, guess))
    for row, width in enumerate(INT4_MIXED.widths(guess).tolist()):
        grid = INT4_MIXED.grids[width]
        before = rounding.searched(UNEVEN[row : row + 1], grid, 64)
        assert torch.equal(integers[row : row + 1], rounding.searched(moved[row : row + 1], grid, 64, before).codes)


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'weight' must be a format of mixed widths, 'int3_mixed' .* got 'int4'"):
        OutlierMixed(weight="int4")
