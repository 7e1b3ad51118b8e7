"""loraq_fast's noise term: what it buys an input that is rounded, and that it is nothing where none is."""

from __future__ import annotations

import pytest
import torch
from loraq.strategies.branch_quantizer.rtn import Rtn as BranchRtn
from loraq.strategies.low_rank.loraq_fast import LoraqFast
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq.layer import Fit
from matrices import context, seeded

WEIGHT = seeded(128, 256, seed=3)
BRANCH = BranchRtn(weight="int4")


def fitted(noise: float, activation: str) -> Fit:
    return LoraqFast(noise=noise).fit(WEIGHT, Rtn(activation=activation), BRANCH, 12, context())


def residual(fit: Fit) -> torch.Tensor:
    assert fit.up is not None
    assert fit.down is not None
    return WEIGHT - fit.up.decode() @ fit.down.decode()


def test_a_rounded_input_s_output_is_nearer() -> None:
    """The branch leaves less for the coarse input to multiply."""
    input = seeded(1000, 256, seed=2)
    rounded = Rtn(activation="int4").activation.format.encode(input, 64).decode()
    fits = {noise: fitted(noise, "int4") for noise in (0, 1, 4)}
    outputs = {
        noise: float((rounded @ fit.main.decode().T + input @ (WEIGHT - residual(fit)).T - input @ WEIGHT.T).norm())
        for noise, fit in fits.items()
    }
    sizes = {noise: float(residual(fit).norm()) for noise, fit in fits.items()}
    assert outputs[1] < 0.985 * outputs[0]
    assert sizes[4] < sizes[1] < sizes[0]


def test_it_counts_only_where_the_input_is_rounded() -> None:
    assert torch.equal(fitted(1, "none").decode(), fitted(0, "int4").decode())
    assert torch.equal(fitted(0, "none").decode(), fitted(0, "int4").decode())


def test_it_is_not_negative() -> None:
    with pytest.raises(ValueError, match="noise"):
        LoraqFast(noise=-1)
