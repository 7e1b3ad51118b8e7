"""Floating point, microscaling, asymmetric, ternary and two-level formats: against torch, ml_dtypes and tables."""

from __future__ import annotations

import ml_dtypes
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraq import ops, registry, rounding
from loraq.contracts import AbstractFormat, AbstractPacking
from loraq.float_formats import E2M1, E2M3, E3M2, E4M3, E5M2, MXFP4, MXINT8, NVFP4, Minifloat
from loraq.formats import INT8, named
from loraq.integer_formats import INT4_ASYMMETRIC, INT4X2, TERNARY
from loraq.layout import Storage
from matrices import seeded, weights_OI

GRIDS = {
    "float8_e4m3fn": E4M3,
    "float8_e5m2": E5M2,
    "float6_e2m3fn": E2M3,
    "float6_e3m2fn": E3M2,
    "float4_e2m1fn": E2M1,
}
SCALED = [name for name in registry.names("loraq.format") if name != "bfloat16"]
# Halves of the largest finite value and below: a block's scale is neither zero nor infinite.
ordinary = st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda value: value == 0 or abs(value) > 2.0**-99)


@pytest.mark.parametrize("name", GRIDS)
def test_every_code_decodes_as_ml_dtypes_has_it(name: str) -> None:
    grid = GRIDS[name]
    codes = numpy.arange(2**grid.bits, dtype=numpy.uint8)
    expected = codes.view(getattr(ml_dtypes, name)).astype(numpy.float32)
    found = grid.decode(torch.from_numpy(codes)).numpy()
    finite = numpy.isfinite(expected)
    assert numpy.array_equal(found[finite], expected[finite])
    assert numpy.isnan(found[~finite]).all()


@pytest.mark.parametrize("name", GRIDS)
def test_the_tables_of_the_specification(name: str) -> None:
    tops = {"float8_e4m3fn": 448, "float8_e5m2": 57344, "float6_e2m3fn": 7.5, "float6_e3m2fn": 28, "float4_e2m1fn": 6}
    exponents = {"float8_e4m3fn": 8, "float8_e5m2": 15, "float6_e2m3fn": 2, "float6_e3m2fn": 4, "float4_e2m1fn": 2}
    assert GRIDS[name].top == tops[name]
    assert GRIDS[name].largest_exponent == exponents[name]


def every_interesting_value(grid: Minifloat) -> Tensor:
    """All values, all middles between them, and both neighbours of each in float32, with both signs."""
    values = torch.tensor(grid.magnitudes(), dtype=torch.float32)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    up = torch.nextafter(points, torch.full_like(points, torch.inf))
    down = torch.nextafter(points, torch.full_like(points, -torch.inf))
    points = torch.cat([points, up, down])
    return torch.cat([points, -points]).clamp(-grid.top, grid.top)


