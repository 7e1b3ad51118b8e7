"""Whole layers against the reference, bit for bit: the thin rows included, so that no code of theirs differs either."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.kernels.cpu.backend import CpuKernel
from random_layers import FUSED, TRANSFORMS, inputs_of, layout_of, layouts, same, tensors_of

import contracts
from loraq import ops
from loraq.layout import Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def agrees(kernel: CpuKernel, layout: Layout, input: torch.Tensor, bias: torch.Tensor | None, seed: int = 0) -> None:
    tensors = tensors_of(layout, seed)
    assert kernel.refusal(layout) is None
    assert same(kernel.linear(input, tensors, bias, layout), ops.reference(input, tensors, bias, layout))


@settings(max_examples=100)
@given(
    layout=layouts(),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 2.0**-120, 2.0**-60, 2.0**40]),
    seed=st.integers(0, 1000),
)
def test_bit_for_bit(
    kernel: CpuKernel, layout: Layout, tokens: int, dtype: torch.dtype, biased: bool, scale: float, seed: int
) -> None:
    input = inputs_of(tokens, layout.inn, seed, scale).to(dtype)
    bias = torch.randn(layout.out, generator=torch.Generator().manual_seed(seed)).to(dtype) if biased else None
    agrees(kernel, layout, input, bias, seed)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 16, 77, 127, 129, 1000])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_tokens(kernel: CpuKernel, tokens: int, threads: int, two_threads: None) -> None:
    torch.set_num_threads(threads)
    layout = layout_of(100, 192, 64, transforms=("hadamard",))
    agrees(kernel, layout, inputs_of(tokens, 192), torch.randn(100))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_a_cut_in_many_parts(kernel: CpuKernel, threads: int, two_threads: None) -> None:
    torch.set_num_threads(threads)
    layout = layout_of(1100, 576, 32)
    for tokens in (5, 16, 40, 300):
        agrees(kernel, layout, inputs_of(tokens, 576), None)


@pytest.mark.parametrize("transforms", TRANSFORMS, ids=str)
def test_online_transforms(kernel: CpuKernel, transforms: tuple[str | dict[str, object], ...]) -> None:
    """Rotations, their signs and smoothings, in the kernel or in torch before it."""
    layout = layout_of(70, 192, 9, transforms=transforms)
    agrees(kernel, layout, inputs_of(20, 192), None)
    assert kernel._prepared(tensors_of(layout), layout).fused == (transforms in FUSED)


@pytest.mark.parametrize("weight", ["int4", "int8"])
def test_extreme_codes_over_long_rows(kernel: CpuKernel, weight: str) -> None:
    layout = layout_of(3, 4608, weight=weight, activation={"format": "int8", "group": "token"}, group=4608)
    agrees(kernel, layout, torch.ones(5, 4608), None)
    agrees(kernel, layout, -torch.ones(5, 4608), None)


def test_what_is_not_a_number_stays_so(kernel: CpuKernel) -> None:
    layout = layout_of(40, 128)
    input = inputs_of(4, 128)
    input[1, 3] = torch.nan
    output = kernel.linear(input, tensors_of(layout), None, layout)
    assert output[1].isnan().all()
    assert not output[2:].isnan().any()


@pytest.mark.parametrize("bits", ["int4", "int6", "int8"])
@pytest.mark.parametrize("group", [32, 64, "token"])
@settings(max_examples=30)
@given(inn=st.integers(1, 200), scale=st.sampled_from([1.0, 2.0**-125, 2.0**30]), seed=st.integers(0, 1000))
def test_rounding_is_the_format_s(
    kernel: CpuKernel, bits: str, group: int | str, inn: int, scale: float, seed: int
) -> None:
    """Through a layer whose weight is the identity, which shows code times scale."""
    layout = layout_of(inn, inn, weight="int8", activation={"format": bits, "group": group}, group=32)
    storage = layout.main
    parts = {"codes": torch.eye(inn, dtype=torch.int8), "scales": torch.ones(inn, -(-inn // 32), dtype=torch.bfloat16)}
    tensors = layout.pack({f"main.{name}": part for name, part in parts.items()})
    assert storage.group == 32
    input = inputs_of(6, inn, seed, scale)
    # Numbers half way between two codes, so that ties are met.
    input[5] = (torch.arange(inn) % 13 - 6.5) * scale
    assert layout.activation.format is not None
    expected = layout.activation.format.encode(input, layout.activation.group_for(inn)).decode()
    assert same(kernel.linear(input, tensors, None, layout), expected)


def test_input_that_is_not_contiguous(kernel: CpuKernel) -> None:
    layout = layout_of(40, 70)
    agrees(kernel, layout, inputs_of(70, 9).T, None)


@pytest.mark.parametrize("options", [{}, {"rank": 9}, {"weight": "int8", "transforms": ("smooth",)}], ids=str)
def test_contract(kernel: CpuKernel, options: dict[str, object]) -> None:
    layout = layout_of(70, 130, **options)  # type: ignore[arg-type]
    contracts.kernel(kernel, tensors_of(layout), layout)
