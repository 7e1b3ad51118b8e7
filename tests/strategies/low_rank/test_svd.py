"""The truncated SVD as a branch, the fit without a branch, and what they share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.branch_quantizer.none import SixteenBit
from loraq.strategies.branch_quantizer.rtn import Rtn as BranchRtn
from loraq.strategies.low_rank.none import NoBranch
from loraq.strategies.low_rank.svd import Svd
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import factors
from loraq.layer import LayerContext

MAIN = Rtn()
SHAPES = ((1, 1), (3, 5), (5, 3), (1, 70), (65, 130))


def context() -> LayerContext:
    return LayerContext("layer", torch.Generator().manual_seed(0))


def matrix(out: int, inn: int, seed: int = 0) -> torch.Tensor:
    """A random matrix whose singular values decay."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(out, inn, generator=generator)
    return values + torch.randn(out, 1, generator=generator) @ torch.randn(1, inn, generator=generator)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 100), st.sampled_from((1.0, 1e-20, 1e15)))
def test_truncated_svd_is_the_best_approximation(shape: tuple[int, int], seed: int, magnitude: float) -> None:
    """Its error is the norm of the singular values left out, as torch's own SVD has them."""
    values = matrix(*shape, seed)
    for rank in {1, min(shape) // 2, min(shape)} - {0}:
        up, down = factors.truncated_svd(values * magnitude, rank)
        left = torch.linalg.svdvals(values)[rank:].square().sum().sqrt()
        error = (values.double() - up.double() @ down.double() / magnitude).norm()
        assert float(error) == pytest.approx(float(left), rel=1e-4, abs=1e-5 * float(values.norm()))
        assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-3, atol=1e-3 * float(down.norm()))


def test_more_columns_than_the_rank_of_the_weight_are_zero() -> None:
    """A rank-one weight needs one column, and nothing becomes NaN."""
    up, down = factors.truncated_svd(torch.ones(6, 4), 3)
    assert torch.allclose(up @ down, torch.ones(6, 4))
    assert float(up[:, 1:].abs().max()) < 1e-5


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
def test_a_rank_above_the_smaller_side_is_filled_up(shape: tuple[int, int]) -> None:
    """The factors have the rank that was asked for, and give the weight itself."""
    values = matrix(*shape)
    up, down = factors.truncated_svd(values, 9)
    assert (up.shape, down.shape) == ((shape[0], 9), (9, shape[1]))
    assert torch.allclose(up @ down, values, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 100), st.sampled_from(("int8", "int4", "none")))
def test_never_worse_than_no_branch(shape: tuple[int, int], seed: int, width: str) -> None:
    """Where the branch only adds its own error, it is dropped, in the shape that was asked for."""
    values = matrix(*shape, seed)
    branch = SixteenBit() if width == "none" else BranchRtn(weight=width)
    rank = (min(shape) + 1) // 2
    fit = Svd().fit(values, MAIN, branch, rank, context())
    alone = NoBranch().fit(values, MAIN, branch, 0, context())
    assert fit.rank == rank
    assert factors.error(values, fit) <= factors.error(values, alone)


def test_main_codes_are_of_the_residual_of_the_rounded_branch() -> None:
    """The branch's own rounding error is in the residual, so that the main codes make up for it."""
    values = matrix(64, 96)
    fit = Svd().fit(values, MAIN, BranchRtn(weight="int4"), 16, context())
    assert fit.up is not None
    assert fit.down is not None
    expected = MAIN.encode(torch.addmm(values, fit.up.decode(), fit.down.decode(), alpha=-1), context())
    assert torch.equal(fit.main.codes, expected.codes)


@pytest.mark.parametrize("rank", [0, 2])
def test_all_zero_weight(rank: int) -> None:
    """Zeros stay zeros."""
    fit = Svd().fit(torch.zeros(6, 70), MAIN, BranchRtn(), rank, context())
    assert fit.rank == rank
    assert not fit.decode().any()


def test_rank_zero_is_no_branch() -> None:
    """Without a rank there is no branch, only main codes."""
    values = matrix(6, 70)
    fit = Svd().fit(values, MAIN, BranchRtn(), 0, context())
    assert fit.down is None
    assert torch.equal(fit.main.codes, NoBranch().fit(values, MAIN, BranchRtn(), 5, context()).main.codes)
