"""Whole layers in the emulator against the torch reference, bit for bit: random odd shapes, and each way by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.kernels.cuda import plan, runner
from loraq.kernels.cuda.backend import CudaKernel
from loraq.kernels.cuda.emulated import EmulatedDevice
from loraq.kernels.cuda.matmul import Matmul
from random_layers import FUSED, SIGNED, inputs_of, layout_of, layouts, same, tensors_of
from torch import Tensor

from loraq import ops
from loraq.layout import Layout

TOKEN_INT8 = {"format": "int8", "group": "token"}
TOKEN_INT4 = {"format": "int4", "group": "token"}


def agrees(
    layout: Layout,
    tokens: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    architecture: str = "90",
    bias: bool = True,
    seed: int = 0,
) -> list[str]:
    """Check a layer against the reference; the kernels that ran, by name."""
    device = EmulatedDevice(architecture)
    kernel = CudaKernel(device)
    assert kernel.refusal(layout) is None
    tensors = tensors_of(layout, seed)
    added = torch.randn(layout.out, generator=torch.Generator().manual_seed(seed)) if bias else None
    input = inputs_of(tokens, layout.inn, seed).to(dtype)
    output = kernel.linear(input, tensors, added, layout)
    assert same(output, ops.reference(input, tensors, added, layout))
    assert all(device.unwritten(made.keeper) == 0 for made in device.outputs if made.keeper.dtype != torch.uint8)
    return [type(program).__name__ for program in device.programs]


@given(layouts(), st.integers(1, 4), st.booleans(), st.integers(0, 3))
@settings(max_examples=20)
def test_any_integer_layer_is_the_reference_s(layout: Layout, tokens: int, bias: bool, seed: int) -> None:
    if CudaKernel(EmulatedDevice()).refusal(layout) is None:
        agrees(layout, tokens, bias=bias, seed=seed)


@st.composite
def tensor_core_layouts(draw: st.DrawFn) -> Layout:
    """Layouts that the tensor-core kernels take."""
    out, inn = draw(st.integers(1, 150)), draw(st.integers(1, 700))
    rank = draw(st.one_of(st.just(0), st.integers(1, 140)))

    def activation() -> Any:
        return {
            "format": draw(st.sampled_from(["int4", "int6", "int8"])),
            "group": draw(st.sampled_from([64, 128, "token"])),
        }

    first = activation()
    layout = layout_of(
        out,
        inn,
        rank,
        weight=draw(st.sampled_from(["int2", "int3", "int4", "int6", "int8", "ternary", "int4_asymmetric", "int4x2"])),
        branch=draw(st.sampled_from(["int4", "int6", "int8", "ternary", "int4_asymmetric"])),
        activation=first,
        branch_activation=draw(st.one_of(st.just(first), st.builds(activation))),
        group=draw(st.sampled_from([64, 128])),
        transforms=draw(st.sampled_from(FUSED)),
    )
    assert plan.misfit(layout, "main") is None
    return layout


@given(
    tensor_core_layouts(),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["80", "90", "90a"]),
    st.integers(0, 3),
    st.sampled_from([0, 512]),
    st.sampled_from([0, 264]),
)
@settings(max_examples=16)
def test_tensor_core_layers_are_the_reference_s(
    layout: Layout, tokens: int, dtype: torch.dtype, architecture: str, seed: int, split: int, wide: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "SPLIT_TOKENS", split)
        patch.setattr(runner, "WIDE_BLOCKS", wide)
        agrees(layout, tokens, dtype=dtype, architecture=architecture, seed=seed, bias=seed % 2 == 0)


W4A4 = {"activation": "int4", "branch": "int4", "branch_activation": "int8", "transforms": (SIGNED,)}
"""The shipped recipes' layers."""


