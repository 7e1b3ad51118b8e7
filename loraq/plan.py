"""What a run will do, known from headers and classes alone: layers, sizes, every file's header and offsets.

The plan replaces the matched layers of the model on the meta device by empty PackedLinears; the state dict of that
skeleton *is* the checkpoint's list of tensors, so that the files have the very bytes that `save_pretrained` would
write, and `plan` foretells their size exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import attrs

from loraq.calibration import NEEDED, Calibration, passes, reader, refuse_lone_component
from loraq.collection import inputs_of, sizes_of
from loraq.errors import InputError, ModelError, choices
from loraq.families import family_of
from loraq.match import MatchedLayer, idle_patterns, match_layers
from loraq.pipeline import Pipeline
from loraq.quantize import replace_layers
from loraq.report import Skipped, size
from loraq.source import DTYPES, Component, Source, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.checkpoint import FilePlan

_WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
_SAFETENSORS_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


@attrs.frozen
class ComponentPlan:
    """What will be done to one component.

    `kept` names the tensors that are copied; `files` says what is written where; `config_text` is the result's
    config.json, as `save_pretrained` would write it.
    """

    component: Component = attrs.field(repr=False)
    layers: tuple[MatchedLayer, ...]
    skipped: tuple[Skipped, ...]
    kept: tuple[str, ...]
    files: tuple[FilePlan, ...] = attrs.field(repr=False)
    config_text: str = attrs.field(repr=False)

    def weight_name(self, layer: MatchedLayer) -> str:
        """The name of a layer's weight in the source."""
        return f"{layer.name}.weight"


@attrs.frozen
class CalibrationPlan:
    """What calibration will collect: of how many layers, in how many passes over the prompts, in how many bytes.

    `memory` is what the largest pass holds at once, `bytes` what is kept on disk, all parts together.
    """

    layers: int
    passes: int
    parts: int
    prompts: int
    memory: int
    bytes: int

    def told(self) -> str:
        """In a sentence."""
        apart = f" in {self.parts} parts" if self.parts > 1 else ""
        runs = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        return (
            f"calibration: at most {self.prompts} prompts{apart}, {runs} for the inputs of {self.layers} layers, "
            f"{size(self.memory)} held at once and {size(self.bytes)} kept, less what is in the cache"
        )