@pytest.mark.parametrize(("grid", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=str)
def test_float8_is_torch_s_cast_bit_for_bit(grid: Minifloat, dtype: torch.dtype) -> None:
    values = every_interesting_value(grid)
    assert torch.equal(grid.encode(values), values.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_is_ml_dtypes_rounding(name: str) -> None:
    values = every_interesting_value(GRIDS[name])
    expected = values.numpy().astype(getattr(ml_dtypes, name)).view(numpy.uint8)
    mask = 2 ** GRIDS[name].bits - 1
    assert numpy.array_equal(GRIDS[name].encode(values).numpy(), expected & mask)


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_saturates(name: str) -> None:
    grid = GRIDS[name]
    assert grid.decode(grid.encode(torch.tensor([1e30, -1e30]))).tolist() == [grid.top, -grid.top]


@given(limit=st.floats(2.0**-100, 2.0**100, width=32))
def test_mx_scales_follow_the_rule_and_e8m0(limit: float) -> None:
    block = torch.zeros(1, 32)
    block[0, 3] = limit
    code = int(MXFP4.encode(block, 32).parts["exponents"][0, 0])
    expected = numpy.uint8(code).view(ml_dtypes.float8_e8m0fnu).astype(numpy.float32)
    assert expected == 2.0 ** (numpy.floor(numpy.log2(numpy.float64(limit))) - 2)


def test_mxint8_is_the_specification_s() -> None:
    block = torch.zeros(1, 32)
    block[0, :4] = torch.tensor([1.984375, -1.984375, 0.015625, 1.0])  # 127/64, the unit 1/64
    coded = MXINT8.encode(block, 32)
    assert coded.parts["exponents"].item() == 127
    assert coded.codes[0, :4].tolist() == [127, -127, 1, 64]
    assert torch.equal(coded.decode(), block)


def test_nvfp4_uses_the_whole_of_both_grids() -> None:
    values = seeded(4, 64)
    coded = NVFP4.encode(values, 16)
    assert E4M3.decode(coded.parts["scales"]).max() == 448
    assert coded.decode().abs().max() <= values.abs().max() * (1 + 1e-6)
    assert (values - coded.decode()).norm() / values.norm() < 0.12


@given(weight=weights_OI(), name=st.sampled_from(SCALED))
def test_searched_scales_are_never_worse(weight: Tensor, name: str) -> None:
    format = named(name)
    group = format.block or 64
    plain = rounding.squared_error(weight, format.encode(weight, group)).sum()
    assert rounding.squared_error(weight, rounding.searched(weight, format, group)).sum() <= plain * (1 + 1e-6)


@given(weight=weights_OI(largest=40), name=st.sampled_from(SCALED), more=st.integers(1, 70))
def test_columns_of_zeros_behind_change_nothing(weight: Tensor, name: str, more: int) -> None:
    format, columns = named(name), weight.shape[1]
    if name == "ternary":  # its scale is a mean, which zeros that are really there do change
        more = 0
    group = format.block or 64
    padded = torch.nn.functional.pad(weight, (0, more))
    assert torch.equal(format.encode(padded, group).decode()[:, :columns], format.encode(weight, group).decode())


@given(weight=weights_OI(largest=40), name=st.sampled_from(SCALED))
def test_powers_of_two_scale_through(weight: Tensor, name: str) -> None:
    format = named(name)
    group = format.block or 64
    assert torch.equal(format.encode(weight * 4, group).decode(), format.encode(weight, group).decode() * 4)


@given(values=st.lists(ordinary, min_size=1, max_size=70))
def test_asymmetric_codes_are_within_half_a_step_and_keep_zero(values: list[float]) -> None:
    weight = torch.tensor([values])
    coded = INT4_ASYMMETRIC.encode(weight, 64)
    scales = coded.scales.float().repeat_interleave(64, dim=1)[:, : weight.shape[1]]
    # Half a step from rounding, half from the zero point, and what bfloat16 takes off a range of fifteen steps.
    assert ((weight - coded.decode()).abs() <= scales * (1 + 15 / 256)).all()
    assert (coded.decode()[weight == 0] == 0).all()


def test_asymmetric_beats_symmetric_where_weights_are_shifted() -> None:
    weight = seeded(8, 128) + 2
    asymmetric = (weight - INT4_ASYMMETRIC.encode(weight, 64).decode()).norm()
    assert asymmetric < 0.8 * (weight - named("int4").encode(weight, 64).decode()).norm()


def test_ternary_scales_are_mean_magnitudes() -> None:
    weight = seeded(3, 70)
    scales = TERNARY.encode(weight, 64).scales.float()
    expected = torch.stack([weight[:, :64].abs().mean(1), weight[:, 64:].abs().mean(1)], dim=1)
    assert torch.allclose(scales, expected, rtol=0.01)


@given(weight=weights_OI())
def test_two_level_integers_fit_int8(weight: Tensor) -> None:
    coded = INT4X2.encode(weight, 64, full_range=True)
    integers, scales, group = INT4X2.integer_view(coded)
    assert integers.dtype == torch.int8
    assert group == weight.shape[1]
    multipliers = coded.parts["multipliers"].int().repeat_interleave(64, dim=1)[:, : weight.shape[1]]
    assert torch.equal(integers.int(), coded.codes.int() * multipliers)
    assert torch.equal(integers.float() * scales, coded.decode())


@pytest.mark.parametrize("name", [name for name in SCALED if named(name).integer])
def test_integer_products_agree_with_decoded_ones(name: str) -> None:
    format = named(name)
    weight, input = seeded(9, 130, seed=1), INT8.encode(seeded(5, 130, seed=2), 64)
    coded = rounding.searched(weight, format, format.block or 64)
    expected = input.decode().double() @ coded.decode().double().T
    assert torch.allclose(ops.product(input, coded).double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4", 4.25), ("int6", 6.25), ("int4_asymmetric", 4 + 16 / 64 + 4 / 64), ("ternary", 1.6 + 0.25),
        ("fp8_e4m3", 8.25), ("mxfp8", 8.25), ("mxfp6_e2m3", 6.25), ("mxfp6_e3m2", 6.25), ("mxfp4", 4.25),
        ("mxint8", 8.25), ("mxint6", 6.25), ("mxint4", 4.25), ("nvfp4", 4.5 + 32 / (64 * 640)),
        ("int4x2", 4 + 8 / 64 + 16 / 640), ("int2", 2.25), ("int3", 3.25),
        ("int4_offset", 4.5), ("int3_offset", 3.5), ("int1_binary", 2.5), ("int2_binary", 3.5), ("int3_binary", 4.5),
        ("int3_mixed", 3.25 + 2 / 640), ("int4_mixed", 4.25 + 2 / 640),
    ],
)  # fmt: skip
def test_stored_bits_are_exact(name: str, bits: float) -> None:
    format: AbstractFormat = named(name)
    packing = registry.load("loraq.packing", "rows")()  # type: ignore[operator]
    assert isinstance(packing, AbstractPacking)
    stored = Storage(format, format.block or 64).stored_bytes(64, 640, packing)
    assert 8 * stored / (64 * 640) == pytest.approx(bits, abs=1e-12)
