"""Rotation and smoothing: against plain matrices, and over the layer shapes of real models."""

from __future__ import annotations

import pytest
import torch
from loraq.strategies.pre_transform.hadamard import Hadamard
from loraq.strategies.pre_transform.smooth import Smooth

from matrices import context, seeded, trained

REAL = [(1152, 1152), (4608, 1152), (1152, 4608), (2240, 2240), (64, 5600), (3072, 3072), (768, 3072)]
"""(out, inn) of PixArt-Sigma, SANA and FLUX layers."""


def sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@pytest.mark.parametrize(("inn", "block"), [(128, 128), (1152, 128), (2240, 64), (5600, 32), (7, 1), (6, 2)])
def test_hadamard_is_the_block_diagonal_matrix(inn: int, block: int) -> None:
    rotation = torch.block_diag(*[sylvester(block)] * (inn // block))
    weight = seeded(5, inn)
    found = Hadamard(largest_block=128).weight(weight, {})
    assert torch.allclose(found, weight @ rotation, atol=1e-5)


def test_hadamard_is_its_own_inverse() -> None:
    weight = seeded(5, 640)
    rotate = Hadamard()
    assert torch.allclose(rotate.weight(rotate.weight(weight, {}), {}), weight, atol=1e-5)


@pytest.mark.parametrize("transform", [Hadamard(), Smooth(), Smooth(strength=1.0)], ids=str)
@pytest.mark.parametrize(("out", "inn"), REAL)
def test_real_layers_keep_their_function(transform: Hadamard | Smooth, out: int, inn: int) -> None:
    weight, input = seeded(out, inn, seed=1, scale=0.02), seeded(4, inn, seed=2)
    online = transform.prepare(weight, context())
    found = transform.input(input, online) @ transform.weight(weight, online).T
    expected = input.double() @ weight.double().T
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_smoothing_evens_out_channels_and_stores_powers_of_two() -> None:
    weight = trained(40, 64)
    weight[:, 3] *= 100
    online = Smooth(strength=1.0).prepare(weight, context())
    even = Smooth(strength=1.0).weight(weight, online).abs().amax(dim=0)
    assert even.max() / even.min() < 2.1
    assert torch.equal(torch.log2(online["scales"].float()).round().exp2(), online["scales"].float())


def test_smoothing_leaves_channels_of_zeros() -> None:
    weight = seeded(4, 6)
    weight[:, 2] = 0
    assert Smooth().prepare(weight, context())["scales"][2] == 1
    assert torch.equal(Smooth().prepare(torch.zeros(4, 6), context())["scales"].float(), torch.ones(6))


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Hadamard(largest_block=96)
    with pytest.raises(ValueError, match="strength"):
        Smooth(strength=1.5)
