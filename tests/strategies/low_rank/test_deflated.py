"""H-SVDQuant's fit: its formulas against plain ones, its noise against simulation, and what its rounding gains."""

from __future__ import annotations

import attrs
import pytest
import torch
from loraq.strategies.branch_quantizer.none import SixteenBit
from loraq.strategies.branch_quantizer.rtn import Rtn as BranchRtn
from loraq.strategies.low_rank.deflated import Deflated
from loraq.strategies.low_rank.qera import Qera
from loraq.strategies.low_rank.svd import Svd
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import factors
from loraq.errors import InputError
from loraq.input_statistics import Gram, InputStatistics, TokenSample
from loraq.layer import LayerContext
from loraq.noisy_input import rounding_noise
from loraq.pipeline import bind, make_stage
from matrices import calibrated_context, context, correlated, trained

MAIN = Rtn()
BRANCHES = {"16": SixteenBit(), "8": BranchRtn(weight="int8"), "4": BranchRtn(weight="int4")}


def knowing(input: torch.Tensor) -> LayerContext:
    """A context that knows the Gram matrix and all tokens of `input`."""
    generator = torch.Generator().manual_seed(0)
    kinds = (Gram, TokenSample)
    inn = input.shape[1]
    found = {kind: kind.empty(inn, "cpu", sample=len(input)).observed(input, generator) for kind in kinds}
    return attrs.evolve(context(), statistics=InputStatistics(found))


def test_up_is_the_weighted_least_squares_of_what_the_main_codes_leave() -> None:
    weight, known = trained(40, 64, seed=1), knowing(correlated(400, 64))
    fit = Deflated(damping=1e-6, noise=0).fit(weight, MAIN, SixteenBit(), 8, known)
    assert fit.up is not None
    assert fit.down is not None
    thin, left = (
        known.statistics[TokenSample].tokens.double() @ fit.down.decode().double().T,
        weight - fit.main.decode(),
    )
    expected = torch.linalg.lstsq(thin, known.statistics[TokenSample].tokens.double() @ left.double().T).solution.T
    assert (fit.up.decode() - expected).norm() <= 1e-2 * expected.norm()  # stored in bfloat16


@pytest.mark.parametrize("bits", BRANCHES)
def test_it_beats_the_fits_that_do_not_choose_codes_for_the_output(bits: str) -> None:
    weight, known = trained(96, 128, seed=2), calibrated_context(128, tokens=600)
    errors = [
        factors.error(weight, strategy.fit(weight, MAIN, BRANCHES[bits], 12, known), known)
        for strategy in (Deflated(), Svd(), Qera())
    ]
    assert errors[0] < 0.8 * min(errors[1:])


def test_a_narrow_branch_is_made_up_for() -> None:
    """With `up` in 4 bits, codes chosen before it was rounded would leave several times as much."""
    weight, known = trained(96, 128, seed=2), calibrated_context(128, tokens=600)
    fits = {bits: Deflated().fit(weight, MAIN, branch, 12, known) for bits, branch in BRANCHES.items()}
    errors = {bits: factors.error(weight, fit, known) for bits, fit in fits.items()}
    assert errors["4"] <= 2 * errors["16"]


def test_the_wiener_target_is_best_for_a_noisy_input() -> None:
    """Over inputs with noise added to what the main codes meet, the error is lower, though not the weight's."""
    weight, input = trained(64, 128, seed=2), correlated(2000, 128)
    known = knowing(input)
    main = Rtn(activation="int4")
    variance = rounding_noise(input, main.activation).float()
    noisy = input + torch.randn(input.shape, generator=torch.Generator().manual_seed(1)) * variance.sqrt()
    errors = {}
    for wiener in (False, True):
        fit = Deflated(noise=1, wiener=wiener).fit(weight, main, SixteenBit(), 12, known)
        assert fit.up is not None
        assert fit.down is not None
        branch = input @ (fit.up.decode() @ fit.down.decode()).T
        errors[wiener] = float((noisy @ fit.main.decode().T + branch - input @ weight.T).norm())
    assert errors[True] < 0.95 * errors[False]


def test_no_rounding_is_no_noise_and_needs_no_sample() -> None:
    assert Deflated(noise=0).statistics == {Gram}
    weight, known = trained(16, 64), calibrated_context(64)
    silent = Rtn(activation="none")
    fits = [Deflated(noise=noise, wiener=True).fit(weight, silent, SixteenBit(), 4, known) for noise in (0, 1)]
    assert torch.equal(fits[0].decode(), fits[1].decode())


@pytest.mark.parametrize("wiener", [False, True])
def test_degenerate_inputs(wiener: bool) -> None:
    """An input of zeros, of one token, of one channel; a weight of zeros; a rank of the whole side."""
    weight = trained(24, 40, seed=1)
    single = torch.zeros(10, 40)
    single[:, 7] = 1
    strategy = Deflated(wiener=wiener)
    for input in (torch.zeros(10, 40), correlated(1, 40), single):
        known = knowing(input)
        alone = factors.deviation(weight - MAIN.encode(weight, known).decode(), known)
        for rank in (3, 24):
            fit = strategy.fit(weight, MAIN, BranchRtn(weight="int4"), rank, known)
            assert torch.isfinite(fit.decode()).all()
            assert factors.error(weight, fit, known) <= alone
    assert not strategy.fit(weight * 0, MAIN, SixteenBit(), 3, calibrated_context(40)).decode().any()


def test_main_codes_without_scales_are_refused_at_bind() -> None:
    with pytest.raises(InputError, match="'deflated' rounds onto the scales of the main codes and bfloat16 has none"):
        bind([make_stage("main_quantizer", "rtn", weight="bfloat16"), make_stage("low_rank", "deflated", rank=2)])


@pytest.mark.parametrize(("option", "value"), [("noise", -0.1), ("damping", 0)])
def test_options_are_checked(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        Deflated(**{option: value})
