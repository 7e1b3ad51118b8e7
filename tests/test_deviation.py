"""The output error of a difference of weights: in float32, yet with the digits and the range of float64."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraq import error_feedback, formats, rounding
from loraq.factors import deviation
from loraq.input_statistics import Gram, InputStatistics
from loraq.layer import LayerContext
from matrices import context, correlated, seeded, trained, weights_OI


def knowing(gram: Tensor) -> LayerContext:
    """A context that knows this Gram matrix (inn, inn)."""
    statistics = InputStatistics({Gram: Gram(gram, torch.ones((), dtype=torch.float64))})
    return attrs.evolve(context(), statistics=statistics)


def reference(difference: Tensor, gram: Tensor) -> float:
    """In float64 throughout."""
    values = difference.double()
    return math.sqrt(max(0.0, float((values @ gram.double() * values).sum())))


@pytest.mark.parametrize("spike", [0, 1, 10, 100])
@pytest.mark.parametrize("tokens", [30, 600])
@pytest.mark.parametrize("damping", [1e-6, 0.01])
@pytest.mark.parametrize("seed", [0, 1])
def test_errors_that_feedback_moved_out_of_the_input_keep_five_digits(
    spike: int, tokens: int, damping: float, seed: int
) -> None:
    """The hardest case: a mean far above everything else, and codes chosen to avoid it."""
    weight, inn = trained(48, 192, seed=seed), 192
    input = correlated(tokens, inn, seed) + spike * seeded(tokens, 1, seed=seed + 2) * seeded(1, inn, seed=seed + 3)
    gram = input.T @ input / tokens
    grid = rounding.searched(weight, formats.named("int4"), 64)
    coded = error_feedback.rounded(weight, grid, gram, damping=damping, act_order=True)
    difference = weight - coded.decode()
    assert deviation(difference, knowing(gram)) == pytest.approx(reference(difference, gram), rel=1e-5)


@given(weights_OI(largest=60), st.integers(-30, 30))
def test_no_unit_of_weight_or_input_loses_digits(weight: Tensor, power: int) -> None:
    input = correlated(80, weight.shape[1]) * 2.0**power
    gram = input.T @ input
    assert deviation(weight, knowing(gram)) == pytest.approx(reference(weight, gram), rel=1e-5)
    assert deviation(weight) == pytest.approx(float(weight.double().norm()), rel=1e-6)


def test_of_zeros_it_is_zero() -> None:
    zeros, gram = torch.zeros(4, 6), torch.eye(6)
    assert deviation(zeros, knowing(gram)) == deviation(torch.ones(4, 6), knowing(gram * 0)) == deviation(zeros) == 0
    blind = torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0]))
    assert deviation(torch.cat([torch.zeros(4, 1), torch.ones(4, 5)], dim=1), knowing(blind)) == 0
