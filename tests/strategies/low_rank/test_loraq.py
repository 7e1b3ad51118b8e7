"""The trained branches, `loraq` and `loraq_fast`: never worse than none, the same twice, whatever the weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.branch_quantizer.none import SixteenBit
from loraq.strategies.branch_quantizer.rtn import Rtn as BranchRtn
from loraq.strategies.low_rank.loraq import Loraq
from loraq.strategies.low_rank.loraq_fast import LoraqFast
from loraq.strategies.low_rank.none import NoBranch
from loraq.strategies.low_rank.svd import Svd
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import factors, formats
from loraq.layer import Fit, LayerContext

MAIN = Rtn()
SHAPES = ((1, 1), (3, 5), (5, 3), (1, 70), (65, 130))
WIDTHS = ("int8", "int6", "int4", "none")
STRATEGIES = [Loraq, LoraqFast]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def context(seed: int = 0) -> LayerContext:
    return LayerContext("layer", torch.Generator().manual_seed(seed))


def matrix(out: int, inn: int, seed: int = 0) -> torch.Tensor:
    """A random matrix whose singular values decay."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(out, inn, generator=generator)
    return values + torch.randn(out, 4, generator=generator) @ torch.randn(4, inn, generator=generator)


def branch_of(width: str) -> BranchRtn | SixteenBit:
    return SixteenBit() if width == "none" else BranchRtn(weight=width)


def fit_of(strategy: type, values: torch.Tensor, width: str = "int4", rank: int = 16, **options: float) -> Fit:
    return strategy(**options).fit(values, MAIN, branch_of(width), rank, context())


def same(first: Fit, second: Fit) -> bool:
    pairs = ((first.main, second.main), (first.up, second.up), (first.down, second.down))
    return all(torch.equal(one.parts[name], other.parts[name]) for one, other in pairs for name in one.parts)


@each_strategy
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 1000), st.sampled_from(WIDTHS), st.sampled_from((1.0, 1e-12, 1e8)))
def test_never_worse_than_svd_or_none(
    strategy: type, shape: tuple[int, int], seed: int, width: str, magnitude: float
) -> None:
    """Whatever the shape, scale and branch."""
    values = matrix(*shape, seed) * magnitude
    rank = (min(shape) + 1) // 2
    fit = fit_of(strategy, values, width, rank, steps=4)
    error = factors.error(values, fit)
    assert fit.rank == rank
    if strategy is Loraq:  # keeps what it starts from
        assert error <= factors.error(values, Svd().fit(values, MAIN, branch_of(width), rank, context()))
    assert error <= factors.error(values, NoBranch().fit(values, MAIN, branch_of(width), 0, context()))


@each_strategy
@pytest.mark.parametrize("width", WIDTHS)
def test_training_pays(strategy: type, width: str) -> None:
    """On a matrix with structure the trained branch leaves clearly less error than the SVD of the same rank."""
    values = matrix(96, 128)
    svd = factors.error(values, Svd().fit(values, MAIN, branch_of(width), 24, context()))
    assert factors.error(values, fit_of(strategy, values, width, 24, steps=100)) < 0.85 * svd


@each_strategy
def test_same_twice_and_seeded(strategy: type) -> None:
    """The generator is the only source of randomness."""
    values = matrix(65, 130)
    assert same(fit_of(strategy, values, steps=20), fit_of(strategy, values, steps=20))
    other = strategy(steps=20).fit(values, MAIN, branch_of("int4"), 16, context(seed=1))
    assert not same(fit_of(strategy, values, steps=20), other)


@each_strategy
def test_arguments_are_left_alone(strategy: type) -> None:
    """A fit does not write into its weight."""
    values = matrix(65, 130)
    before = values.clone()
    fit_of(strategy, values, steps=3)
    assert torch.equal(before, values)


@each_strategy
def test_magnitude_does_not_matter(strategy: type) -> None:
    """The relative error of a scaled weight is the same to rounding."""
    values = matrix(64, 96)
    plain = factors.error(values, fit_of(strategy, values, steps=60))
    assert factors.error(values * 2**-30, fit_of(strategy, values * 2**-30, steps=60)) * 2**30 == pytest.approx(
        plain, rel=0.03
    )


@each_strategy
def test_a_rank_above_the_smaller_side_is_given(strategy: type) -> None:
    """The layer has the rank that was asked for even where less would do."""
    values = matrix(6, 70)
    fit = fit_of(strategy, values, rank=9, steps=5)
    assert fit.rank == 9
    assert factors.error(values, fit) <= factors.error(values, fit_of(strategy, values, rank=0))


@each_strategy
def test_one_huge_weight_does_not_spoil_the_rest(strategy: type) -> None:
    """A weight of 150 times the root mean square, as trained output projections have them, costs no convergence."""
    values = torch.randn(96, 128, generator=torch.Generator().manual_seed(5))
    values[3, 17] = 150.0
    svd = factors.error(values, Svd().fit(values, MAIN, branch_of("int8"), 16, context()))
    assert factors.error(values, fit_of(strategy, values, "int8", steps=100)) < 0.8 * svd


@each_strategy
@pytest.mark.parametrize("rank", [0, 3])
def test_all_zero_weight(strategy: type, rank: int) -> None:
    """Zeros stay zeros, in the shape that was asked for."""
    fit = fit_of(strategy, torch.zeros(6, 70), rank=rank)
    assert fit.rank == rank
    assert not fit.decode().any()


@each_strategy
def test_zero_rows_stay_zero_when_everything_else_is_exact(strategy: type) -> None:
    """A weight that main codes hold exactly loses nothing."""
    values = torch.zeros(4, 64)
    values[0, :] = 7.0
    assert not (fit_of(strategy, values, rank=2, steps=5).decode() - values).any()


@each_strategy
def test_rank_zero_is_no_branch(strategy: type) -> None:
    """Without a rank the fit is the main quantizer's."""
    values = matrix(6, 70)
    fit = fit_of(strategy, values, rank=0)
    assert fit.up is None
    assert torch.equal(fit.main.codes, MAIN.encode(values, context()).codes)


@each_strategy
def test_formats_without_an_integer_grid(strategy: type) -> None:
    """Any format goes, in the main codes and in the branch."""
    table = formats.TableFormat("thirds", 4, tuple(step / 3 for step in range(-3, 4)))
    values = matrix(20, 70)
    main = Rtn(weight=table)
    fit = strategy(steps=10).fit(values, main, BranchRtn(weight=table), 4, context())
    assert factors.error(values, fit) <= factors.error(values, NoBranch().fit(values, main, SixteenBit(), 0, context()))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [(Loraq, {"steps": 0}), (Loraq, {"learning_rate": 0.0}), (LoraqFast, {"steps": 0}), (LoraqFast, {"step": -1.0})],
    ids=str,
)
def test_wrong_options_are_refused(strategy: type, options: dict[str, float]) -> None:
    """Options are checked when the strategy is made."""
    with pytest.raises(ValueError, match=next(iter(options))):
        strategy(**options)
