"""QERA's branch, against its formula with an explicit square root, and as the minimum that it is."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.branch_quantizer.none import SixteenBit
from loraq.strategies.branch_quantizer.rtn import Rtn as BranchRtn
from loraq.strategies.low_rank.error_svd import ErrorSvd
from loraq.strategies.low_rank.qera import Qera
from loraq.strategies.low_rank.scaled_error_svd import ScaledErrorSvd
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import factors
from loraq.input_statistics import Gram, InputStatistics
from loraq.layer import LayerContext
from matrices import calibrated_context, context, correlated, seeded, trained

MAIN = Rtn()


def with_gram(gram: torch.Tensor) -> LayerContext:
    """A context that knows the Gram matrix alone."""
    known = Gram(gram.float(), torch.tensor(1.0, dtype=torch.float64))
    return attrs.evolve(context(), statistics=InputStatistics({Gram: known}))


def weighted_by_definition(error: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """SVD_r(E C^½) C^-½ with the symmetric root, by eigenvectors."""
    values, vectors = torch.linalg.eigh(gram.double())
    root = vectors * values.sqrt() @ vectors.T
    left, singular, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize(("out", "inn"), [(96, 64), (40, 130)])
def test_weighted_svd_is_the_formula(out: int, inn: int) -> None:
    error, input = seeded(out, inn, seed=1), seeded(500, inn, seed=2) * seeded(inn, seed=3).exp()
    gram = input.T @ input / 500
    up, down = factors.weighted_svd(error, factors.root(gram, 1e-9), 7)
    expected = weighted_by_definition(error, gram, 7)
    assert (up.double() @ down.double() - expected).norm() <= 1e-4 * expected.norm()
    diagonal = factors.weighted_svd(error, gram.diagonal().double().sqrt(), 7)
    expected = weighted_by_definition(error, torch.diag(gram.diagonal()), 7)
    assert (diagonal[0].double() @ diagonal[1].double() - expected).norm() <= 1e-4 * expected.norm()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 40))
def test_no_branch_of_this_rank_is_better(seed: int, rank: int, tokens: int) -> None:
    """The output error is what the singular values left out say, also for singular Gram matrices."""
    weight, input = trained(24, 33, seed=seed), correlated(tokens, 33, seed)
    known = with_gram(input.T @ input)
    fit = Qera(damping=1e-9).fit(weight, MAIN, SixteenBit(), rank, known)
    error = weight - MAIN.encode(weight, known).decode()
    least = float(torch.linalg.svdvals(error.double() @ input.double().T)[rank:].norm())
    whole = factors.deviation(error, known)
    assert factors.error(weight, fit, known) == pytest.approx(least, rel=1e-2, abs=1e-2 * whole)


@pytest.mark.parametrize("gram", [torch.zeros(64, 64), torch.ones(64, 64), torch.diag(torch.arange(64.0))], ids=str)
def test_degenerate_inputs(gram: torch.Tensor) -> None:
    """An input never seen, one direction alone, a channel without input: finite, and never worse than no branch."""
    weight, known = trained(40, 64, seed=1), with_gram(gram)
    fit = Qera().fit(weight, MAIN, BranchRtn(), 8, known)
    alone = weight - MAIN.encode(weight, known).decode()
    assert torch.isfinite(fit.decode()).all()
    assert factors.error(weight, fit, known) <= factors.deviation(alone, known)


def test_correlations_are_worth_more_than_sizes() -> None:
    weight, known = trained(96, 128, seed=2), calibrated_context(128)
    errors = [
        factors.error(weight, strategy.fit(weight, MAIN, SixteenBit(), 16, known), known)
        for strategy in (Qera(), ScaledErrorSvd(), ErrorSvd())
    ]
    assert errors[0] < 0.9 * min(errors[1:])


def test_damping_must_be_positive() -> None:
    with pytest.raises(ValueError, match="damping"):
        Qera(damping=0)
