"""Searched scales: properties of the rounding, and the kernel against its plain reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraq import formats, rounding
from loraq.layer import Coded

INTEGERS = (formats.INT4, formats.INT6, formats.INT8)
TABLE = formats.TableFormat("crumbs", 2, (-1.0, -0.25, 0.25, 1.0))
SHAPES = ((1, 1), (3, 5), (2, 64), (65, 130))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """A matrix of an odd shape with a heavy tail, some of its groups all zero."""
    rows, columns = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(rows, columns, generator=generator) / torch.rand(rows, columns, generator=generator).add(0.02)
    kept = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from((0.0, 0.1, 1.0)))
    return values * kept * draw(st.sampled_from((1.0, 1e-30, 1e30, 3e-6)))


groups = st.sampled_from((1, 5, 16, 64, 130))
integers = st.sampled_from(INTEGERS)


def total(values: Tensor, coded: Coded) -> float:
    return float((values.double() - coded.decode().double()).square().sum())


def assert_same(expected: Coded, actual: Coded) -> None:
    assert torch.equal(expected.codes, actual.codes)
    assert torch.equal(expected.scales, actual.scales)


@settings(max_examples=60, deadline=None)
@given(matrices(), integers, groups)
def test_kernel_equals_the_reference(values: Tensor, format: formats.IntegerFormat, group: int) -> None:
    """Codes and scales are the reference's bit for bit, in the full search and from a guess; a GPU's as well."""
    full = rounding.searched_reference(values, format, group)
    moved = values.roll(1, dims=0) * 0.25 + values
    near = rounding.searched_reference(moved, format, group, full)
    for way in (rounding.searched, rounding.searched_at_once):
        assert_same(full, way(values, format, group))
        assert_same(near, way(moved, format, group, full))


@settings(max_examples=40, deadline=None)
@given(matrices(), st.sampled_from((*INTEGERS, TABLE)), groups)
def test_searching_is_never_worse_than_amax(values: Tensor, format: formats.IntegerFormat, group: int) -> None:
    """A factor of 1 is among those tried, so every group's error is at most that of its largest magnitude."""
    searched, plain = rounding.searched(values, format, group), rounding.amax(values, format, group)
    assert (rounding.squared_error(values, searched) <= rounding.squared_error(values, plain)).all()


@settings(max_examples=40, deadline=None)
@given(matrices(), integers, groups, st.sampled_from(("search", "amax")), st.integers(-8, 8))
def test_powers_of_two_pass_through(
    values: Tensor, format: formats.IntegerFormat, group: int, scale: rounding.Scale, power: int
) -> None:
    """Scaling the matrix by a power of two scales the scales and leaves the codes."""
    values = values.clamp(-1e10, 1e10)
    values = torch.where(values.abs() < 1e-10, 0, values)  # where no square under- or overflows
    before = rounding.rounded(values, format, group, scale)
    after = rounding.rounded(values * 2.0**power, format, group, scale)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.scales.float() * 2.0**power, after.scales.float())


@settings(max_examples=40, deadline=None)
@given(matrices(), integers, groups)
def test_amax_is_idempotent(values: Tensor, format: formats.IntegerFormat, group: int) -> None:
    """What is on the grid stays where it is."""
    once = rounding.amax(values, format, group)
    assert_same(once, rounding.amax(once.decode(), format, group))


@settings(max_examples=40, deadline=None)
@given(matrices(), integers, groups, st.sampled_from(("search", "amax")))
def test_half_a_step(values: Tensor, format: formats.IntegerFormat, group: int, scale: rounding.Scale) -> None:
    """Whatever does not saturate is at most half a step off."""
    coded = rounding.rounded(values, format, group, scale)
    steps = coded.scales.float().repeat_interleave(group, dim=1)[:, : values.shape[1]]
    inside = (coded.codes > -format.limit - 1) & (coded.codes < format.limit)
    off = (values.double() - coded.decode().double()).abs()
    assert (off[inside] <= steps.double()[inside] * 0.500001).all()


@pytest.mark.parametrize("format", INTEGERS, ids=lambda each: each.name)
def test_a_guess_finds_the_same_neighbourhood(format: formats.IntegerFormat) -> None:
    """From its own answer the narrow search never gets worse."""
    values = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    full = rounding.searched(values, format, 64)
    again = rounding.searched(values, format, 64, full)
    assert (rounding.squared_error(values, again) <= rounding.squared_error(values, full)).all()


def test_a_guess_of_zero_does_not_stick() -> None:
    """A group that was all zero gets a scale when it no longer is."""
    guess = rounding.searched(torch.zeros(2, 64), formats.INT4, 64)
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    assert total(values, rounding.searched(values, formats.INT4, 64, guess)) < 0.1 * float(values.square().sum())


def test_reference_against_a_plain_loop() -> None:
    """The search of one group, written out."""
    values = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    errors = {}
    for factor in rounding.FACTORS:
        scale = float((values.abs().max() * factor / 7).to(torch.bfloat16))
        errors[scale] = sum(
            (value - scale * min(max(round(value / scale), -8), 7)) ** 2 for value in values[0].tolist()
        )
    least = min(errors, key=lambda scale: errors[scale])
    assert float(rounding.searched_reference(values, formats.INT4, 64).scales) == least


def test_formats_without_scales_are_rounded() -> None:
    """There is nothing to search in a floating point format."""
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(rounding.searched(values, formats.BFLOAT16, 64).decode(), values.bfloat16().float())


def test_columns_need_not_be_contiguous() -> None:
    """A transposed matrix is rounded as its copy is."""
    values = torch.randn(130, 65, generator=torch.Generator().manual_seed(4)).T
    assert_same(rounding.searched(values.contiguous(), formats.INT4, 64), rounding.searched(values, formats.INT4, 64))
