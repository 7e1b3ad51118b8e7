"""Rounding with error feedback, against GPTQ as the paper has it: weights and inverse updated column by column."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraq import error_feedback, formats, registry, rounding
from loraq.factors import deviation
from loraq.layer import Coded
from matrices import calibrated_context, correlated, seeded, trained, weights_OI

SCALED = [name for name in registry.names("loraq.format") if name != "bfloat16"]


def gram_of(inn: int, seed: int = 0, tokens: int = 400) -> Tensor:
    input = correlated(tokens, inn, seed)
    return input.T @ input / tokens


def grid_of(weight: Tensor, name: str, group: int = 32) -> Coded:
    format = formats.named(name)
    return rounding.searched(weight, format, format.block or group)


def optimal_brain_quantizer(weight: Tensor, grid: Coded, gram: Tensor, damping: float, act_order: bool) -> Tensor:
    """GPTQ column by column, with no factorisation: round, update what is left, remove the column from the inverse."""
    values, points = weight.double().clone(), grid.format.points(grid).double()
    hessian = gram.double().clone()
    mean = hessian.diagonal().mean()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = mean
    hessian.diagonal().add_(damping * mean)
    order = list(range(weight.shape[1]))
    if act_order:
        order.sort(key=lambda column: -float(gram[column, column]))
    inverse = torch.linalg.inv(hessian)
    found = torch.zeros_like(values)
    for place, column in enumerate(order):
        choices = points[:, column // grid.group]
        best = (values[:, column : column + 1] - choices).abs().argmin(dim=1, keepdim=True)
        found[:, column] = choices.gather(1, best).squeeze(1)
        error = (values[:, column] - found[:, column]) / inverse[column, column]
        rest = order[place + 1 :]
        values[:, rest] -= error.unsqueeze(1) * inverse[column, rest]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return found.float()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "name", ["int4", "int3", "int4_asymmetric", "int4_offset", "mxfp4", "int3_mixed", "int3_binary"]
)
def test_it_is_optimal_brain_quantization(name: str, act_order: bool) -> None:
    weight, gram = trained(12, 80, seed=1), gram_of(80)
    grid = grid_of(weight, name)
    coded = error_feedback.rounded(weight, grid, gram, damping=0.01, act_order=act_order, block=24)
    assert torch.equal(coded.decode(), optimal_brain_quantizer(weight, grid, gram, 0.01, act_order))


def test_blocks_are_speed_alone() -> None:
    weight, gram = trained(12, 80, seed=2), gram_of(80)
    grid = grid_of(weight, "int4")
    codes = [
        error_feedback.rounded(weight, grid, gram, damping=0.01, act_order=True, block=block).codes
        for block in (1, 7, 32, 1000)
    ]
    assert all(torch.equal(codes[0], each) for each in codes[1:])


@pytest.mark.parametrize("name", SCALED)
def test_the_output_error_falls_and_scales_stay(name: str) -> None:
    weight, context = trained(24, 130, seed=3), calibrated_context(130)
    grid, gram = grid_of(weight, name, 64), gram_of(130, tokens=256)
    coded = error_feedback.rounded(weight, grid, gram, damping=0.01, act_order=True)
    assert deviation(weight - coded.decode(), context) < 0.8 * deviation(weight - grid.decode(), context)
    assert torch.equal(coded.format.points(coded), grid.format.points(grid))


@given(weight=weights_OI(largest=60), name=st.sampled_from(SCALED), damping=st.sampled_from([0.0, 0.01, 1.0]))
def test_without_correlations_it_is_rounding_to_nearest(weight: Tensor, name: str, damping: float) -> None:
    grid = grid_of(weight, name)
    nearest = formats.recoded(weight, grid).decode()
    sizes = seeded(weight.shape[1], seed=1).square()
    for gram in (torch.zeros(len(sizes), len(sizes)), torch.diag(sizes)):
        coded = error_feedback.rounded(weight, grid, gram, damping=damping, act_order=True)
        assert torch.equal(coded.decode(), nearest)


@given(
    weight=weights_OI(largest=60),
    tokens=st.integers(1, 8),
    damping=st.sampled_from([0.0, 1e-6, 0.01]),
    order=st.booleans(),
)
def test_singular_gram_matrices_give_finite_codes(weight: Tensor, tokens: int, damping: float, order: bool) -> None:
    gram = gram_of(weight.shape[1], tokens=tokens)
    grid = grid_of(weight, "int4")
    coded = error_feedback.rounded(weight, grid, gram, damping=damping, act_order=order, block=16)
    assert torch.isfinite(error_feedback.feedback(gram, damping)).all()
    assert torch.equal(coded.scales, grid.scales)


def test_channels_without_input_are_rounded_to_nearest() -> None:
    weight, gram = trained(8, 64, seed=4), gram_of(64)
    dead = gram.diagonal() == 0
    assert dead.any()
    grid = grid_of(weight, "int3")
    coded = error_feedback.rounded(weight, grid, gram, damping=0.01, act_order=False)
    assert torch.equal(coded.decode()[:, dead], formats.recoded(weight, grid).decode()[:, dead])


@given(power=st.integers(-30, 30), order=st.booleans())
def test_the_input_s_unit_does_not_matter(power: int, order: bool) -> None:
    weight, gram = trained(8, 40, seed=5), gram_of(40)
    grid = grid_of(weight, "int4")
    plain = error_feedback.rounded(weight, grid, gram, damping=0.01, act_order=order)
    scaled = error_feedback.rounded(weight, grid, gram * 2.0**power, damping=0.01, act_order=order)
    assert torch.equal(plain.codes, scaled.codes)


def test_the_feedback_factors_the_damped_gram_matrix() -> None:
    gram = gram_of(30)
    upper = error_feedback.feedback(gram, 0.1).double() + torch.eye(30)
    mean = gram.double().diagonal().mean()
    damped = gram.double() + torch.diag((gram.diagonal() == 0) * mean) + torch.eye(30) * 0.1 * mean
    inverse = torch.linalg.inv(upper)
    diagonal = inverse @ damped @ inverse.T
    off = diagonal - torch.diag(diagonal.diagonal())
    assert off.abs().max() < 1e-5 * diagonal.diagonal().max()
    assert torch.equal(upper.tril(-1), torch.zeros(30, 30, dtype=torch.float64))
