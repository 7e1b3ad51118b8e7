"""Rotation and data-free smoothing against plain matrices; every transform over the layer shapes of real models."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.packing.rows import Rows
from loraq.strategies.pre_transform.hadamard import Hadamard
from loraq.strategies.pre_transform.smooth import Smooth

from loraq import registry
from loraq.contracts import AbstractPreTransform
from loraq.input_statistics import ChannelMaxima, ChannelMeans, Gram, InputStatistics, TokenSample
from loraq.match import linear_weight
from matrices import context, seeded, trained

ROWS = 48
"""So many rows of a weight stand for all: a transform treats rows alike."""
MODELS: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": {"num_layers": 1, "cross_attention_dim": 1152, "caption_channels": 4096},
    "SanaTransformer2DModel": {"num_layers": 1},
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
}
"""PixArt-Sigma, SANA-1.6B and FLUX.1-dev as their configs have them, but for the number of equal blocks."""
TRANSFORMS = {name: registry.load("loraq.pre_transform", name)() for name in registry.names("loraq.pre_transform")}
TRANSFORMS |= {"hadamard with signs": Hadamard(signs=True), "smooth fully": Smooth(strength=1.0)}


@functools.cache
def shapes(class_name: str) -> tuple[tuple[int, int], ...]:
    """(out, inn) of every distinct linear layer of a model class, from the class itself on the meta device."""
    with init_empty_weights():
        model = getattr(diffusers, class_name)(**MODELS[class_name])
    weights = (linear_weight(module) for module in model.modules())
    return tuple(sorted({tuple(weight.shape) for weight in weights if weight is not None}))


@functools.cache
def input_and_statistics(inn: int) -> tuple[torch.Tensor, InputStatistics]:
    """An input (12, inn) with a few large channels and one of zeros, and what calibration says of it."""
    input = seeded(12, inn, seed=2)
    input[:, :: inn // 4 + 1] *= 60
    input[:, 1 % inn] = 0
    generator = torch.Generator().manual_seed(0)
    kinds = (ChannelMaxima, ChannelMeans, TokenSample)
    found: dict[Any, Any] = {kind: kind.empty(inn, "cpu", sample=12).observed(input, generator) for kind in kinds}
    # The transforms read its diagonal alone; FLUX's widest Gram matrix would take a gigabyte.
    squares = input.square().sum(dim=0)
    found[Gram] = Gram(squares.expand(inn, inn), torch.tensor(12.0, dtype=torch.float64))
    return input, InputStatistics(found)


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


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1000))
def test_signs_are_a_diagonal_matrix_before_the_rotation(inn: int, seed: int) -> None:
    transform, weight = Hadamard(signs=True), seeded(5, inn, seed=seed)
    online = transform.prepare(weight, context(seed=seed))
    signs = 1.0 - 2.0 * online["signs"]
    assert set(signs.tolist()) <= {-1.0, 1.0}
    assert torch.equal(transform.weight(weight, online), Hadamard().weight(weight * signs, {}))
    assert torch.equal(transform.input(weight, online), transform.weight(weight, online))


def test_signs_are_drawn_by_the_layers_generator_and_stored_in_a_bit_each() -> None:
    transform, weight = Hadamard(signs=True), seeded(5, 1152)
    online = transform.prepare(weight, context(seed=1))
    assert torch.equal(online["signs"], transform.prepare(weight, context(seed=1))["signs"])
    assert not torch.equal(online["signs"], transform.prepare(weight, context(seed=2))["signs"])
    assert 0.4 < float(online["signs"].float().mean()) < 0.6
    part = transform.parts(1152)["signs"]
    assert Rows().stored(part).bytes == 144
    assert torch.equal(Rows().unpack(Rows().pack(online["signs"], part), part), online["signs"])
    assert Hadamard().parts(1152) == {}


def test_the_models_have_the_shapes_of_their_papers() -> None:
    assert {(1152, 1152), (4608, 1152), (1152, 4608)} <= set(shapes("PixArtTransformer2DModel"))
    assert {(2240, 2240), (11200, 2240), (2240, 5600)} <= set(shapes("SanaTransformer2DModel"))
    assert {(3072, 3072), (12288, 3072), (3072, 15360), (18432, 3072)} <= set(shapes("FluxTransformer2DModel"))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("class_name", MODELS)
def test_real_layers_keep_their_function(name: str, class_name: str) -> None:
    """On every distinct layer of every model, alone and after a rotation: unchanged but for float32's rounding."""
    transform: AbstractPreTransform = TRANSFORMS[name]
    for out, inn in shapes(class_name):
        weight = seeded(min(out, ROWS), inn, seed=1, scale=0.02)
        input, statistics = input_and_statistics(inn)
        known = attrs.evolve(context(), statistics=statistics)
        online = transform.prepare(weight, known)
        found = transform.input(input, online).double() @ transform.weight(weight, online).double().T
        expected = input.double() @ weight.double().T
        # What float32 may lose is relative to the sum of magnitudes, not to what cancellation leaves of it.
        size = input.double().square().sum(dim=1, keepdim=True).sqrt() * weight.double().norm(dim=1)
        assert ((found - expected).abs() <= 1e-5 * size).all(), (out, inn)


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
