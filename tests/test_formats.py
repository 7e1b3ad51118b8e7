"""Number formats and activations: properties over weights of odd shapes and sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraq import formats, registry
from loraq.activation import Activation, activation
from loraq.errors import LoraqError
from loraq.formats import BFLOAT16, INT4, INT6, INT8, IntegerFormat, TableFormat
from loraq.layer import Coded
from matrices import groups, seeded, weights_OI

integers = st.sampled_from([INT4, INT6, INT8, IntegerFormat("int2", 2)])


def scales_of(coded: Coded) -> Tensor:
    """Each element's scale, (rows, columns)."""
    return coded.scales.float().repeat_interleave(coded.group, dim=1)[:, : coded.shape[1]]


@given(weight=weights_OI(), format=integers, group=groups, full_range=st.booleans())
def test_codes_stay_in_range(weight: Tensor, format: IntegerFormat, group: int, full_range: bool) -> None:
    codes = format.encode(weight, group, full_range=full_range).codes
    assert codes.max() <= format.limit
    assert codes.min() >= -format.limit - full_range


@given(weight=weights_OI(), format=integers, group=groups)
def test_amax_is_within_half_a_step(weight: Tensor, format: IntegerFormat, group: int) -> None:
    coded = format.encode(weight, group)
    # The stored scale is rounded to bfloat16, so the largest element may lie a little above the top of the grid.
    clipped = (weight.abs() / scales_of(coded)) > format.limit + 0.5
    error = (weight - coded.decode()).abs()
    assert (error[~clipped] <= scales_of(coded)[~clipped] * (0.5 + 1e-4)).all()


@given(weight=weights_OI(), format=integers, group=groups)
def test_encoding_decoded_values_gives_the_same_values(weight: Tensor, format: IntegerFormat, group: int) -> None:
    """Up to the scale's own rounding: the largest decoded magnitude over the top is the scale again."""
    once = format.encode(weight, group).decode()
    assert torch.equal(format.encode(once, group).decode(), once)


@given(weight=weights_OI(), format=integers, group=groups, power=st.integers(-20, 20))
def test_powers_of_two_scale_through(weight: Tensor, format: IntegerFormat, group: int, power: int) -> None:
    coded, scaled = format.encode(weight, group), format.encode(weight * 2.0**power, group)
    assert torch.equal(coded.codes, scaled.codes)
    assert torch.equal(coded.decode() * 2.0**power, scaled.decode())


@given(weight=weights_OI(), format=integers, group=groups)
def test_negating_negates(weight: Tensor, format: IntegerFormat, group: int) -> None:
    assert torch.equal(format.encode(-weight, group).decode(), -format.encode(weight, group).decode())


@given(weight=weights_OI(largest=40), format=integers, group=st.sampled_from([3, 32, 64]), more=st.integers(1, 90))
def test_columns_of_zeros_behind_change_nothing(weight: Tensor, format: IntegerFormat, group: int, more: int) -> None:
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, more))
    assert torch.equal(format.encode(padded, group).decode()[:, :columns], format.encode(weight, group).decode())


@given(weight=weights_OI(), group=groups)
def test_a_table_gives_the_nearest_value(weight: Tensor, group: int) -> None:
    table = (-1.0, -0.4, -0.1, 0.0, 0.3, 1.0)
    coded = TableFormat("table", 3, table).encode(weight, group)
    grid = scales_of(coded).unsqueeze(-1) * torch.tensor(table)
    nearest = (weight.unsqueeze(-1) - grid).abs().amin(dim=-1)
    found = (weight - coded.decode()).abs()
    assert (found <= nearest * (1 + 1e-5) + scales_of(coded) * 1e-6).all()


@pytest.mark.parametrize("format", [INT4, INT6, INT8], ids=["int4", "int6", "int8"])
def test_huge_and_tiny_values_do_not_overflow(format: IntegerFormat) -> None:
    weight = torch.tensor([[3e38, -3e38, 1.0], [1e-38, 0.0, -1e-38]])
    decoded = format.encode(weight, 64).decode()
    assert torch.isfinite(decoded).all()
    assert torch.allclose(decoded, weight, rtol=0.02, atol=float(3e38 / format.limit))


def test_known_codes() -> None:
    weight = torch.tensor([[7.0, -7.0, 3.5, 2.5, 0.4, -0.6]])
    coded = INT4.encode(weight, 64)
    assert coded.scales.tolist() == [[1.0]]
    assert coded.codes.tolist() == [[7, -7, 4, 2, 0, -1]]  # ties to even


def test_sixteen_bit_values_are_rounded_once() -> None:
    weight = seeded(3, 5)
    assert torch.equal(BFLOAT16.encode(weight, 5).decode(), weight.bfloat16().float())


def test_coded_checks_its_parts() -> None:
    with pytest.raises(ValueError, match=r"expected int8\[2, 3\]"):
        Coded(INT4, (2, 3), 64, {"codes": torch.zeros(2, 4, dtype=torch.int8), "scales": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match="int4 has"):
        Coded(INT4, (2, 3), 64, {})


def test_a_repr_shows_no_values() -> None:
    assert "int8[2, 3]@cpu" in repr(INT4.encode(seeded(2, 3), 64))


def test_formats_by_name() -> None:
    assert formats.named("int6") is INT6
    with pytest.raises(LoraqError, match="did you mean 'int4'"):
        formats.named("init4")
    with pytest.raises(ValueError, match="ascending"):
        TableFormat("bad", 2, (1.0, 0.0))


class NoReciprocals(TorchDispatchMode):
    """Fails where values are divided by a Python number: by its reciprocal, on a GPU, which is another division unless
    the number is a power of two. (0-dimensional tensors count as numbers there unless they lie on the GPU themselves.)
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "div" in str(func) and isinstance(args[0], Tensor) and not isinstance(args[1], Tensor):
            assert abs(math.frexp(args[1])[0]) == 0.5, f"{func} by {args[1]}"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", registry.names("loraq.format"))
def test_a_gpu_gives_the_same_codes(name: str) -> None:
    format = formats.named(name)
    with NoReciprocals():
        format.encode(seeded(3, 96), 32)
        format.encode(seeded(3, 96), 32, formats.largest(seeded(3, 96), 32) * 0.9)


def test_dividing_by_a_number_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"div.* by 7"), NoReciprocals():
        seeded(2, 2) / 7
    assert torch.equal(formats.quotient(seeded(40, 40), 7), seeded(40, 40) / 7)


def test_activations_from_recipes() -> None:
    assert activation("int8") == Activation(INT8, 64)
    assert activation({"format": "int4", "group": "token"}) == Activation("int4", "token")
    assert activation("none").format is None
    for each in ("int8", "none", {"format": "int4", "group": "token"}, {"format": "int4", "group": 32}):
        assert activation(activation(each).to_plain()) == activation(each)
    with pytest.raises(LoraqError, match="did you mean 'group'"):
        activation({"format": "int4", "groups": 3})
    with pytest.raises(LoraqError, match="needs 'format'"):
        activation({"group": 3})
    with pytest.raises(ValueError, match="'token'"):
        activation({"format": "int4", "group": True})