class TestWays:
    """Which kernels run what."""

    @pytest.mark.parametrize("architecture", ["86", "90"])
    @pytest.mark.parametrize(
        ("tokens", "names"),
        [(3, ["Quantizer", "Thin", "Skinny"]), (20, ["Quantizer", "Thin", "Matmul"]), (21, ["Quantizer", "Matmul"])],
    )
    def test_the_shipped_recipes(
        self, architecture: str, tokens: int, names: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runner, "SPLIT_TOKENS", 20)
        found = agrees(layout_of(96, 384, 100, **W4A4), tokens, dtype=torch.bfloat16, architecture=architecture)
        assert found == names

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_every_type(self, dtype: torch.dtype) -> None:
        agrees(layout_of(33, 100, 8), dtype=dtype)

    @pytest.mark.parametrize("tokens", [129, 200])
    def test_more_tokens_than_a_block(self, tokens: int) -> None:
        agrees(layout_of(70, 64, 8), tokens)

    @pytest.mark.parametrize("architecture", ["86", "90", "90a"])
    @pytest.mark.parametrize("rank", [0, 100, 200])
    @pytest.mark.parametrize("group", [128, "token"])
    @pytest.mark.parametrize("tokens", [3, 20, 130])
    def test_groups_of_128_columns(
        self, architecture: str, rank: int, group: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A segment is two groups of 64, also where the columns are not whole segments."""
        monkeypatch.setattr(runner, "SPLIT_TOKENS", 20)
        first, second = {"format": "int4", "group": group}, {"format": "int8", "group": group}
        layout = layout_of(
            70, 64 * 6 + 70, rank, activation=first, branch_activation=second, group=128, transforms=(SIGNED,)
        )
        planned = plan.Plan.of(layout)
        assert planned.span == 2
        assert bool(planned.rank) == (rank > 0 and (rank <= 128 or group == 128))
        found = agrees(layout, tokens, architecture=architecture, dtype=torch.bfloat16)
        assert found[-1] == ("Skinny" if tokens == 3 else "Matmul")

    @pytest.mark.parametrize("tokens", [3, 20])
    @pytest.mark.parametrize(
        "weight", ["int3_asymmetric", "int4_asymmetric", "int6_asymmetric", "ternary", "int4_mixed", "int4x2"]
    )
    def test_formats_whose_integers_fit_a_byte(self, weight: str, tokens: int) -> None:
        layout = layout_of(70, 200, 9, weight=weight, activation={"format": "int8", "group": 64})
        planned = plan.Plan.of(layout)
        assert (planned.weight_bits, planned.integers) == (4 if weight == "ternary" else 8, False)
        assert agrees(layout, tokens) == ["Quantizer", "Thin", "Skinny" if tokens == 3 else "Matmul"]

    @pytest.mark.parametrize("architecture", ["80", "86", "90"])
    @pytest.mark.parametrize("activation", ["int4", "int8"])
    def test_wide_warps(self, architecture: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "SPLIT_TOKENS", 20)
        monkeypatch.setattr(runner, "WIDE_BLOCKS", 4)
        layout = layout_of(70, 64 * 6 + 5, 100, **(W4A4 | {"activation": activation}))
        plans = plan.Plan.of(layout)
        assert runner.size_of(plans, 128) == runner.MANY
        assert runner.size_of(plans, 130) == runner.PLENTY
        assert runner.Way.of(plans, runner.PLENTY, architecture).wide == (architecture != "86")
        assert agrees(layout, 130, architecture=architecture) == ["Quantizer", "Matmul"]

    def test_a_longer_run_than_the_ring(self) -> None:
        agrees(layout_of(40, 64 * 9 + 5, 70), 17)

    @pytest.mark.parametrize("tokens", [2, 17])
    def test_a_large_branch(self, tokens: int) -> None:
        assert "Thin" in agrees(layout_of(40, 100, 300), tokens)

    def test_more_rounds_than_one_with_few_tokens(self) -> None:
        agrees(layout_of(24, 64 * 33 + 5, 10), 16)

    def test_one_scale_a_token(self) -> None:
        agrees(layout_of(40, 700, 100, activation=TOKEN_INT8, branch_activation=TOKEN_INT4, transforms=(SIGNED,)), 17)

    @pytest.mark.parametrize("group", [128, 10_000])
    def test_larger_groups_of_weights(self, group: int) -> None:
        assert agrees(layout_of(40, 300, 100, group=group)) == ["Quantizer", "Thin", "Skinny"]

    @pytest.mark.parametrize("architecture", ["80", "90"])
    @pytest.mark.parametrize("activation", [TOKEN_INT8, TOKEN_INT4], ids=["int8", "int4"])
    def test_two_level_scales(self, activation: Any, architecture: str) -> None:
        layout = layout_of(70, 700, 100, weight="int4x2", activation=activation, transforms=(SIGNED,))
        names = agrees(layout, 3, architecture=architecture)
        assert names == ["Quantizer", "Hopper" if architecture == "90" else "Matmul"]

    @pytest.mark.parametrize("weight", ["int4", "int8"])
    def test_one_scale_a_row_on_both_sides(self, weight: str) -> None:
        names = agrees(layout_of(70, 700, 9, weight=weight, group=1000, activation=TOKEN_INT8), 3)
        assert names == ["Quantizer", "Hopper" if weight == "int4" else "Matmul"]

    @pytest.mark.parametrize("rank", [0, 9, 100])
    def test_hopper_s_own_product_group_by_group(self, rank: int) -> None:
        layout = layout_of(140, 330, rank, activation="int4", branch_activation="int8")
        names = agrees(layout, 3, dtype=torch.bfloat16, architecture="90a")
        assert names == ["Quantizer", *(["Thin"] if rank else []), "Hopper"]

    @pytest.mark.parametrize(("out", "tokens"), [(33, 5), (200, 3), (64, 130)])
    def test_hopper_s_own_product(self, out: int, tokens: int) -> None:
        layout = layout_of(out, 330, weight="int4x2", activation=TOKEN_INT8)
        assert agrees(layout, tokens, dtype=torch.bfloat16) == ["Quantizer", "Hopper"]

    @pytest.mark.parametrize("weight", ["ternary", "int4_asymmetric", "mxint4", "mxint8"])
    def test_other_groups_take_the_plain_kernel(self, weight: str) -> None:
        assert agrees(layout_of(40, 70, 9, weight=weight, group=32, branch="ternary"))[0] == "Plain"

    def test_sixteen_bit_codes(self) -> None:
        assert agrees(layout_of(40, 70, weight="int8_asymmetric")) == ["Plain"]

    @pytest.mark.parametrize("branch", ["bfloat16", "nvfp4"])
    def test_a_branch_without_integers_runs_in_torch(self, branch: str) -> None:
        assert agrees(layout_of(40, 70, 9, branch=branch, group=16)) == ["Plain"]
        assert agrees(layout_of(40, 60, 9, branch=branch, group=64)) == ["Quantizer", "Skinny"]

    def test_a_rotation_beyond_128(self) -> None:
        wide = {"strategy": "hadamard", "largest_block": 256}
        assert agrees(layout_of(40, 256, 9, transforms=(wide,)), 17) == ["Quantizer", "Thin", "Matmul"]

    def test_formats_without_integers_are_refused(self) -> None:
        reason = CudaKernel(EmulatedDevice()).refusal(layout_of(8, 64, weight="nvfp4", group=16))
        assert reason == "the CUDA kernels multiply integers, and the main matrix is nvfp4"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-38, 1e38])
def test_extreme_inputs_are_the_reference_s(value: float) -> None:
    layout = layout_of(40, 128, 9)
    tensors, input = tensors_of(layout), inputs_of(5, 128)
    input[2, 70] = value
    output = CudaKernel(EmulatedDevice()).linear(input, tensors, None, layout)
    wanted = ops.reference(input, tensors, None, layout)
    assert torch.equal(output.isfinite(), wanted.isfinite())
    finite: Tensor = wanted.isfinite()
    assert torch.equal(output[finite], wanted[finite])


@given(
    st.lists(st.floats(-149, 127), min_size=16, max_size=16),
    st.sampled_from(["int4", "int6", "int8"]),
    st.integers(0, 3),
)
@settings(max_examples=30)
def test_codes_at_either_end_of_float32_are_the_reference_s(exponents: list[float], format: str, seed: int) -> None:
    """Scales from the smallest to the largest, and values in the middle of two codes.

    Below the normal numbers, where a scale may be a third too small, the kernels' codes are 0 (codes.py).
    """
    layout = layout_of(16, 64, activation=format)
    tensors = tensors_of(layout, seed)
    halves = torch.randint(-255, 256, (16, 64), generator=torch.Generator().manual_seed(seed)) / 2
    halves[:, 0] = 127
    input = halves * torch.exp2(torch.tensor(exponents).unsqueeze(1).floor() - 6)
    device = EmulatedDevice()
    output = CudaKernel(device).linear(input, tensors, None, layout)
    coded = ops.quantize_activation(input, layout.activation)
    normal = coded.scales.float() >= 2.0**-126
    expected = ops.reference(input, tensors, None, layout)
    assert same(output, torch.where(normal, expected, torch.zeros(())))
    codes = next(made.keeper for made in device.outputs if made.keeper.dtype == torch.uint8)[: 16 * 64]
    assert torch.equal(codes.view(torch.int8).view(16, 64), coded.codes * normal)


@pytest.mark.parametrize("architecture", ["86", "120"])
@pytest.mark.parametrize("inn", [40, 64, 190, 400])
def test_a_shorter_ring(architecture: str, inn: int) -> None:
    """Where a multiprocessor has 100 KB, with less and more groups than the ring has stages."""
    device, layout = EmulatedDevice(architecture), layout_of(40, inn, 9, activation="int4")
    tensors, input = tensors_of(layout), inputs_of(20, inn)
    output = CudaKernel(device).linear(input, tensors, None, layout)
    assert [each.stages for each in device.programs if isinstance(each, Matmul)] == [3]
    assert same(output, ops.reference(input, tensors, None, layout))
