"""The rounded input's noise: its variance against simulation, its target against a plain solution, and their laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq.activation import NONE, Activation
from loraq.input_statistics import Gram, InputStatistics, TokenSample
from loraq.noisy_input import NoisyInput, noisy_input, rounding_noise, statistics_for
from matrices import correlated, seeded, trained

INT4 = Activation("int4")


def statistics_of(input: torch.Tensor) -> InputStatistics:
    """The Gram matrix and all tokens of `input` (tokens, inn)."""
    generator = torch.Generator().manual_seed(0)
    kinds = (Gram, TokenSample)
    inn = input.shape[1]
    return InputStatistics(
        {kind: kind.empty(inn, "cpu", sample=len(input)).observed(input, generator) for kind in kinds}
    )


def cost(main: torch.Tensor, weight: torch.Tensor, known: NoisyInput) -> torch.Tensor:
    """The output's squared error, the input's and the noise's part, as the module's docstring begins it."""
    error = (weight - main).double()
    return (error @ known.hessian * error).sum() + (main.double().square() * known.noise).sum()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["int4", "int6", "int8"]), st.sampled_from([1, 7, 64, "token"]), st.integers(1, 130))
def test_noise_is_the_groups_largest_square(format: str, group: int | str, inn: int) -> None:
    tokens, activation = correlated(20, inn), Activation(format, group)
    width = activation.group_for(inn)
    found = rounding_noise(tokens, activation)
    top = 2 ** (activation.format.bits - 1) - 1
    for channel in range(inn):
        first = channel // width * width
        largest = tokens[:, first : first + width].abs().amax(dim=1).double()
        assert float(found[channel]) == pytest.approx(float(largest.square().mean()) / (12 * top**2), rel=1e-6)


@pytest.mark.parametrize("format", ["int6", "int8", "mxint8", "fp8_e4m3", "int8_asymmetric"])
def test_noise_is_what_rounding_does(format: str) -> None:
    tokens = correlated(3000, 128)
    errors = Activation(format).format.encode(tokens, 64).decode() - tokens
    found, seen = rounding_noise(tokens, Activation(format)), errors.double().square().mean(dim=0)
    # Uniform noise is an idealization: channels much smaller than a step are rounded to zero with less.
    assert 0.4 <= float(found.sum() / seen.sum()) <= 2.5


@given(st.integers(0, 1000), st.floats(0.05, 2), st.sampled_from([1e-3, 0.01, 0.1]))
def test_the_target_is_the_least_of_the_cost(seed: int, noise: float, damping: float) -> None:
    """Against an independent solution; and any step away costs what the metric says, no more and no less."""
    weight = trained(5, 24, seed=seed)
    known = noisy_input(statistics_of(correlated(60, 24, seed)), INT4, noise=noise, damping=damping)
    target = known.target(weight)
    expected = torch.linalg.solve(known.hessian + torch.diag(known.noise), known.hessian @ weight.double().T).T
    assert (target - expected).norm() <= 1e-3 * expected.norm()
    step = seeded(5, 24, seed=seed + 1, scale=0.01)
    more = (step.double() @ known.metric * step).sum()
    assert float(cost(target + step, weight, known) - cost(target, weight, known)) == pytest.approx(
        float(more), rel=0.02
    )


def test_the_cost_is_that_of_the_noisy_product() -> None:
    """Drawn noise of that variance does to the output what the formula says."""
    weight, input = trained(16, 64), correlated(20000, 64)
    main = weight * 0.97
    known = noisy_input(statistics_of(input), INT4, noise=1, damping=0)
    unit = float(statistics_of(input)[Gram].mean.diagonal().mean())
    drawn = seeded(*input.shape, seed=3) * (known.noise * unit).sqrt().float()
    seen = ((input + drawn) @ main.T - input @ weight.T).double().square().sum(dim=1).mean()
    assert float(seen) == pytest.approx(float(cost(main, weight, known)) * unit, rel=0.03)


def test_no_rounding_is_no_noise_and_leaves_the_weight_as_it_is() -> None:
    weight, statistics = trained(8, 32), statistics_of(correlated(50, 32))
    assert not rounding_noise(correlated(5, 12), NONE).any()
    silent = noisy_input(statistics, NONE, noise=1, damping=0.01)
    assert torch.equal(silent.target(weight), weight)
    assert torch.equal(silent.metric, noisy_input(statistics, INT4, noise=0, damping=0.01).metric)
    assert statistics_for(0) == {Gram}
    assert statistics_for(0.5) == {Gram, TokenSample}


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("damping", [0, 1e-9, 0.1])
def test_few_tokens_and_zeros_give_finite_targets(tokens: int, damping: float) -> None:
    weight = trained(8, 40)
    for input in (correlated(tokens, 40), torch.zeros(tokens, 40)):
        known = noisy_input(statistics_of(input), INT4, noise=1, damping=damping)
        assert torch.isfinite(known.target(weight)).all()
        if not input.any():
            assert torch.equal(known.target(weight), weight)


@given(st.integers(-20, 20))
def test_the_input_s_unit_does_not_matter(power: int) -> None:
    weight, input = trained(8, 40), correlated(50, 40)
    inputs = (input, input * 2.0**power)
    found = [noisy_input(statistics_of(each), INT4, noise=1, damping=0.1).target(weight) for each in inputs]
    assert torch.allclose(*found, rtol=1e-5, atol=1e-7)
