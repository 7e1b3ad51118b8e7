"""The alternating refit and the SVD of the error, against what they are by definition."""

from __future__ import annotations

import pytest
import torch
from loraq.strategies.branch_quantizer.none import SixteenBit
from loraq.strategies.branch_quantizer.rtn import Rtn as BranchRtn
from loraq.strategies.low_rank.alternating import Alternating
from loraq.strategies.low_rank.error_svd import ErrorSvd
from loraq.strategies.low_rank.svd import Svd
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import factors
from loraq.contracts import AbstractLowRank, AbstractQuantizer
from loraq.layer import Fit
from matrices import context, trained

BRANCHES = [SixteenBit(), BranchRtn(weight="int8"), BranchRtn(weight="int4")]


def fitted(strategy: AbstractLowRank, branch: AbstractQuantizer, rank: int = 12) -> tuple[torch.Tensor, Fit]:
    weight = trained(96, 128, seed=2)
    return weight, strategy.fit(weight, Rtn(), branch, rank, context())


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.format.name)
def test_more_rounds_are_never_worse_and_beat_one_svd(branch: AbstractQuantizer) -> None:
    weight, once = fitted(Svd(), branch)
    errors = [factors.error(weight, fitted(Alternating(rounds=rounds), branch)[1]) for rounds in (1, 4, 12)]
    assert errors == sorted(errors, reverse=True)
    # Coded in 4 bits, the refitted branch loses by its rounding what it gained: the start is kept.
    share = 1.0 if branch.format.bits == 4 else 0.95
    assert errors[-1] <= share * factors.error(weight, once)


def test_error_svd_keeps_the_codes_of_the_weight_itself() -> None:
    weight, fit = fitted(ErrorSvd(), SixteenBit())
    alone = Rtn().encode(weight, context())
    assert torch.equal(fit.main.codes, alone.codes)
    left = torch.linalg.svdvals(weight - alone.decode())[12:].norm()
    # The branch is the best of its rank but for its rounding to bfloat16.
    assert factors.error(weight, fit) == pytest.approx(float(left), rel=1e-3)


def test_rounds_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds"):
        Alternating(rounds=0)
