"""L2QER's branch, against the same by its definition, with the scale inverted."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.branch_quantizer.none import SixteenBit
from loraq.strategies.branch_quantizer.rtn import Rtn as BranchRtn
from loraq.strategies.low_rank.error_svd import ErrorSvd
from loraq.strategies.low_rank.scaled_error_svd import ScaledErrorSvd
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import factors
from loraq.errors import LoraqError
from loraq.input_statistics import ChannelMeans, InputStatistics
from loraq.layer import LayerContext
from matrices import calibrated_context, context, seeded, trained

MAIN = Rtn()


def with_means(means: torch.Tensor) -> LayerContext:
    """A context that knows the mean magnitudes alone."""
    known = ChannelMeans(means.double(), torch.tensor(1.0, dtype=torch.float64))
    return attrs.evolve(context(), statistics=InputStatistics({ChannelMeans: known}))


def test_it_is_the_svd_of_the_scaled_error_with_the_scale_undone() -> None:
    weight, means = trained(96, 130, seed=2), seeded(130, seed=3).exp()
    fit = ScaledErrorSvd().fit(weight, MAIN, SixteenBit(), 12, with_means(means))
    alone = MAIN.encode(weight, context())
    left, values, right = torch.linalg.svd((weight - alone.decode()).double() * means)
    expected = (left[:, :12] * values[:12]) @ right[:12] / means
    assert torch.equal(fit.main.codes, alone.codes)
    assert fit.up is not None
    assert fit.down is not None
    found = fit.up.decode() @ fit.down.decode()
    assert (found - expected).norm() <= 5e-3 * expected.norm()  # both factors are rounded to bfloat16


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.floats(-30, 30))
def test_the_scales_unit_does_not_matter(seed: int, exponent: float) -> None:
    weight, means = trained(20, 70, seed=seed), seeded(70, seed=seed).abs()
    scaled = (means, means * 2**exponent)
    fits = [ScaledErrorSvd().fit(weight, MAIN, SixteenBit(), 5, with_means(each)) for each in scaled]
    assert (fits[0].decode() - fits[1].decode()).norm() <= 1e-3 * weight.norm()


def test_channels_without_input_do_no_harm() -> None:
    weight, means = trained(40, 64, seed=1), seeded(64, seed=1).abs()
    means[::3] = 0
    known = with_means(means)
    fit = ScaledErrorSvd().fit(weight, MAIN, SixteenBit(), 8, known)
    assert torch.isfinite(fit.decode()).all()
    alone = weight - MAIN.encode(weight, known).decode()
    assert (weight - fit.decode()).square().sum(dim=0).max() <= alone.square().sum(dim=0).max() * 1.01
    nothing = ScaledErrorSvd().fit(weight, MAIN, BranchRtn(), 8, with_means(torch.zeros(64)))
    assert torch.equal(nothing.decode(), MAIN.encode(weight, known).decode())


def test_it_beats_the_unscaled_branch_where_inputs_differ() -> None:
    weight, known = trained(96, 128, seed=2), calibrated_context(128)
    scaled, plain = (
        factors.error(weight, strategy.fit(weight, MAIN, SixteenBit(), 16, known), known)
        for strategy in (ScaledErrorSvd(), ErrorSvd())
    )
    assert scaled < 0.98 * plain


def test_it_says_what_it_misses() -> None:
    with pytest.raises(LoraqError, match="ChannelMeans was not collected"):
        ScaledErrorSvd().fit(trained(8, 8), MAIN, SixteenBit(), 2, context())