@attrs.frozen
class Plan:
    """What a run will do to a whole source. `calibration` is None where no layer's strategies read statistics."""

    source: Source
    components: tuple[ComponentPlan, ...]
    calibration: CalibrationPlan | None = None
    warnings: tuple[str, ...] = ()
    """What the recipe says and nothing comes of, a sentence each."""

    @property
    def layers(self) -> Iterable[MatchedLayer]:
        """All matched layers."""
        return [layer for component in self.components for layer in component.layers]

    @property
    def named_layers(self) -> list[tuple[str, MatchedLayer]]:
        """All matched layers, each with its component's name."""
        return [(each.component.name, layer) for each in self.components for layer in each.layers]

    @property
    def weights(self) -> int:
        """How many weights will be quantized."""
        return sum(layer.out * layer.inn for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Stored bytes of the packed layers but for their biases."""
        return sum(layer.layout.stored_bytes for layer in self.layers)

    @property
    def written_bytes(self) -> int:
        """Bytes of all safetensors files that will be written."""
        return sum(file.size for component in self.components for file in component.files)

    @property
    def source_bytes(self) -> int:
        """Bytes of the safetensors files that will be read."""
        return sum(path.stat().st_size for component in self.components for path in component.component.files)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": str(self.source.root),
            "source_bytes": self.source_bytes,
            "written_bytes": self.written_bytes,
            "quantized_weights": self.weights,
            "packed_bytes": self.packed_bytes,
            "effective_bits": 8 * self.packed_bytes / self.weights if self.weights else 0.0,
            "calibration": None if self.calibration is None else attrs.asdict(self.calibration),
            "warnings": list(self.warnings),
            "components": [
                {
                    "name": each.component.name,
                    "class": each.component.class_name,
                    "layers": [
                        {
                            "name": layer.name,
                            "convolution": layer.convolution,
                            "stored_bytes": layer.layout.stored_bytes,
                            "down_from": layer.down_from,
                            **layer.layout.to_plain(),
                        }
                        for layer in each.layers
                    ],
                    "skipped": [attrs.asdict(skip) for skip in each.skipped],
                    "files": {file.name: file.size for file in each.files},
                }
                for each in self.components
            ],
        }


def make_plan(source: Source, pipeline: Pipeline, calibration: Calibration | None = None) -> Plan:
    """The plan for a source. Raises InputError for whatever does not fit, before any weight is read."""
    components = tuple(_component_plan(component, pipeline) for component in source.components)
    names = [layer.name for component in components for layer in component.layers]
    names += [skip.name for component in components for skip in component.skipped]
    plan = Plan(source, components, warnings=idle_patterns(pipeline, names))
    return attrs.evolve(plan, calibration=_calibration_plan(plan, pipeline, calibration))


def _calibration_plan(plan: Plan, pipeline: Pipeline, calibration: Calibration | None) -> CalibrationPlan | None:
    """What calibration will do, from shapes alone; nothing where no layer asks for anything."""
    reading = [layer for layer in plan.layers if layer.recipe.statistics]
    if not reading:
        return None
    refuse_lone_component(plan.source)
    if calibration is None:
        raise InputError(f"calibration: is missing, and {reader(pipeline.stages, reading[0].recipe)}; {NEEDED}.")
    sizes = sizes_of(inputs_of(plan.named_layers), calibration.sample)
    lots = passes(sizes, calibration.limit)
    return CalibrationPlan(
        layers=len(reading),
        passes=len(lots) * calibration.parts,
        parts=calibration.parts,
        prompts=calibration.most,
        memory=max(sum(sizes[layer] for layer in lot) for lot in lots),
        bytes=sum(sizes.values()) * calibration.parts,
    )


def _component_plan(component: Component, pipeline: Pipeline) -> ComponentPlan:
    from loraq.checkpoint import plan_files
    from loraq.diffusers import quantization_config

    skeleton = component.skeleton()
    family = family_of(component.class_name, diffusers=True)
    matched, skipped = match_layers(skeleton, pipeline, family)
    shared = replace_layers(skeleton, matched, None)
    for layer in matched:
        dtype = component.tensors[f"{layer.name}.weight"].dtype
        if dtype not in _WEIGHT_DTYPES:
            raise ModelError(
                f"{component.folder}: layer '{layer.name}' has a weight of {dtype}; LoRaQ quantizes "
                f"{choices(_WEIGHT_DTYPES)}, so give the model in 16 bits, or skip the layer with model.skip."
            )
    quantized = {layer.name for layer in matched}
    specs: dict[str, TensorSpec] = {}
    kept: list[str] = []
    for name, tensor in skeleton.state_dict().items():
        if name in component.tensors:  # kept as it is, biases included
            specs[name] = component.tensors[name]
            kept.append(name)
        else:
            specs[name] = _spec(tensor)
    unknown = [
        Skipped(name, 0, "not a tensor of this model class; it is left out")
        for name in component.tensors
        if name not in specs and not (name.endswith(".weight") and name.removesuffix(".weight") in quantized)
    ]
    layouts = {layer.name: layer.layout for layer in matched}
    convolutions = {layer.name for layer in matched if layer.convolution}
    told_config = quantization_config(layouts, convolutions, shared)
    skeleton.register_to_config(quantization_config=told_config)  # type: ignore[operator]
    config_text: str = skeleton.to_json_string()  # type: ignore[operator]
    told = tuple(Skipped(each.name, each.weights, each.reason) for each in skipped)
    return ComponentPlan(component, matched, (*told, *unknown), tuple(kept), plan_files(specs), config_text)


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(_SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
