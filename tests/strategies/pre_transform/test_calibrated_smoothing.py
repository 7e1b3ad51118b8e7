"""Calibrated smoothing: SmoothQuant's rule, its search, and the closed form, each against its formula."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.main_quantizer.rtn import Rtn
from loraq.strategies.pre_transform.channel_scales import AbstractChannelScales
from loraq.strategies.pre_transform.hadamard import Hadamard
from loraq.strategies.pre_transform.smooth_calibrated import SmoothCalibrated
from loraq.strategies.pre_transform.smooth_closed_form import SmoothClosedForm

from loraq import factors, ops
from loraq.activation import Activation
from loraq.errors import LoraqError
from loraq.input_statistics import ChannelMaxima, Gram, InputStatistics, TokenSample
from loraq.layer import LayerContext
from loraq.pipeline import bind, make_stage, quantize_layer
from matrices import calibrated_context, context, correlated, seeded, trained


def knowing(input: torch.Tensor) -> LayerContext:
    """A context that knows all of `input` (tokens, inn)."""
    generator = torch.Generator().manual_seed(0)
    kinds = (Gram, ChannelMaxima, TokenSample)
    found = {kind: kind.empty(input.shape[1], "cpu", sample=len(input)).observed(input, generator) for kind in kinds}
    return attrs.evolve(context(), statistics=InputStatistics(found))


def outlying(tokens: int, inn: int, seed: int = 0) -> torch.Tensor:
    """An input with two channels fifty times as large as the others, as transformers have them."""
    input = seeded(tokens, inn, seed=seed)
    input[:, [3, inn // 2]] *= 50
    return input


def scales_of(strategy: AbstractChannelScales, weight: torch.Tensor, known: LayerContext) -> torch.Tensor:
    return strategy.prepare(weight, known)["scales"].double()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_a_given_alpha_is_smoothquants_rule(alpha: float) -> None:
    weight, input = trained(40, 64), outlying(100, 64)
    found = scales_of(SmoothCalibrated(alpha=alpha), weight, knowing(input))
    wanted = input.abs().amax(dim=0).double() ** alpha / weight.abs().amax(dim=0).double() ** (1 - alpha)
    wanted = wanted / wanted.log().mean().exp()
    assert torch.allclose(found, wanted, rtol=2**-8)  # bfloat16
    assert SmoothCalibrated(alpha=alpha).statistics == {ChannelMaxima}


@pytest.mark.parametrize("power", [1.0, 2.0, 8.0])
def test_the_closed_form(power: float) -> None:
    weight, input = trained(40, 64), outlying(100, 64)
    found = scales_of(SmoothClosedForm(power=power), weight, knowing(input))
    squares = input.double().square().mean(dim=0)
    wanted = (squares / weight.double().abs().pow(power).sum(dim=0)) ** (1 / (power + 2))
    wanted = wanted / wanted.log().mean().exp()
    assert torch.allclose(found, wanted, rtol=2**-7)


def test_the_closed_form_of_what_a_branch_leaves() -> None:
    weight, known = trained(40, 64), knowing(outlying(100, 64))
    up, down = factors.truncated_svd(weight, 5)
    found = scales_of(SmoothClosedForm(rank=5), weight, known)
    assert torch.equal(found, scales_of(SmoothClosedForm(), weight - up @ down, known))
    assert not torch.equal(found, scales_of(SmoothClosedForm(), weight, known))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 80), st.sampled_from([1e-25, 1.0, 1e25]))
def test_units_do_not_matter_and_the_mean_is_one(seed: int, inn: int, unit: float) -> None:
    weight, input = seeded(9, inn, seed=seed), correlated(30, inn, seed)
    for strategy in (SmoothCalibrated(alpha=0.5), SmoothClosedForm(), SmoothClosedForm(power=8.0)):
        found = scales_of(strategy, weight, knowing(input))
        assert abs(float(found.log2().mean())) < 2**-7
        assert torch.allclose(scales_of(strategy, weight * unit, knowing(input)), found, rtol=2**-6)
        if unit > 1e-20:  # smaller squares leave float32
            assert torch.allclose(scales_of(strategy, weight, knowing(input / unit**0.5)), found, rtol=2**-6)


@pytest.mark.parametrize("strategy", [SmoothCalibrated(), SmoothCalibrated(alpha=0.4), SmoothClosedForm()], ids=str)
def test_channels_of_zeros_stay_as_they_are(strategy: Any) -> None:
    weight, input = trained(24, 64), outlying(50, 64)
    weight[:, 7] = 0
    input[:, 9] = 0
    found = scales_of(strategy, weight, knowing(input))
    assert found[7] == found[9] == 1
    for nothing in (knowing(input * 0), knowing(input[:0])):
        assert torch.equal(scales_of(strategy, weight, nothing), torch.ones(64, dtype=torch.float64))
    assert torch.equal(scales_of(strategy, weight * 0, knowing(input)), torch.ones(64, dtype=torch.float64))


def test_the_search_takes_the_least_output_error() -> None:
    """Against every alpha's error by way of the packed layer's own arithmetic, and against no smoothing."""
    weight, input = trained(40, 128), outlying(100, 128)
    known, main = knowing(input), Rtn()
    tokens = known.statistics[TokenSample].tokens

    def error(strategy: AbstractChannelScales | None) -> float:
        online = {} if strategy is None else strategy.prepare(weight, known)
        smoothed = weight if strategy is None else strategy.weight(weight, online)
        moved = tokens if strategy is None else strategy.input(tokens, online)
        rounded = ops.quantize_activation(moved, main.activation)
        return float((ops.product(rounded, main.round(smoothed)) - tokens @ weight.T).norm())

    each = {alpha: error(SmoothCalibrated(alpha=alpha)) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)}
    found = error(SmoothCalibrated())
    assert found <= min(*each.values(), error(None)) * (1 + 1e-5)
    assert found < 0.9 * error(None)


def test_the_search_follows_the_trials_formats() -> None:
    """With the input in 16 bits only the weight is rounded, so that hardly anything of the input moves into it."""
    weight, known = trained(40, 128), knowing(outlying(100, 128))
    both = scales_of(SmoothCalibrated(), weight, known)
    alone = scales_of(SmoothCalibrated(trial_activation="none"), weight, known)
    assert float(alone.log().std()) < float(both.log().std())
    assert SmoothCalibrated(trial_activation="int8").trial_activation == Activation("int8")


def test_after_a_rotation_the_statistics_are_the_rotated_inputs() -> None:
    weight, input = trained(40, 128), outlying(100, 128)
    known = knowing(input)
    stages = [
        make_stage("pre_transform", "hadamard"),
        make_stage("pre_transform", "smooth_closed_form"),
        make_stage("main_quantizer", "rtn"),
    ]
    layer = quantize_layer("layer", weight, bind(stages), seed=0, statistics=known.statistics)
    rotate = Hadamard()
    expected = SmoothClosedForm().prepare(rotate.weight(weight, {}), knowing(rotate.input(input, {})))["scales"]
    found = layer.tensors["transform.1.scales"].view(torch.bfloat16)
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7)


def test_they_say_what_they_miss() -> None:
    for strategy in (SmoothCalibrated(), SmoothClosedForm()):
        with pytest.raises(LoraqError, match="was not collected"):
            strategy.prepare(trained(8, 8), context())


@pytest.mark.parametrize("alpha", ["much", -0.1, 1.5, True, None])
def test_alpha_is_checked(alpha: object) -> None:
    with pytest.raises(ValueError, match="'alpha' must be a number from 0 to 1 or 'search'"):
        SmoothCalibrated(alpha=alpha)  # type: ignore[arg-type]


def test_a_recipes_options() -> None:
    stage: Any = make_stage("pre_transform", "smooth_calibrated", alpha=1, trial_activation="int8")
    assert stage.strategy == SmoothCalibrated(alpha=1.0, trial_activation="int8")
    assert calibrated_context(8).statistics.get(ChannelMaxima) is not None
