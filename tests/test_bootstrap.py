"""Intervals by the bootstrap: against a plain loop, against theory, and the laws that a mean's interval keeps."""

from __future__ import annotations

import math
import random
import statistics

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq.bootstrap import interval

VALUES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40)


def names(count: int) -> list[str]:
    return [f"prompt {place}" for place in range(count)]


def normal(count: int, seed: int = 0) -> list[float]:
    return numpy.random.default_rng(seed).normal(20, 3, count).tolist()


def ends(values: list[float], prompts: list[str] | None = None, seed: int = 0) -> tuple[float, float]:
    found = interval(values, prompts or names(len(values)), seed=seed)
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def test_it_is_the_plain_bootstrap() -> None:
    """The same by loops, with another generator: the ends agree but for the resamples' own noise."""
    values = [each**2 for each in normal(30)]
    chance = random.Random(1)
    means = sorted(statistics.fmean(chance.choices(values, k=30)) for _ in range(10_000))
    spread = statistics.pstdev(means)
    low, high = ends(values)
    assert low == pytest.approx(means[250], abs=0.1 * spread)
    assert high == pytest.approx(means[9750], abs=0.1 * spread)


def test_many_values_give_the_interval_of_theory() -> None:
    values = normal(400)
    half = 1.96 * statistics.pstdev(values) / math.sqrt(400)
    low, high = ends(values)
    mean = statistics.fmean(values)
    assert low == pytest.approx(mean - half, abs=0.05 * half)
    assert high == pytest.approx(mean + half, abs=0.05 * half)


@settings(max_examples=12)
@given(VALUES, st.integers(0, 2**32))
def test_it_holds_the_mean_and_lies_within_the_values(values: list[float], seed: int) -> None:
    low, high = ends(values, seed=seed)
    found = interval(values, names(len(values)), seed=seed)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert min(values) - 1e-9 <= low <= found.mean <= high <= max(values) + 1e-9
    assert (found.pictures, found.prompts) == (len(values), len(values))
    assert (low, high) == ends(values, seed=seed), "the same seed gives the same interval"


@settings(max_examples=12)
@given(VALUES, st.floats(0.1, 10), st.floats(-100, 100))
def test_it_moves_and_stretches_with_the_values(values: list[float], factor: float, shift: float) -> None:
    low, high = ends(values)
    moved = ends([factor * value + shift for value in values])
    assert moved == pytest.approx((factor * low + shift, factor * high + shift), abs=1e-6)


@pytest.mark.parametrize("count", [20, 100])
def test_four_times_the_prompts_halve_it(count: int) -> None:
    low, high = ends(normal(count))
    narrow_low, narrow_high = ends(normal(count) * 4)
    assert (narrow_high - narrow_low) / (high - low) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("repeats", [2, 7])
def test_more_pictures_of_the_same_prompts_are_no_more_prompts(repeats: int) -> None:
    values = normal(20)
    assert ends(values * repeats, names(20) * repeats) == pytest.approx(ends(values))
    found = interval(values * repeats, names(20) * repeats)
    assert (found.pictures, found.prompts) == (20 * repeats, 20)


def test_prompts_drawn_more_often_weigh_more() -> None:
    values, prompts = [1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]
    found = interval(values, prompts)
    assert found.mean == 2.0
    assert (found.low, found.high) == (1.0, 5.0)  # both "a", both "b" each come in a quarter of the resamples


def test_a_paired_difference_is_far_narrower_than_its_parts() -> None:
    first = normal(100)
    second = [value - 0.5 + noise / 30 for value, noise in zip(first, normal(100, seed=1), strict=True)]
    low, high = ends([a - b for a, b in zip(first, second, strict=True)])
    wide_low, wide_high = ends(first)
    assert high - low < (wide_high - wide_low) / 20


def test_one_prompt_has_no_interval() -> None:
    found = interval([1.0, 3.0], ["a", "a"])
    assert (found.mean, found.low, found.high, found.prompts) == (2.0, None, None, 1)


@pytest.mark.parametrize(("values", "prompts"), [([], []), ([1.0], []), ([1.0], ["a", "b"])])
def test_a_prompt_a_value(values: list[float], prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="a prompt for each of one or more values"):
        interval(values, prompts)
