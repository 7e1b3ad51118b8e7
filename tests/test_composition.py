"""Parts compose: every pair of choices that may go together runs on a small layer whose input was calibrated.

The axes are transform, main quantizer, its format, the rounding of activations, fit, the branch's format and the
rounding of its inputs. The combinations are a pairwise covering over the registry as it is, chosen greedily and the
same every time. What does not go together says so when it is bound, and is then no pair to cover. Of number formats of
one class, the one nearest to four bits stands for all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

from loraq import registry
from loraq.contracts import AbstractFormat, AbstractStage
from loraq.errors import InputError
from loraq.linear import PackedLinear
from loraq.pipeline import LayerRecipe, bind, make_stage, quantize_layer
from matrices import calibrated_context, correlated, trained


def representatives() -> list[str]:
    """One format with scales of each class and each kind of codes."""
    found: dict[tuple[type, bool], AbstractFormat] = {}
    for name in registry.names("loraq.format"):
        format = registry.load("loraq.format", name)
        assert isinstance(format, AbstractFormat)
        key = (type(format), format.integer)
        if name != "bfloat16" and (key not in found or abs(format.bits - 4) < abs(found[key].bits - 4)):
            found[key] = format
    return [format.name for format in found.values()]


AXES: dict[str, list[str]] = {
    "transform": registry.names("loraq.pre_transform"),
    "quantizer": registry.names("loraq.main_quantizer"),
    "main": representatives(),
    "activation": ["none", "int4", "int8", "fp8_e4m3", "mxint8"],
    "fit": registry.names("loraq.low_rank"),
    "branch": ["none", "int8", "int6", "int4", "mxfp6_e2m3", "int4_asymmetric"],
    "branch_activation": ["none", "int8", "int6", "mxfp8"],
}


def stages(row: dict[str, str]) -> list[AbstractStage]:
    """The stages of a combination, defaults for axes that `row` leaves out. Raises InputError as a recipe does."""
    weight = {"weight": row["main"]} if "main" in row else {}
    activation = row.get("activation", "int8")
    made = [make_stage("main_quantizer", row.get("quantizer", "rtn"), **weight, activation=activation)]
    if "transform" in row:
        made.insert(0, make_stage("pre_transform", row["transform"]))
    if "fit" in row:
        strategy: Any = registry.load("loraq.low_rank", row["fit"])
        options = {name: 5 for name in ("steps", "rounds") if name in attrs.fields_dict(strategy)}
        made.append(make_stage("low_rank", row["fit"], **({"rank": 6} if strategy.has_branch else {}), **options))
    if row.get("branch", "none") == "none":
        return [*made, make_stage("branch_quantizer", "none")]
    branch_activation = row.get("branch_activation", "int8")
    return [*made, make_stage("branch_quantizer", "rtn", weight=row["branch"], activation=branch_activation)]


@functools.cache
def _bound(chosen: tuple[tuple[str, str], ...]) -> LayerRecipe | None:
    try:
        return bind(stages(dict(chosen)))
    except InputError:
        return None


def bound(row: dict[str, str]) -> LayerRecipe | None:
    """The recipe of a combination, None where it is refused."""
    return _bound(tuple(sorted(row.items())))


def covering() -> list[tuple[str, ...]]:
    """Combinations in which every two choices of different axes that may go together meet at least once."""
    pairs = {
        ((first, a), (second, b))
        for first, second in itertools.combinations(AXES, 2)
        for a in AXES[first]
        for b in AXES[second]
        if bound({first: a, second: b}) is not None
    }
    chosen = []
    while pairs:
        (first, a), (second, b) = started = min(pairs)
        row = {first: a, second: b}
        for axis in AXES:
            if axis not in row:
                legal = [each for each in AXES[axis] if bound(row | {axis: each}) is not None]
                assert legal, f"nothing of {axis} goes with {row}"
                met = {each: sum(_pair(row | {axis: each}, axis, other) in pairs for other in row) for each in legal}
                row[axis] = max(legal, key=lambda each, met=met: met[each])  # type: ignore[misc]
        pairs -= {started, *(_pair(row, one, other) for one, other in itertools.combinations(AXES, 2))}
        chosen.append(tuple(row[axis] for axis in AXES))
    return chosen


def _pair(row: dict[str, str], one: str, other: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two axes' choices, in the order of the axes."""
    order = list(AXES)
    first, second = sorted((one, other), key=order.index)
    return (first, row[first]), (second, row[second])


COVERING = covering()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small are slower in several threads than in one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_choice_is_in_some_combination() -> None:
    for place, (axis, choices) in enumerate(AXES.items()):
        assert {row[place] for row in COVERING} == set(choices), axis


@pytest.mark.parametrize("quantizer", AXES["quantizer"])
def test_a_main_quantizer_takes_a_format_or_says_which_would_do(quantizer: str) -> None:
    for name in registry.names("loraq.format"):
        if bound({"quantizer": quantizer, "main": name}) is None:
            with pytest.raises(InputError, match=rf"weight.*'{name}'"):
                make_stage("main_quantizer", quantizer, weight=name)


@pytest.mark.parametrize("row", COVERING, ids="-".join)
def test_a_combination_keeps_its_promises(row: tuple[str, ...]) -> None:
    recipe = bound(dict(zip(AXES, row, strict=True)))
    assert recipe is not None
    weight = trained(40, 72, seed=3)
    layer = quantize_layer("layer", weight, recipe, seed=0, statistics=calibrated_context(72).statistics)
    assert layer.record.output_error_after is not None
    assert layer.record.output_error_before is not None
    assert layer.record.output_error_after <= layer.record.output_error_before * (1 + 1e-5)
    assert sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors.values()) == layer.layout.stored_bytes
    input = correlated(9, 72, seed=0)
    found = PackedLinear(layer.layout, layer.tensors)(input)
    wanted = input @ weight.T
    # Low-bit weights and activations are coarse, but the output must be of the layer, not of something else.
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.8
