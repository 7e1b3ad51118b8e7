"""Parts compose: every pair of choices (transform, main format, fit, branch format, activation) runs on a small layer.

The combinations are a pairwise covering, chosen greedily and the same every time, over the registry as it is.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from loraq import registry
from loraq.linear import PackedLinear
from loraq.pipeline import bind, make_stage, quantize_layer
from matrices import seeded, trained

AXES: dict[str, list[str]] = {
    "transform": registry.names("loraq.pre_transform"),
    "main": [name for name in registry.names("loraq.format") if name != "bfloat16"],
    "activation": ["none", "int4", "int8", "fp8_e4m3", "mxint8"],
    "fit": registry.names("loraq.low_rank"),
    "branch": ["none", "int8", "int6", "int4", "mxfp6_e2m3", "int4_asymmetric"],
    "branch_activation": ["none", "int8", "int6", "mxfp8"],
}


def covering() -> list[tuple[str, ...]]:
    """Combinations in which every two choices of different axes meet at least once."""
    pairs = {
        ((first, a), (second, b))
        for first, second in itertools.combinations(AXES, 2)
        for a in AXES[first]
        for b in AXES[second]
    }
    chosen = []
    while pairs:
        (first, a), (second, b) = min(pairs)
        row = {first: a, second: b}
        for axis in AXES:
            if axis not in row:
                met = {
                    each: sum(_pair(row | {axis: each}, axis, other) in pairs for other in row) for each in AXES[axis]
                }
                row[axis] = max(AXES[axis], key=lambda each, met=met: met[each])  # type: ignore[misc]
        pairs -= {_pair(row, one, other) for one, other in itertools.combinations(AXES, 2)}
        chosen.append(tuple(row[axis] for axis in AXES))
    return chosen


def _pair(row: dict[str, str], one: str, other: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two axes' choices, in the order of the axes."""
    order = list(AXES)
    first, second = sorted((one, other), key=order.index)
    return (first, row[first]), (second, row[second])


@pytest.mark.parametrize("row", covering(), ids="-".join)
def test_a_combination_keeps_its_promises(row: tuple[str, ...]) -> None:
    transform, main, activation, fit, branch, branch_activation = row
    stages = [
        make_stage("pre_transform", transform),
        make_stage("main_quantizer", "rtn", weight=main, activation=activation),
        make_stage(
            "low_rank", fit, **({} if fit == "none" else {"rank": 6}), **({"steps": 5} if fit == "loraq" else {})
        ),
        make_stage("branch_quantizer", "none")
        if branch == "none"
        else make_stage("branch_quantizer", "rtn", weight=branch, activation=branch_activation),
    ]
    weight = trained(40, 72, seed=3)
    layer = quantize_layer("layer", weight, bind(stages), seed=0)
    assert layer.record.error_after <= layer.record.error_before * (1 + 1e-5)
    assert sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors.values()) == layer.layout.stored_bytes
    input = seeded(9, 72, seed=1)
    found = PackedLinear(layer.layout, layer.tensors)(input)
    wanted = input @ weight.T
    # Low-bit weights and activations are coarse, but the output must be of the layer, not of something else.
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.8
