"""One step of a fit's loop: the compiled pass against its plain reference, and what both promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import factors, formats, residual_numba, residual_torch
from loraq.residual import ResidualRounding, product_dtype
from matrices import seeded, trained

SHAPES = ((2, 16), (3, 40), (2, 64), (9, 130))
CASES = (
    st.sampled_from(SHAPES),
    st.integers(0, 1000),
    st.sampled_from(("int3", "int4", "int8")),
    st.sampled_from((5, 16, 64)),
    st.sampled_from((0.0, 0.4, 1.0)),
    st.sampled_from((0.0, 0.01, 0.5)),
)
"""Shapes, seeds, widths of the main codes, groups, crests and noises."""


def made(weight: torch.Tensor, main: Rtn, crest: float, noise: float, *, way: str) -> ResidualRounding:
    """A rounding that goes one way: compiled, in torch as on a GPU, or by the reference."""
    rounding = ResidualRounding(weight, main, crest=crest, noise=noise)
    assert isinstance(rounding._fused, residual_numba.Fused)
    assert isinstance(main.weight, formats.IntegerFormat)
    if way == "torch":
        rounding._fused = residual_torch.Fused(weight, main.weight, main.group_for(weight.shape[1]), 1.0)
    if way == "reference":
        rounding._fused = None
    return rounding


def stepped(
    weight: torch.Tensor, products: list[torch.Tensor], main: Rtn, crest: float, noise: float, *, way: str
) -> tuple[list[torch.Tensor], list[float]]:
    """The errors of the last, and the losses of all, of the steps of `products`."""
    rounding = made(weight, main, crest, noise, way=way)
    rounding.start(products[0])
    found = [rounding.step(product) for product in products]
    return [errors.clone() for errors, _ in found[-1:]], [float(loss) for _, loss in found]


@pytest.mark.parametrize("way", ["compiled", "torch"])
@settings(max_examples=60, deadline=None)
@given(*CASES, st.sampled_from((torch.bfloat16, torch.float32)))
def test_a_pass_is_the_reference(
    way: str, shape: tuple[int, int], seed: int, width: str, group: int, crest: float, noise: float, dtype: torch.dtype
) -> None:
    """To float rounding: an error may be another where a weight lies in the middle of two codes, the loss may not."""
    weight = trained(*shape, seed=seed)
    products = [
        (seeded(*shape, seed=seed) + 0.02 * step * seeded(*shape, seed=seed + step)).to(dtype) for step in range(3)
    ]
    main = Rtn(weight=width, group=group)
    errors, losses = stepped(weight, products, main, crest, noise, way=way)
    expected_errors, expected_losses = stepped(weight, products, main, crest, noise, way="reference")
    # The reference's scales are those of bfloat16, the compiled ones are not: errors differ by its rounding.
    slack = 0.01 * max(float((weight - product.float()).norm()) for product in products)
    assert losses == pytest.approx(expected_losses, rel=5e-2, abs=slack)
    assert errors[0].dtype == dtype
    if crest == 0:  # else a few errors, just before a flip or just after it, may be all of it; the formula has those
        assert float(errors[0].float().norm()) == pytest.approx(
            float(expected_errors[0].float().norm()), rel=0.2, abs=slack
        )


@pytest.mark.parametrize("way", ["compiled", "torch"])
@settings(max_examples=60, deadline=None)
@given(*CASES)
def test_a_pass_is_its_formula(
    way: str, shape: tuple[int, int], seed: int, width: str, group: int, crest: float, noise: float
) -> None:
    """Under the scales that a pass chose, written out in float64: E, how crest weighs it, noise, and the loss."""
    weight, main = trained(*shape, seed=seed), Rtn(weight=width, group=group)
    assert isinstance(main.weight, formats.IntegerFormat)
    rounding = made(weight, main, crest, noise, way=way)
    assert rounding._fused is not None
    product = 0.02 * seeded(*shape, seed=seed)
    rounding.start(0.5 * weight)
    errors, loss = rounding.step(product)
    scales = rounding._fused.scales.double().repeat_interleave(main.group_for(shape[1]), dim=1)[:, : shape[1]]
    residual, limit = (weight - product).double(), main.weight.limit
    in_steps = residual / scales
    error = residual - in_steps.round().clamp(-limit - 1, limit) * scales
    shares = 1 - crest + crest * (2 * error / scales).square().clamp(max=4)
    wanted = error * shares + noise * residual
    middle = ((in_steps.frac().abs() - 0.5).abs() < 1e-4) & (in_steps.abs() < limit + 1)
    assert torch.allclose(errors.double()[~middle], wanted[~middle], rtol=1e-3, atol=1e-4 * float(residual.abs().max()))
    size = math.sqrt(float(error.square().sum() + noise * residual.square().sum()))
    assert float(loss) == pytest.approx(size, rel=1e-4, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(*CASES)
def test_both_passes_are_the_same(
    shape: tuple[int, int], seed: int, width: str, group: int, crest: float, noise: float
) -> None:
    """But for weights in the middle of two codes, and scales of equal error."""
    weight = trained(*shape, seed=seed)
    weight[0, :group] = 0
    product, main = 0.5 * weight + 0.02 * seeded(*shape, seed=seed) * (weight != 0), Rtn(weight=width, group=group)
    errors, losses = stepped(weight, [product], main, crest, noise, way="compiled")
    found, sizes = stepped(weight, [product], main, crest, noise, way="torch")
    assert sizes == pytest.approx(losses, rel=1e-4, abs=1e-6)
    close = (found[0] - errors[0]).abs() <= 1e-4 * weight.abs().max()
    assert close.float().mean() >= 0.95


def test_crest_counts_what_is_about_to_flip() -> None:
    """Half a step counts in full, a quarter of a step a quarter as much, and no error nothing."""
    weight = torch.tensor([[7.0, 1.49, 2.25, 3.0]])
    rounding = ResidualRounding(weight, Rtn(group=4, scale="amax"), crest=1.0)
    rounding.start(torch.zeros(1, 4))
    errors, loss = rounding.step(torch.zeros(1, 4))
    assert errors[0].tolist() == pytest.approx([0, 0.49 * 0.98**2, 0.25 * 0.25, 0], abs=1e-5)
    assert loss == pytest.approx(math.hypot(0.49, 0.25), rel=1e-5)


def test_a_group_that_was_all_zero_finds_a_scale() -> None:
    """A product may bring life to a group whose scale was 0."""
    product = seeded(2, 64)
    for way in ("compiled", "torch"):
        _, losses = stepped(torch.zeros(2, 64), [torch.zeros(2, 64), product], Rtn(), 0.0, 0.0, way=way)
        assert losses[0] == 0
        assert losses[1] < 0.2 * float(product.norm())


@given(st.sampled_from(((1, 1), (5, 3), (7, 130))), st.integers(0, 100), st.booleans())
@settings(max_examples=20, deadline=None)
def test_moved_rounds_where_it_moved(shape: tuple[int, int], seed: int, rows: bool) -> None:
    """The compiled move against plain torch."""
    rows_, columns = shape
    values, direction = seeded(*shape, seed=seed), seeded(*shape, seed=seed + 1).bfloat16()
    squares = residual_numba.squares(direction, rows=rows)
    assert torch.allclose(squares, direction.float().square().sum(dim=1 if rows else 0, keepdim=True), rtol=1e-5)
    lengths = seeded(*squares.shape, seed=seed + 2).abs()
    coded = formats.INT4.encode(values, 64)
    scales = coded.scales.float()
    expected = values + lengths * direction.float()
    found = residual_numba.moved(values, direction, lengths, scales, 64, 7)
    steady = residual_torch.Moving(scales, shape, 64, 7).rounded(expected, torch.bfloat16)
    assert (found != steady).float().mean() <= 0.02, "but for middles"
    assert torch.allclose(values, expected, rtol=1e-5, atol=1e-6)
    steps = formats.scaled(torch.ones(rows_, columns), scales, 64)
    clamped = torch.maximum(torch.minimum(expected, 7 * steps), -8 * steps)
    assert ((found.float() - clamped).abs() <= 0.51 * steps + 0.01 * clamped.abs()).all()


def test_products_run_in_a_dtype_that_torch_multiplies() -> None:
    """Whatever the processor says of itself."""
    dtype = product_dtype("cpu")
    assert dtype in (torch.bfloat16, torch.float32)
    assert product_dtype("cuda") == torch.bfloat16


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (64, 900)])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_approximate_svd_leaves_hardly_more_than_the_best(shape: tuple[int, int], rank: int) -> None:
    """Both ways, by eigenvectors and by a random projection."""
    weight = trained(*shape)
    up, down = factors.approximate_svd(weight, rank, torch.Generator().manual_seed(0))
    best_up, best_down = factors.truncated_svd(weight, rank)
    assert (up.shape, down.shape) == (best_up.shape, best_down.shape)
    assert float((weight - up @ down).norm()) <= 1.03 * float((weight - best_up @ best_down).norm())
    assert up.norm(dim=0).tolist() == pytest.approx(down.norm(dim=1).tolist(), rel=1e-2)


@pytest.mark.parametrize("rank", [1, 9])
def test_approximate_svd_of_little(rank: int) -> None:
    """A weight of less rank than asked for, and one smaller than that."""
    for weight in (torch.ones(6, 4), torch.zeros(6, 4), torch.ones(1, 1)):
        up, down = factors.approximate_svd(weight, rank, torch.Generator().manual_seed(0))
        assert (up.shape[1], down.shape[0]) == (rank, rank)
        assert torch.allclose(up @ down, weight, atol=1e-4)
