"""Which layers of a module are quantized, and why the others are not: decided by class, never by a weight's shape.

A layer is linear if it is an `nn.Linear` or a `Conv2d` that is a product in disguise: kernel 1x1, stride 1, no padding,
one group (SANA keeps most of its weights in those). A subclass with a forward of its own is left alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

import attrs
from torch import Tensor, nn

from loraq.errors import InputError, did_you_mean
from loraq.families import Family
from loraq.layout import Layout
from loraq.pipeline import LayerRecipe, Pipeline
from loraq.recipe import Override
from loraq.structure import keys_of


@attrs.frozen
class MatchedLayer:
    """A layer that will be quantized."""

    name: str
    out: int
    inn: int
    convolution: bool
    bias: bool
    recipe: LayerRecipe = attrs.field(repr=False)
    layout: Layout = attrs.field(repr=False)
    down_from: str | None = None
    """The layer that stores this one's `down`, None where it stores its own."""

    @property
    def leader(self) -> str:
        """The name of the first layer of the group that this one is fitted with."""
        return self.down_from or self.name


def grouped(layers: Iterable[MatchedLayer]) -> list[list[MatchedLayer]]:
    """The layers in groups that are fitted as one, each as its leader comes first."""
    groups: dict[str, list[MatchedLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.leader, []).append(layer)
    return list(groups.values())


@attrs.frozen
class SkippedLayer:
    """A layer with weights that stays as it is, and why."""

    name: str
    weights: int
    reason: str


def linear_weight(module: nn.Module) -> Tensor | None:
    """The (out, inn) weight of a linear layer, None for a module that is none."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention's out_proj: it takes the weight and never calls the module
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return module.weight
    if isinstance(module, nn.Conv2d) and _is_pointwise(module):
        return module.weight.flatten(1)
    return None


def _is_pointwise(module: nn.Conv2d) -> bool:
    return (
        type(module).forward is nn.Conv2d.forward
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def _matching(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that matches."""
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def match_layers(
    module: nn.Module, pipeline: Pipeline, family: Family
) -> tuple[tuple[MatchedLayer, ...], tuple[SkippedLayer, ...]]:
    """The layers of `module` that the pipeline quantizes, and those it leaves, in the module's order."""
    matched: list[MatchedLayer] = []
    skipped: list[SkippedLayer] = []
    defaults = _weight_only(family, pipeline)
    recipes: dict[tuple[bool, ...], LayerRecipe | None] = {}
    layouts: dict[tuple[tuple[bool, ...], int, int], Layout] = {}
    for name, child, weight in _with_weights(module):
        reason = _reason_to_skip(name, child, weight, pipeline, family)
        if reason is None and weight is not None:
            # Layers that the same overrides match share one bound recipe.
            key = tuple(override.matches(name) for override in (*defaults, *pipeline.overrides))
            if key not in recipes:
                try:
                    recipes[key] = pipeline.layer_recipe(name, defaults)
                except InputError as error:  # each table was judged alone; together they may not go
                    raise InputError(f"layer '{name}', with all [[layers]] tables that match it: {error}") from None
            recipe = recipes[key]
            if recipe is not None:
                out, inn = weight.shape
                convolution = isinstance(child, nn.Conv2d)
                has_bias = getattr(child, "bias", None) is not None
                if (key, out, inn) not in layouts:
                    layouts[key, out, inn] = recipe.layout(out, inn)
                layout = layouts[key, out, inn]
                matched.append(MatchedLayer(name, out, inn, convolution, has_bias, recipe, layout))
                continue
            reason = "[[layers]] says skip"
        own = sum(parameter.numel() for parameter in child.parameters(recurse=False))
        skipped.append(SkippedLayer(name, own, reason or "not a linear layer"))
    return tuple(_sharing(matched, family)), tuple(skipped)


def idle_patterns(pipeline: Pipeline, names: Iterable[str]) -> tuple[str, ...]:
    """A sentence for each pattern of the recipe that matches none of the layers called `names`."""
    known = frozenset(names)
    asked = [("model.skip", pattern) for pattern in pipeline.skip] + [
        ("model.keep", pattern) for pattern in pipeline.keep
    ]
    asked += [("[[layers]] match", pattern) for override in pipeline.overrides for pattern in override.match]
    return tuple(
        f"{where} has '{pattern}', which matches no layer"
        + ("" if any(sign in pattern for sign in "*?[") else did_you_mean(pattern, known))
        for where, pattern in dict.fromkeys(asked)
        if pattern not in known and not fnmatch.filter(known, pattern)
    )


def _sharing(matched: Sequence[MatchedLayer], family: Family) -> Iterator[MatchedLayer]:
    """The layers, those that read one tensor and are to share a `down` tied to the first of them."""
    groups: dict[tuple[str, int], list[MatchedLayer]] = {}
    for layer in matched:
        for index, suffixes in enumerate(family.same_input):
            suffix = next((each for each in suffixes if layer.recipe.share_down and _ends(layer.name, each)), None)
            if suffix is not None:
                groups.setdefault((layer.name.removesuffix(suffix), index), []).append(layer)
    tied: dict[str, MatchedLayer] = {}
    for group in groups.values():
        first = group[0]
        alike = [each for each in group if each.recipe == first.recipe and each.inn == first.inn]
        if len(alike) < 2 or first.layout.rank == 0:  # an override sets a layer apart
            continue
        layouts = first.recipe.layouts([each.out for each in alike], first.inn)
        for layer, layout in zip(alike, layouts, strict=True):
            tied[layer.name] = attrs.evolve(layer, layout=layout, down_from=None if layer is first else first.name)
    for layer in matched:
        yield tied.get(layer.name, layer)


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _with_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """(name, module, (out, inn) weight or None) of each submodule that has a weight of two or more dimensions."""
    read_elsewhere: set[nn.Module] = set()
    for name, child in module.named_modules():
        if isinstance(child, nn.TransformerEncoderLayer):  # its fast path hands these weights to one fused operation
            read_elsewhere |= {child.linear1, child.linear2}
        own = list(child.parameters(recurse=False))
        if any(parameter.dim() >= 2 for parameter in own):
            yield name, child, None if child in read_elsewhere else linear_weight(child)


def _reason_to_skip(
    name: str, child: nn.Module, weight: Tensor | None, pipeline: Pipeline, family: Family
) -> str | None:
    """Why a layer stays as it is, None where nothing speaks against quantizing it."""
    if weight is None:
        if type(child) is nn.Linear:
            return "a Linear whose weight is read by something else than its own product"
        return f"parameters of {type(child).__name__}, which is no linear layer"
    if pattern := _matching(name, pipeline.skip):
        return f"model.skip has '{pattern}'"
    if _matching(name, pipeline.keep):
        return None
    if pattern := _matching(name, family.skip):
        return f"the model family keeps '{pattern}' in 16 bits"
    return None


def _weight_only(family: Family, pipeline: Pipeline) -> tuple[Override, ...]:
    """The family's weight-only layers as overrides that come before the recipe's own."""
    options = {
        stage.name: {"activation": "none"}
        for stage in pipeline.stages
        if stage.kind in ("main_quantizer", "branch_quantizer")
        and "activation" in keys_of(type(getattr(stage, "strategy", stage)))
    }
    return (Override(match=family.weight_only, options=options),) if family.weight_only else ()
