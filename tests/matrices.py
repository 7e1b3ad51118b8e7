"""Matrices for tests, named by their axes: hypothesis strategies and a few plain makers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from loraq.input_statistics import ChannelMaxima, ChannelMeans, Gram, InputStatistics, TokenSample
from loraq.layer import LayerContext
from loraq.pipeline import layer_generator


def seeded(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A normal matrix of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def trained(out: int, inn: int, seed: int = 0) -> Tensor:
    """A weight that looks trained: a decaying spectrum, and a few large input channels."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(out, inn)
    left = torch.linalg.qr(torch.randn(out, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(inn, rank, generator=generator)).Q
    spectrum = 1 / (1 + torch.arange(rank)) ** 0.6
    weight = left * spectrum @ right.T
    weight[:, torch.randperm(inn, generator=generator)[: max(1, inn // 50)]] *= 4
    return weight * 0.5


def context(name: str = "layer", seed: int = 0) -> LayerContext:
    """A layer context with its generator."""
    return LayerContext(name, layer_generator(seed, name))


def correlated(tokens: int, inn: int, seed: int = 0) -> Tensor:
    """An input (tokens, inn) that looks real: correlated channels, some much larger than others, one always 0."""
    mixing = seeded(inn, inn, seed=seed + 1) / inn**0.5 + torch.eye(inn) / 2
    input = seeded(tokens, inn, seed=seed) @ (mixing * torch.logspace(0, -1.5, inn).unsqueeze(1)) + 0.1
    input[:, 1 :: max(2, inn // 4)] *= 5
    if inn > 3:
        input[:, 2] = 0
    return input


def calibrated_context(inn: int, seed: int = 0, tokens: int = 256) -> LayerContext:
    """A layer context that knows all usual statistics of a `correlated` input (tokens, inn)."""
    input = correlated(tokens, inn, seed)
    generator = torch.Generator().manual_seed(seed)
    kinds = (Gram, ChannelMaxima, ChannelMeans, TokenSample)
    found = {kind: kind.empty(inn, "cpu", sample=64).observed(input, generator) for kind in kinds}
    return LayerContext("layer", layer_generator(seed, "layer"), InputStatistics(found))


@st.composite
def weights_OI(draw: st.DrawFn, largest: int = 140) -> Tensor:
    """Weights (out, inn) of odd shapes: normal, heavy-tailed, with rows of zeros, very large or very small."""
    out, inn = draw(st.integers(1, 24)), draw(st.integers(1, largest))
    weight = seeded(out, inn, seed=draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        weight = weight**3
    if draw(st.booleans()):
        weight[draw(st.integers(0, out - 1))] = 0
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, inn - 1))] *= 50
    return weight * 2.0 ** draw(st.integers(-40, 40))


groups = st.sampled_from([1, 3, 32, 64, 1000])
