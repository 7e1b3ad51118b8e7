"""The packed operation: against arithmetic written out by hand, over odd shapes, and under torch's own checks."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq import formats, ops
from loraq.activation import NONE, Activation
from loraq.formats import INT4, INT6, INT8, TableFormat
from loraq.layer import Coded
from loraq.layout import Layout
from loraq.linear import PackedLinear
from loraq.pipeline import QuantizedLayer, bind, make_stage, quantize_layer
from matrices import context, seeded, trained

TABLE = TableFormat("table", 3, (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0))


def packed(
    out: int = 24,
    inn: int = 70,
    *,
    rank: int = 5,
    weight: str = "int4",
    activation: object = "int4",
    branch: str = "int8",
    branch_activation: object = "int8",
    group: int | str = 64,
    transform: str = "hadamard",
) -> QuantizedLayer:
    stages = [
        make_stage("pre_transform", transform),
        make_stage("main_quantizer", "rtn", weight=weight, activation=activation, group=group),
    ]
    if rank:
        stages.append(make_stage("low_rank", "svd", rank=rank))
        stages.append(make_stage("branch_quantizer", "rtn", weight=branch, activation=branch_activation, group=group))
    return quantize_layer("layer", trained(out, inn, seed=1), bind(stages), seed=0)


def fused(one: numpy.float32, other: numpy.float32, total: numpy.float32) -> numpy.float32:
    """one · other + total, rounded once: the float32 next to the exact number, of two the one whose last bit is 0."""
    exact = Fraction(float(one)) * Fraction(float(other)) + Fraction(float(total))
    near = numpy.float32(float(exact))
    around = [near, *(numpy.nextafter(near, numpy.float32(end)) for end in (-numpy.inf, numpy.inf))]
    finite = [each for each in around if numpy.isfinite(each)]
    return min(finite, key=lambda each: (abs(Fraction(float(each)) - exact), int(each.view(numpy.int32)) & 1))


def by_hand(input: Coded, weight: Coded, before: numpy.ndarray | None = None) -> numpy.ndarray:
    """The product written out: integer sums, one segment after the other, in float32."""
    codes_x, codes_w = input.codes.numpy().astype(object), weight.codes.numpy().astype(object)
    scales_x, scales_w = input.scales.float().numpy(), weight.scales.float().numpy()
    tokens, rows, columns = input.shape[0], weight.shape[0], weight.shape[1]
    output = numpy.zeros((tokens, rows), numpy.float32)
    for token in range(tokens):
        for row in range(rows):
            start, total = 0, numpy.float32(0) if before is None else before[token, row]
            while start < columns:
                end = start
                integer = 0
                while end < columns and (end // input.group, end // weight.group) == (
                    start // input.group,
                    start // weight.group,
                ):
                    integer += codes_x[token, end] * codes_w[row, end]
                    end += 1
                scaled = numpy.float32(integer) * scales_w[row, start // weight.group]
                total = fused(scaled, scales_x[token, start // input.group], total)
                start = end
            output[token, row] = total
    return output


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 150),
    groups=st.tuples(st.sampled_from([1, 7, 32, 64, 1000]), st.sampled_from([5, 32, 64, 1000])),
    kinds=st.tuples(st.sampled_from([INT4, INT6, INT8]), st.sampled_from([INT4, INT6, INT8])),
    seed=st.integers(0, 1000),
)
def test_integer_products_are_exact(
    tokens: int,
    rows: int,
    columns: int,
    groups: tuple[int, int],
    kinds: tuple[formats.IntegerFormat, formats.IntegerFormat],
    seed: int,
) -> None:
    input = kinds[0].encode(seeded(tokens, columns, seed=seed), groups[0])
    weight = kinds[1].encode(seeded(rows, columns, seed=seed + 1), groups[1], full_range=True)
    assert numpy.array_equal(ops.product(input, weight).numpy(), by_hand(input, weight))


FLOATS = st.floats(min_value=2.0**-30, max_value=2.0**30, width=32).flatmap(lambda each: st.sampled_from([each, -each]))


@given(one=FLOATS, other=FLOATS, total=FLOATS, apart=st.none() | st.integers(-30, 60))
def test_multiply_add_rounds_once(one: float, other: float, total: float, apart: int | None) -> None:
    if apart is not None:  # a total 2^apart times the product, so that neither swallows the other
        total = one * other * 2.0**apart
    numbers = [numpy.float32(each) for each in (one, other, total)]
    first, second, before = (torch.full((2, 3), float(each)) for each in numbers)
    assert bool((ops.multiply_add(first, second[:, :1], before) == float(fused(*numbers))).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_multiply_add_next_to_the_middle_of_two_floats(sign: float) -> None:
    """What decides lies beyond float64: its sum is the middle itself, from where rounding goes to the even float."""
    one, odd, step = torch.ones(1, 1), torch.full((1, 1), 1 + 2.0**-23), 2.0**-23
    below = (2.0**-12 * (1 + step) * one, 2.0**-12 * (1 - step) * one)  # their product: 2^-24 - 2^-70
    above = (2.0**-12 * (1 + step) * one, 2.0**-12 * (1 + step) * one)  # 2^-24 + 2^-46 + 2^-70: float64 holds that
    middle = (2.0**-12 * one, 2.0**-12 * one)
    for (first, second), total, expected in (
        (below, odd, 1 + step),
        (middle, odd, 1 + 2 * step),
        (below, one, 1),
        (middle, one, 1),
        (above, one, 1 + step),
    ):
        assert ops.multiply_add(first * sign, second, total * sign).item() == sign * expected
    assert (below[0].double() * below[1].double() + odd.double()).float().item() != 1 + step, "float64 alone would do"


def test_multiply_add_of_what_is_no_number() -> None:
    infinite, one = torch.tensor([[torch.inf]]), torch.ones(1, 1)
    assert ops.multiply_add(infinite, one, one).item() == torch.inf
    assert ops.multiply_add(one, one, -infinite).item() == -torch.inf
    assert ops.multiply_add(infinite, one, -infinite).isnan().item()
    assert ops.multiply_add(one * torch.nan, one, one).isnan().item()
    large = torch.full((1, 1), 3e38)
    assert ops.multiply_add(large, large, one).item() == torch.inf


def test_many_numbers_are_taken_in_lots() -> None:
    first, total = seeded(700, 600), seeded(700, 600, seed=1)
    scale = seeded(700, 1, seed=2)
    rows = [ops.multiply_add(first[[row]], scale[[row]], total[[row]]) for row in (0, 436, 437, 699)]
    assert torch.equal(ops.multiply_add(first, scale, total)[[0, 436, 437, 699]], torch.cat(rows))


def test_the_branch_is_added_to_the_same_sum() -> None:
    layer = packed(inn=130, rank=70)
    layout, x = layer.layout, seeded(3, 130, seed=4)
    transformed = layout.transformed(x, layer.tensors)
    main = ops.quantize_activation(transformed, layout.activation)
    thin = ops.product(
        ops.quantize_activation(transformed, layout.branch_activation), layout.coded("down", layer.tensors)
    )
    thin_rounded, up = ops.quantize_activation(thin, layout.branch_activation), layout.coded("up", layer.tensors)
    assert isinstance(main, Coded)
    assert isinstance(thin_rounded, Coded)
    total = by_hand(thin_rounded, up, by_hand(main, layout.coded("main", layer.tensors)))
    assert numpy.array_equal(ops.reference(x, layer.tensors, None, layout).numpy(), total)


def test_long_rows_of_extreme_codes_stay_exact() -> None:
    columns = 4608
    codes = torch.full((1, columns), 127, dtype=torch.int8)
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    input = Coded(INT8, (1, columns), columns, {"codes": codes, "scales": ones})
    weight = Coded(INT8, (1, columns), columns, {"codes": codes, "scales": ones})
    assert ops.product(input, weight).item() == numpy.float32(127 * 127 * columns)


def test_tokens_of_zeros_give_the_bias() -> None:
    layer = packed()
    bias = seeded(24)
    module = PackedLinear(layer.layout, layer.tensors, bias)
    assert torch.equal(module(torch.zeros(2, 70)), bias.expand(2, -1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 0},
        {"activation": "int8"},
        {"activation": "none", "branch_activation": "none"},
        {"activation": {"format": "int8", "group": "token"}},
        {"weight": "int8", "branch": "int4"},
        {"branch": "int6", "branch_activation": "int6"},
        {"group": "row"},
        {"transform": "smooth"},
    ],
    ids=str,
)
def test_a_layer_is_its_formula(options: dict[str, object]) -> None:
    layer = packed(**options)  # type: ignore[arg-type]
    layout, tensors = layer.layout, layer.tensors
    input, bias = seeded(9, 70, seed=4), seeded(24, seed=5)
    transformed = layout.transformed(input, tensors)

    def rounded(values: torch.Tensor, kind: Activation) -> torch.Tensor:
        if kind.format is None:
            return values.double()
        return kind.format.encode(values, kind.group_for(values.shape[1])).decode().double()

    expected = rounded(transformed, layout.activation) @ layout.coded("main", tensors).decode().double().T
    if layout.rank:
        thin = rounded(transformed, layout.branch_activation) @ layout.coded("down", tensors).decode().double().T
        up = layout.coded("up", tensors).decode().double()
        expected += rounded(thin.float(), layout.branch_activation) @ up.T
    found = PackedLinear(layout, tensors, bias)(input)
    # An intermediate on the edge between two codes may fall to either side: float32 against float64.
    assert (found - (expected + bias)).abs().max() <= 2e-2 * expected.abs().max()
    assert ((found - (expected + bias)).abs() <= 1e-5 * expected.abs().max()).float().mean() > 0.7


def test_the_intermediate_is_really_rounded() -> None:
    fine = packed(branch_activation={"format": "int8", "group": 64})
    coarse = PackedLinear(Layout.from_plain(fine.layout.to_plain() | {"branch_activation": "int4"}), fine.tensors)
    input = seeded(50, 70, seed=4)
    assert not torch.equal(PackedLinear(fine.layout, fine.tensors)(input), coarse(input))


def test_activations_on_their_own_grid_come_through_unchanged() -> None:
    layer = packed(rank=0, transform="none", activation="int4")
    input = INT4.encode(seeded(5, 70), 64).decode()
    expected = input @ layer.layout.coded("main", layer.tensors).decode().T
    assert torch.allclose(PackedLinear(layer.layout, layer.tensors)(input), expected, atol=1e-4)


def test_a_format_without_integers_decodes() -> None:
    weight = TABLE.encode(seeded(6, 40), 16)
    input = INT8.encode(seeded(3, 40, seed=1), 64)
    assert torch.equal(ops.product(input, weight), input.decode() @ weight.decode().T)


def test_a_convolution_is_the_same_product() -> None:
    layer = packed()
    linear = PackedLinear(layer.layout, layer.tensors, seeded(24))
    convolution = PackedLinear(layer.layout, layer.tensors, seeded(24), convolution=True)
    picture = seeded(2, 70, 3, 5)
    expected = linear(picture.permute(0, 2, 3, 1).reshape(-1, 70)).reshape(2, 3, 5, 24).permute(0, 3, 1, 2)
    assert torch.equal(convolution(picture), expected)


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 0, 70), (2, 3, 70)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = packed()
    output = PackedLinear(layer.layout, layer.tensors)(torch.zeros(shape))
    assert output.shape == (*shape[:-1], 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_input_s_dtype(dtype: torch.dtype) -> None:
    layer = packed()
    module = PackedLinear(layer.layout, layer.tensors, seeded(24)).to(dtype)
    assert module(seeded(3, 70).to(dtype)).dtype == dtype
    assert all(torch.equal(module.stored()[name], tensor) for name, tensor in layer.tensors.items())


def test_memory_is_the_stored_bytes_and_nothing_more() -> None:
    layer = packed(rank=0)
    module = PackedLinear(layer.layout, layer.tensors)
    held = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert held == layer.layout.stored_bytes == 24 * 35 + 24 * 2 * 2


def test_dequantized_layers_compute_the_same_without_activation_rounding() -> None:
    layer = packed(activation="none", branch_activation="none")
    module = PackedLinear(layer.layout, layer.tensors, seeded(24))
    input = seeded(5, 70)
    assert torch.allclose(module.dequantized()(input), module(input), atol=1e-4)


def test_torch_checks_the_operation() -> None:
    layer = packed()
    tensors = list(layer.tensors.values())
    arguments = (seeded(3, 70), tensors, seeded(24), ops.layout_key(layer.layout))
    torch.library.opcheck(torch.ops.loraq.linear.default, arguments)


def test_compiles_as_one_graph() -> None:
    layer = packed()
    module = PackedLinear(layer.layout, layer.tensors, seeded(24))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        input = seeded(tokens, 70)
        assert torch.equal(compiled(input), module(input))


def test_exports() -> None:
    layer = packed()
    module = PackedLinear(layer.layout, layer.tensors, seeded(24))
    input = seeded(3, 70)
    program = torch.export.export(module, (input,))
    assert torch.equal(program.module()(input), module(input))


def test_inference_mode() -> None:
    layer = packed()
    module = PackedLinear(layer.layout, layer.tensors)
    with torch.inference_mode():
        assert module(seeded(3, 70)).shape == (3, 24)


@pytest.mark.parametrize("options", [{}, {"branch": "bfloat16", "branch_activation": "none"}, {"activation": "none"}])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_autocast_changes_nothing(
    options: dict[str, Any], kernel: bool, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = packed(**options)
    module, input = PackedLinear(layer.layout, layer.tensors, seeded(24)), seeded(5, 70)
    if not kernel:
        monkeypatch.setattr(ops, "kernel_for", lambda layout, device: None)
    if not direct:
        monkeypatch.setattr(ops, "unwatched", lambda *given: False)
    before = module(input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(input), before)


def test_a_layout_survives_its_plain_form() -> None:
    for options in ({}, {"rank": 0}, {"activation": "none"}, {"transform": "smooth"}, {"group": "row"}):
        layout = packed(**options).layout  # type: ignore[arg-type]
        assert Layout.from_plain(layout.to_plain()) == layout


def test_unregistered_strategies_run_in_this_process() -> None:
    layout = packed(rank=0).layout
    stored = TABLE.encode(seeded(24, 70), 64)
    mine = Layout(24, 70, 0, type(layout.main)(TABLE, 64), NONE, None, None, NONE, (), layout.packing)
    tensors = mine.pack({f"main.{name}": tensor for name, tensor in stored.parts.items()})
    assert torch.allclose(PackedLinear(mine, tensors)(torch.eye(70)), stored.decode().T)


def test_wrong_tensors_are_refused() -> None:
    layer = packed()
    spoilt = dict(layer.tensors) | {"main.codes": torch.zeros(3, 3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"'main.codes' must be uint8\[24, 35\]"):
        PackedLinear(layer.layout, spoilt)


def test_contexts_are_seeded_by_name_alone() -> None:
    first, second, other = context("a"), context("a"), context("b")
    assert torch.equal(torch.rand(3, generator=first.generator), torch.rand(3, generator=second.generator))
    assert not torch.equal(torch.rand(3, generator=context("a").generator), torch.rand(3, generator=other.generator))
