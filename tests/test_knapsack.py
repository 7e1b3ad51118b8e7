"""The knapsack: never worse than trying everything, and honest where it does not search to the end."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraq import knapsack
from loraq.knapsack import least_bytes, select

Options = list[list[tuple[int, float]]]

errors = st.one_of(st.integers(0, 4).map(float), st.floats(0, 10, allow_subnormal=False))
options = st.lists(st.lists(st.tuples(st.integers(0, 12), errors), min_size=1, max_size=4), min_size=1, max_size=6)


def least_error(units: Options, budget: int) -> float:
    """By trying everything."""
    return min(
        math.fsum(error for _, error in picks)
        for picks in itertools.product(*units)
        if sum(bytes for bytes, _ in picks) <= budget
    )


@given(units=options, room=st.integers(0, 40))
def test_no_selection_within_the_budget_leaves_less(units: Options, room: int) -> None:
    budget = least_bytes(units) + room
    found = select(units, budget)
    picked = [unit[pick] for unit, pick in zip(units, found.picks, strict=True)]
    assert sum(bytes for bytes, _ in picked) == found.bytes <= budget
    assert math.fsum(error for _, error in picked) == pytest.approx(found.error, rel=1e-9, abs=1e-12)
    assert found.error == pytest.approx(least_error(units, budget), rel=1e-9, abs=1e-12)
    assert found.bound == found.error


@given(units=options, room=st.integers(0, 40))
def test_a_search_that_is_cut_short_says_how_far_the_optimum_may_be(units: Options, room: int) -> None:
    budget = least_bytes(units) + room
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(knapsack, "_STATES", 1)
        found = select(units, budget)
    assert found.bytes <= budget
    least = least_error(units, budget)
    assert found.bound <= least * (1 + 1e-9) + 1e-12
    assert least <= found.error * (1 + 1e-9) + 1e-12


def test_a_model_of_a_thousand_layers_is_solved_with_little_left_open() -> None:
    chance = random.Random(0)
    units: Options = []
    for _ in range(1000):
        weights, spread = chance.choice([2**16, 2**18, 3 * 2**16]), chance.lognormvariate(0, 1)
        widths = (3.0, 3.6, 4.1, 4.7, 5.2, 6.3)
        units.append([(int(weights * bits / 8) + chance.randint(0, 99), spread * 4**-bits) for bits in widths])
    found = select(units, int(1.4 * least_bytes(units)))
    assert found.bytes <= 1.4 * least_bytes(units)
    assert found.bound <= found.error <= found.bound * 1.001


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="the cheapest options take 5 bytes, more than 4"):
        select([[(3, 0.0), (2, 9.0)], [(3, 1.0)]], 4)
