"""Products in float32: 16-bit branches, activations that are not rounded, weights of formats without integers.

Against float64, within what the order of float32 sums may cost: (columns + some) half-ulps of the sum of magnitudes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.kernels.cpu.backend import CpuKernel
from loraq.kernels.cpu.float_repack import CodePanels, dense_panels
from random_layers import TRANSFORMS, inputs_of, layout_of, same, tensors_of
from torch import Tensor

from loraq import ops
from loraq.activation import Activation
from loraq.formats import named
from loraq.layout import Layout

BLOCKS = {"mxfp4": 32, "mxfp6_e2m3": 32, "mxfp8": 32, "mxint4": 32, "nvfp4": 16}
FORMATS = [
    "int2", "int4", "int6", "int8", "int4_asymmetric", "int4_offset", "int3_offset", "int4x2", "ternary", "fp8_e4m3",
    "fp8_e5m2", *BLOCKS,
]  # fmt: skip


def values_of(rows: Tensor, kind: Activation) -> Tensor:
    """What the rows are rounded to, float64."""
    coded = ops.quantize_activation(rows, kind)
    return (coded if isinstance(coded, Tensor) else coded.decode()).double()


def within(kernel: CpuKernel, layout: Layout, input: Tensor, bias: Tensor | None, seed: int = 0) -> None:
    """The output of float32 `input` is what float64 says, to the rounding of float32 sums in any order."""
    tensors = tensors_of(layout, seed)
    assert kernel.refusal(layout) is None
    output = kernel.linear(input, tensors, bias, layout)
    rows = layout.transformed(input.float(), tensors)
    weight = layout.coded("main", tensors).decode().double()
    main = values_of(rows, layout.activation)
    expected, magnitude = main @ weight.T, main.abs() @ weight.abs().T
    if layout.rank:
        assert layout.branch_activation.format is None, "of a rounded one, codes may differ by one"
        down, up = (layout.coded(name, tensors).decode().double() for name in ("down", "up"))
        expected = expected + rows.double() @ down.T @ up.T
        magnitude = magnitude + rows.double().abs() @ down.abs().T @ up.abs().T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    allowed = (layout.inn + layout.rank + 16) * 2.0**-24 * magnitude + 1e-37
    assert output.dtype == torch.float32
    assert ((output.double() - expected).abs() <= allowed).all()


@settings(max_examples=100)
@given(
    weight=st.sampled_from(FORMATS),
    activation=st.sampled_from(["none", "none", "mxfp8", "fp8_e4m3", "int8"]),
    shape=st.tuples(st.integers(1, 80), st.one_of(st.integers(1, 210), st.sampled_from([64, 320, 1030, 2100]))),
    tokens=st.integers(1, 40),
    group=st.sampled_from([1, 3, 16, 32, 64, 100, 5000]),
    rank=st.integers(0, 40),
    transforms=st.sampled_from(TRANSFORMS),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_layer(
    kernel: CpuKernel,
    weight: str,
    activation: str,
    shape: tuple[int, int],
    tokens: int,
    group: int,
    rank: int,
    transforms: tuple[str | dict[str, Any], ...],
    biased: bool,
    seed: int,
) -> None:
    layout = layout_of(
        *shape, min(rank, *shape), weight=weight, branch="bfloat16", activation=activation, branch_activation="none",
        group=BLOCKS.get(weight, group), transforms=transforms,
    )  # fmt: skip
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(seed)) if biased else None
    within(kernel, layout, inputs_of(tokens, shape[1], seed), bias, seed)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 77, 129, 300])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", ["none", "int4"])
def test_any_number_of_tokens(kernel: CpuKernel, tokens: int, threads: int, activation: str, two_threads: None) -> None:
    torch.set_num_threads(threads)
    layout = layout_of(
        100, 192, 64, activation=activation, branch="bfloat16", branch_activation="none", transforms=("hadamard",)
    )
    within(kernel, layout, inputs_of(tokens, 192), torch.randn(100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", ["none", "int8", "mxfp8"])
@pytest.mark.parametrize("transforms", [(), ("hadamard",)], ids=str)
def test_other_dtypes(kernel: CpuKernel, dtype: torch.dtype, activation: str, transforms: tuple[str, ...]) -> None:
    layout = layout_of(
        70, 192, 9, activation=activation, branch="bfloat16", branch_activation="none", transforms=transforms
    )
    tensors, input = tensors_of(layout), inputs_of(20, 192).to(dtype)
    bias = torch.randn(70).to(dtype)
    output, expected = (run(input, tensors, bias, layout) for run in (kernel.linear, ops.reference))
    assert output.dtype == dtype
    ulp = max(torch.finfo(dtype).eps, 1e-5)
    assert torch.allclose(output.float(), expected.float(), rtol=ulp, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("branch", ["bfloat16", "int8"])
def test_a_branch_with_one_side_in_integers_runs_in_torch_beside_it(kernel: CpuKernel, branch: str) -> None:
    rounding = "int8" if branch == "bfloat16" else "fp8_e4m3"
    layout = layout_of(70, 192, 9, branch=branch, branch_activation=rounding, transforms=("hadamard",))
    tensors, input = tensors_of(layout), inputs_of(20, 192)
    output, expected = (run(input, tensors, None, layout) for run in (kernel.linear, ops.reference))
    assert same(output, expected)


@settings(max_examples=60)
@given(
    name=st.sampled_from(FORMATS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 150),
    group=st.sampled_from([1, 2, 3, 16, 64, 1000]),
    seed=st.integers(0, 1000),
)
def test_panels_of_codes_are_the_matrix(name: str, rows: int, columns: int, group: int, seed: int) -> None:
    """Read back by their description, element by element."""
    format = named(name)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    coded = format.encode(values, BLOCKS.get(name, group))
    panels = CodePanels.of(coded)
    decoded = torch.full((rows, columns), torch.nan)
    table = (
        torch.arange(256).to(torch.uint8).view(torch.int8).float() if panels.decoding == "integers" else panels.values
    )
    for row in range(rows):
        for column in range(columns):
            panel, output = row // 32, row % 32
            if panels.decoding == "table of 16":
                code = int(panels.codes[panel, column // 2, output]) >> 4 * (column % 2) & 15
            else:
                code = int(panels.codes[panel, column, output])
            group_of = column // panels.group
            value = table[code] * panels.scales[panel, group_of, output]
            decoded[row, column] = value if panels.offsets is None else value + panels.offsets[panel, group_of, output]
    assert torch.equal(decoded, coded.decode())


def test_dense_panels_are_the_matrix() -> None:
    values = torch.randn(70, 9)
    panels = dense_panels(values)
    assert panels.shape == (3, 9, 32)
    assert torch.equal(panels.transpose(1, 2).reshape(96, 9)[:70], values)
    assert not panels.transpose(1, 2).reshape(96, 9)[70:].any()
