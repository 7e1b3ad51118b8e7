"""Flexible residual: both scales against a brute-force search, and what the second one is good for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.main_quantizer.residual_binary import ResidualBinary
from loraq.strategies.main_quantizer.rtn import Rtn
from torch import Tensor

from loraq.composite_formats import INT1_BINARY, INT2_BINARY
from loraq.rounding import squared_error
from matrices import context, seeded, trained, weights_OI

NAMES = ["int1_binary", "int2_binary", "int3_binary"]


@settings(max_examples=20)
@given(weight=weights_OI(), name=st.sampled_from(NAMES))
def test_no_group_is_worse_than_an_even_grid(weight: Tensor, name: str) -> None:
    quantizer = ResidualBinary(weight=name)
    even = squared_error(weight, quantizer.format.encode(weight, 64))
    assert (squared_error(weight, quantizer.encode(weight, context())) <= even * (1 + 1e-5)).all()


@pytest.mark.parametrize("seed", range(6))
def test_two_bits_come_near_the_best_scales_there_are(seed: int) -> None:
    weight = seeded(1, 24, seed=seed)
    found = squared_error(weight, ResidualBinary(weight=INT1_BINARY).encode(weight, context())).sum()
    scales, residual = torch.meshgrid(torch.linspace(0.1, 4, 60), torch.linspace(0.05, 2, 60), indexing="ij")
    many = weight.expand(3600, -1)
    coded = INT1_BINARY.rounded(many, 64, scales.reshape(-1, 1), residual.reshape(-1, 1))
    assert found <= squared_error(many, coded).min() * 1.1


def test_scales_are_those_of_least_squares_for_their_codes() -> None:
    weight = trained(6, 128, seed=1)
    quantizer = ResidualBinary(weight=INT2_BINARY)
    guess = quantizer.round(weight)
    found = quantizer.round(weight, guess)
    for row in range(6):
        for group in range(2):
            part = slice(64 * group, 64 * group + 64)
            levels = torch.stack([guess.codes[row, part] + 0.5, guess.parts["signs"][row, part] * 2.0 - 1], dim=1)
            expected = torch.linalg.lstsq(levels, weight[row, part].unsqueeze(1)).solution.squeeze(1)
            stored = torch.stack([found.scales[row, group], found.parts["residual_scales"][row, group]])
            assert torch.allclose(stored.float(), expected, rtol=0.01, atol=1e-4)


def test_outliers_on_both_sides_keep_the_middle_fine() -> None:
    weight = seeded(8, 64, seed=2) * 0.1
    weight[:, ::16] = 3.0
    weight[:, 1::16] = -3.0
    flexible = (weight - ResidualBinary(weight="int2_binary").encode(weight, context()).decode()).norm()
    assert flexible < 0.8 * (weight - Rtn(weight="int3").round(weight).decode()).norm()


def test_a_fit_s_loop_follows_the_weight() -> None:
    quantizer, weight = ResidualBinary(), trained(32, 200, seed=3)
    guess = quantizer.round(weight)
    near = quantizer.round(weight * 1.02, guess)
    assert (weight * 1.02 - near.decode()).norm() < 1.02 * (
        weight * 1.02 - quantizer.round(weight * 1.02).decode()
    ).norm()


def test_a_group_that_was_zero_comes_back() -> None:
    quantizer, weight = ResidualBinary(), trained(4, 64, seed=4)
    found = quantizer.round(weight, quantizer.round(torch.zeros(4, 64)))
    assert (weight - found.decode()).norm() < 0.2 * weight.norm()
    assert torch.equal(quantizer.round(torch.zeros(4, 64), found).decode(), torch.zeros(4, 64))


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'weight' must be a format with a binary residual, .* got 'int4'"):
        ResidualBinary(weight="int4")
