"""Formats of mixed widths and with a binary residual: against rows of plain integers, brute force, and known values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraq import composite_formats, ops, registry, rounding
from loraq.activation import activation
from loraq.composite_formats import INT1_BINARY, INT2_BINARY, INT3_BINARY, INT3_MIXED, INT4_MIXED, MixedWidthFormat
from loraq.formats import INT8, named
from loraq.integer_formats import INT3_OFFSET, INT4_OFFSET
from loraq.layout import Layout, Storage
from matrices import groups, seeded, weights_OI

MIXED = [INT3_MIXED, INT4_MIXED]
BINARY = [INT1_BINARY, INT2_BINARY, INT3_BINARY]


def rows_packing() -> object:
    return registry.load("loraq.packing", "rows")()  # type: ignore[operator]


def layout_of(name: str, out: int, inn: int) -> Layout:
    plain = {"out": out, "inn": inn, "rank": 0, "main": {"format": name, "group": 32}}
    return Layout.from_plain(plain | {"activation": "int8", "packing": {"strategy": "rows"}})


@st.composite
def splits(draw: st.DrawFn, rows: int) -> Tensor:
    moved = draw(st.integers(0, rows // 2))
    places = draw(st.permutations(range(rows)))
    widths = torch.ones(rows, dtype=torch.int64)
    widths[list(places[:moved])] = 2
    widths[list(places[moved : 2 * moved])] = 0
    return widths


@given(data=st.data(), weight=weights_OI(), format=st.sampled_from(MIXED), group=groups)
def test_mixed_rows_are_rows_of_plain_integers(
    data: st.DataObject, weight: Tensor, format: MixedWidthFormat, group: int
) -> None:
    widths = data.draw(splits(weight.shape[0]))
    choices = [grid.encode(weight, group, full_range=True) for grid in format.grids]
    coded = format.joined(choices, widths)
    integers, scales, _ = format.integer_view(coded)
    assert integers.dtype == torch.int8
    for row, width in enumerate(widths.tolist()):
        assert torch.equal(integers[row], choices[width].codes[row])
        assert torch.equal(scales[row], choices[width].scales[row].float())
        assert torch.equal(coded.decode()[row], choices[width].decode()[row])


@given(weight=weights_OI(), format=st.sampled_from(MIXED))
def test_mixed_keeps_the_average_and_is_never_worse_than_equal_widths(weight: Tensor, format: MixedWidthFormat) -> None:
    coded = format.encode(weight, 64)
    widths = format.widths(coded)
    assert (widths == 0).sum() == (widths == 2).sum()
    even = (weight - format.grids[1].encode(weight, 64).decode()).double().square().sum()
    assert (weight - coded.decode()).double().square().sum() <= even * (1 + 1e-9)


def test_rows_far_larger_than_others_get_more_bits() -> None:
    weight = seeded(12, 64)
    weight[[3, 7]] *= 20
    widths = INT4_MIXED.widths(INT4_MIXED.encode(weight, 64))
    assert widths[[3, 7]].tolist() == [2, 2]
    assert (widths == 0).sum() == 2


@given(seed=st.integers(0, 1000), rows=st.integers(1, 6))
def test_the_split_is_the_best_of_its_order(seed: int, rows: int) -> None:
    """Among all numbers of moved rows; and for errors in proportion, of all splits there are."""
    sizes = seeded(rows, seed=seed).square() + 1e-3
    errors = torch.stack([sizes * 4, sizes, sizes / 4])
    widths = composite_formats.split(errors)
    found = errors.gather(0, (widths).unsqueeze(0)).sum()
    every = torch.cartesian_prod(*[torch.arange(3)] * rows).reshape(-1, rows)
    even = every[(every == 0).sum(1) == (every == 2).sum(1)]
    least = min(errors.gather(0, each.unsqueeze(0)).sum() for each in even)
    assert found <= least * (1 + 1e-6)


@pytest.mark.parametrize("format", [*MIXED, *BINARY, INT3_OFFSET, INT4_OFFSET], ids=lambda each: each.name)
def test_they_are_packed_and_come_back(format: MixedWidthFormat) -> None:
    layout = layout_of(format.name, 13, 70)
    weight = seeded(13, 70)
    weight[2] *= 30
    coded = rounding.searched(weight, format, 32)
    stored = layout.pack({f"main.{name}": tensor for name, tensor in coded.parts.items()})
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == layout.stored_bytes
    back = layout.coded("main", stored)
    assert all(torch.equal(back.parts[name], tensor) for name, tensor in coded.parts.items())


@pytest.mark.parametrize("name", ["int3_mixed", "int4_mixed"])
def test_the_cpu_kernel_runs_mixed_widths(name: str) -> None:
    layout = layout_of(name, 40, 96)
    weight = seeded(40, 96)
    weight[5] *= 30
    stored = layout.pack({f"main.{part}": tensor for part, tensor in named(name).encode(weight, 32).parts.items()})
    kernel = ops.kernel_for(layout, "cpu")
    assert kernel is not None
    input = seeded(9, 96, seed=1)
    assert torch.allclose(kernel.linear(input, stored, None, layout), ops.reference(input, stored, None, layout))


@pytest.mark.parametrize("name", ["int2_binary", "int3_binary"])
def test_the_cpu_kernel_refuses_what_has_no_table(name: str) -> None:
    layout = layout_of(name, 40, 96)
    assert ops.kernel_for(layout, "cpu") is None
    weight, input = seeded(40, 96), seeded(9, 96, seed=1)
    coded = named(name).encode(weight, 32)
    stored = layout.pack({f"main.{part}": tensor for part, tensor in coded.parts.items()})
    expected = ops.quantize_activation(input, activation("int8")).decode() @ coded.decode().T  # type: ignore[union-attr]
    assert torch.allclose(ops.reference(input, stored, None, layout), expected)


def test_known_values_of_a_binary_residual() -> None:
    weight = torch.tensor([[-7.0, -5.0, -1.2, 0.9, 3.0, 7.0]])
    coded = INT2_BINARY.encode(weight, 64)
    assert coded.scales.tolist() == [[4.0]]
    assert coded.parts["residual_scales"].tolist() == [[1.0]]
    assert coded.codes.tolist() == [[-2, -2, -1, 0, 0, 1]]
    assert coded.parts["signs"].tolist() == [[0, 1, 1, 0, 1, 1]]
    assert coded.decode().tolist() == [[-7, -5, -1, 1, 3, 7]]


def test_far_apart_copies_reach_outliers() -> None:
    weight = torch.tensor([[-0.5, 0.5, 10.5, -9.5]])
    coded = INT1_BINARY.rounded(weight, 64, torch.tensor([[1.0]]), torch.tensor([[10.0]]))
    assert torch.equal(INT1_BINARY.points(coded), torch.tensor([[[-10.5, -9.5, 9.5, 10.5]]]))
    assert coded.decode().tolist() == [[-9.5, 9.5, 10.5, -9.5]]


@given(weight=weights_OI(), bits=st.sampled_from([2, 3, 4]), group=groups)
def test_an_offset_grid_is_within_half_a_step(weight: Tensor, bits: int, group: int) -> None:
    coded = named(f"int{bits}_offset").encode(weight, group)
    scales = coded.scales.float().repeat_interleave(coded.group, dim=1)[:, : coded.shape[1]]
    # Half a step of rounding; bfloat16 takes 1/256 off a range of 2^bits steps, and off the offset.
    assert ((weight - coded.decode()).abs() <= scales * (0.5 + 2 ** (bits - 7)) + 1e-30).all()


def test_an_offset_beats_a_zero_point_where_weights_are_shifted() -> None:
    weight = seeded(8, 128) + 0.7
    offset = (weight - INT4_OFFSET.encode(weight, 64).decode()).norm()
    assert offset < (weight - named("int4_asymmetric").encode(weight, 64).decode()).norm()


def test_integer_products_of_mixed_widths_are_exact() -> None:
    weight, input = seeded(9, 130, seed=1), INT8.encode(seeded(5, 130, seed=2), 64)
    coded = INT4_MIXED.encode(weight, 64)
    expected = input.decode().double() @ coded.decode().double().T
    assert torch.allclose(ops.product(input, coded).double(), expected, atol=1e-4)


def test_every_split_takes_the_same_bytes() -> None:
    storage = Storage(INT3_MIXED, 64)
    weight = seeded(20, 100)
    uneven = weight * torch.logspace(0, 3, 20).unsqueeze(1)
    assert INT3_MIXED.widths(INT3_MIXED.encode(weight, 64)).tolist() == [1] * 20
    assert INT3_MIXED.widths(INT3_MIXED.encode(uneven, 64)).tolist() != [1] * 20
    for each in (weight, uneven):
        layout = layout_of("int3_mixed", 20, 100)
        stored = layout.pack({f"main.{name}": tensor for name, tensor in INT3_MIXED.encode(each, 32).parts.items()})
        assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == layout.stored_bytes
    assert storage.stored_bytes(20, 100, rows_packing()) == 20 * (25 + 13 + 4) + 5  # type: ignore[arg-type]
