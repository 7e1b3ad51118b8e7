"""Quantize a module in memory: its layers are fitted in parallel (loraq/workers.py), and then put in place.

Layers are independent, and no result depends on how many workers there are or who finishes first. The module is changed
only after the last layer succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loraq.calibration import bytes_of, passes, reader
from loraq.collection import collect_in_memory, inputs_of, sizes_of
from loraq.errors import ModelError
from loraq.families import family_of
from loraq.input_statistics import NOTHING, InputStatistics
from loraq.linear import PackedLinear, link_shared
from loraq.match import MatchedLayer, grouped, idle_patterns, linear_weight, match_layers
from loraq.pipeline import Pipeline, QuantizedLayer, quantize_group
from loraq.progress import Progress
from loraq.report import Report, Skipped
from loraq.workers import Workers, in_parallel


def quantize_module(
    pipeline: Pipeline,
    module: nn.Module,
    *,
    family: str | None = None,
    calibrate: Callable[..., Any] | None = None,
    sample: int = 512,
    memory: int | str = "4 GiB",
) -> Report:
    """See `Pipeline.quantize`."""
    import loraq.diffusers as integration

    is_diffusers = integration.is_diffusers_model(module)
    chosen = family_of(family or type(module).__name__, diffusers=is_diffusers)
    matched, skipped = match_layers(module, pipeline, chosen)
    if any(not layer.name for layer in matched):
        raise ModelError(
            "the module itself is a linear layer and cannot be replaced in place; wrap it in a Sequential."
        )
    if any(isinstance(child, PackedLinear) for child in module.modules()):
        raise ModelError("the module holds packed layers already; quantize the 16-bit model instead.")
    if not matched:
        raise ModelError("the module has no layer left to quantize; look at skip, keep and the overrides.")
    if is_diffusers:  # what config.json cannot say is refused now, not when the layers are replaced
        integration.quantization_config({layer.name: layer.layout for layer in matched}, ())
    reading = next((layer for layer in matched if layer.recipe.statistics), None)
    if reading is not None and calibrate is None:
        raise ModelError(
            f"{reader(pipeline.stages, reading.recipe)}; give `calibrate=`, a callable that runs data through "
            "the module."
        )
    statistics: dict[str, InputStatistics] = {}

    # A model may lie on several devices; where none is named, each group is fitted on the first of its layers' own.
    own = "cpu" if pipeline.device == "auto" else pipeline.device
    workers = Workers.of(own, pipeline.workers, pipeline.threads)

    def fitted(group: list[MatchedLayer], _: None, device: torch.device) -> dict[str, QuantizedLayer]:
        weights = {}
        for layer in group:
            weight = linear_weight(module.get_submodule(layer.name))
            assert weight is not None, "matched layers are linear"
            if weight.is_meta:
                raise ModelError(f"layer '{layer.name}' is on the meta device: load the weights before quantizing.")
            weights[layer.name] = weight.detach()
        target = weights[group[0].name].device if pipeline.device == "auto" else device
        weights = {name: weight.to(target) for name, weight in weights.items()}
        known = statistics.get(group[0].name, NOTHING).to(target)
        return quantize_group(weights, group[0].recipe, seed=pipeline.seed, statistics=known)

    results: dict[str, QuantizedLayer] = {}
    with Progress("quantizing", sum(layer.out * layer.inn for layer in matched)) as progress:
        for lot in _lots(matched, sample, bytes_of(memory)):
            if calibrate is not None:  # the module is still what it was: fitted layers are put in place at the end
                leaders = [group[0] for group in lot]
                collected = collect_in_memory(module, leaders, calibrate, sample=sample, seed=pipeline.seed)
                statistics.clear()
                statistics.update(collected)
            for group, result in in_parallel(fitted, lot, workers=workers):
                results.update(result)
                progress.advance(sum(layer.out * layer.inn for layer in group), group[0].name)
    replace_layers(module, matched, results)
    if is_diffusers:
        integration.mark_quantized(module)
    return Report(
        layers=tuple(results[layer.name].record for layer in matched),
        skipped=tuple(Skipped(each.name, each.weights, each.reason) for each in skipped),
        warnings=idle_patterns(pipeline, [each.name for each in matched] + [each.name for each in skipped]),
    )


def _lots(matched: Sequence[MatchedLayer], sample: int, limit: int) -> list[list[list[MatchedLayer]]]:
    """The groups in lots whose statistics may be held at once; first those that ask for none."""
    groups = {group[0].name: group for group in grouped(matched)}
    sizes = sizes_of(inputs_of(("", layer) for layer in matched), sample)
    reading = [[groups[each.name] for each in lot] for lot in passes(sizes, limit)]
    rest = [group for group in groups.values() if not group[0].recipe.statistics]
    return ([rest] if rest else []) + reading


def replace_layers(
    module: nn.Module, matched: Sequence[MatchedLayer], results: Mapping[str, QuantizedLayer] | None
) -> dict[str, str]:
    """Put a PackedLinear where each layer is: with its result's tensors, or on the meta device where there are none.

    Returns which layers take their `down` from which.
    """
    for layer in matched:
        _replace_layer(module, layer, None if results is None else results[layer.name])
    shared = {layer.name: layer.down_from for layer in matched if layer.down_from is not None}
    link_shared(module, shared)
    return shared


def _replace_layer(module: nn.Module, layer: MatchedLayer, result: QuantizedLayer | None) -> None:
    """Put a PackedLinear where `layer` is: with the result's tensors, or on the meta device where there is none."""
    path, _, leaf = layer.name.rpartition(".")
    parent = module.get_submodule(path)
    old = parent.get_submodule(leaf)
    assert isinstance(old, nn.Linear | nn.Conv2d), "matched layers are linear"
    bias = None if old.bias is None else old.bias.detach()
    if result is None:
        packed = PackedLinear(layer.layout, None, bias, convolution=layer.convolution, device="meta")
    else:
        tensors = {name: tensor.to(old.weight.device) for name, tensor in result.tensors.items()}
        packed = PackedLinear(layer.layout, tensors, bias, convolution=layer.convolution)
        packed.count_writes()
    packed.train(old.training)
    setattr(parent, leaf, packed)
