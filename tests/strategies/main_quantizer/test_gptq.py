"""GPTQ as a main quantizer: its options, the statistics it asks for, and what it gains on a correlated input."""

from __future__ import annotations

import attrs
import pytest
import torch
from loraq.strategies.main_quantizer.gptq import Gptq
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import error_feedback, formats, registry
from loraq.contracts import AbstractQuantizer
from loraq.errors import LoraqError, ModelError
from loraq.factors import deviation
from loraq.input_statistics import Gram, InputStatistics, TokenSample
from loraq.pipeline import bind, make_stage, quantize_layer
from matrices import calibrated_context, context, correlated, trained

WEIGHT = trained(48, 130, seed=1)
KNOWN = calibrated_context(130)
SCALED = [name for name in registry.names("loraq.format") if name != "bfloat16"]


def output_error(quantizer: AbstractQuantizer) -> float:
    return deviation(WEIGHT - quantizer.encode(WEIGHT, KNOWN).decode(), KNOWN)


def test_defaults() -> None:
    quantizer = Gptq()
    assert (quantizer.format, str(quantizer.activation), quantizer.group) == (formats.INT4, "int4", 64)
    assert (quantizer.scale, quantizer.damping, quantizer.act_order, quantizer.block) == ("search", 0.01, True, 128)
    assert (quantizer.noise, quantizer.statistics) == (0, {Gram})


@pytest.mark.parametrize(
    "options",
    [{"damping": -0.1}, {"noise": -1}, {"block": 0}, {"group": 0}, {"scale": "best"}, {"weight": "bfloat16"}],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Gptq(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCALED)
def test_it_rounds_inside_a_fit_as_rtn_does(name: str) -> None:
    found, expected = Gptq(weight=name).round(WEIGHT), Rtn(weight=name).round(WEIGHT)
    assert all(torch.equal(found.parts[part], tensor) for part, tensor in expected.parts.items())


@pytest.mark.parametrize("name", SCALED)
def test_the_output_is_nearer_than_rtn_s(name: str) -> None:
    assert output_error(Gptq(weight=name)) < 0.8 * output_error(Rtn(weight=name))


def test_final_codes_come_from_error_feedback_on_rtn_s_scales() -> None:
    quantizer = Gptq(weight="int3", group=32, scale="amax", damping=0.1, act_order=False, block=16)
    grid = Rtn(weight="int3", group=32, scale="amax").round(WEIGHT)
    gram = KNOWN.statistics[Gram].mean
    expected = error_feedback.rounded(WEIGHT, grid, gram, damping=0.1, act_order=False, block=16)
    found = quantizer.encode(WEIGHT, KNOWN)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, grid.scales)


def test_falling_order_helps() -> None:
    assert output_error(Gptq()) < output_error(Gptq(act_order=False))


def test_more_damping_is_nearer_to_rounding() -> None:
    errors = [
        float((WEIGHT - Gptq(damping=damping).encode(WEIGHT, KNOWN).decode()).norm()) for damping in (0.01, 1, 1e6)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == float((WEIGHT - Rtn().encode(WEIGHT, KNOWN).decode()).norm())


def test_without_statistics_it_says_what_is_missing() -> None:
    with pytest.raises(LoraqError, match=r"Gram was not collected.*calibration"):
        Gptq().encode(WEIGHT, context())
    with pytest.raises(ModelError, match=r"Gram.*\[calibration\]"):
        quantize_layer("layer", WEIGHT, bind([make_stage("main_quantizer", "gptq")]), seed=0)


def test_a_fit_with_it_ends_nearer_to_the_output() -> None:
    recipes = [
        bind(
            [
                make_stage("main_quantizer", main),
                make_stage("low_rank", "svd", rank=8),
                make_stage("branch_quantizer", "rtn"),
            ]
        )
        for main in ("gptq", "rtn")
    ]
    assert [recipe.statistics for recipe in recipes] == [{Gram}, set()]
    errors = [
        quantize_layer("layer", WEIGHT, recipe, seed=0, statistics=KNOWN.statistics).record.output_error_after
        for recipe in recipes
    ]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < errors[1]


def test_with_noise_a_rounded_input_s_output_is_nearer() -> None:
    """Of the tokens rounded as at run time, though not of the tokens as they are."""
    tokens = correlated(2000, 130, seed=0)
    errors: dict[float, tuple[float, float]] = {}
    for noise in (0, 1):
        quantizer = Gptq(noise=noise, damping=0.01, activation="int4")
        main = quantizer.encode(WEIGHT, KNOWN).decode()
        rounded = quantizer.activation.format.encode(tokens, 64).decode()
        errors[noise] = (float((rounded @ main.T - tokens @ WEIGHT.T).norm()), deviation(WEIGHT - main, KNOWN))
    assert errors[1][0] < 0.97 * errors[0][0]
    assert errors[1][1] > errors[0][1]


def test_noise_asks_for_tokens_and_is_none_where_the_input_is_not_rounded() -> None:
    assert Gptq(noise=0.5).statistics == {Gram, TokenSample}
    with pytest.raises(LoraqError, match=r"TokenSample was not collected"):
        Gptq(noise=1).encode(WEIGHT, attrs.evolve(KNOWN, statistics=InputStatistics({Gram: KNOWN.statistics[Gram]})))
    silent = [Gptq(noise=noise, activation="none").encode(WEIGHT, KNOWN).decode() for noise in (0, 1)]
    assert torch.equal(*silent)
