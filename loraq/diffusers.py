"""The quantizer that makes diffusers' `from_pretrained` and `save_pretrained` work on packed models.

diffusers has no public hook for third-party quantizers; this module adds LoRaQ to its two dictionaries, and
`import loraq` has it imported as soon as diffusers is there (loraq/__init__.py). config.json then says it all:

    "quantization_config": {"quant_method": "loraq", "format_version": 1, "layouts": [...], "layers": {NAME: INDEX}}

Loading puts an empty PackedLinear in each layer's place before the weights come. The packed tensors are integers, which
no `torch_dtype` touches. The 16-bit rest is cast as asked; so that saving gives the file's bytes again, the quantizer
remembers each tensor's stored dtype, and where a cast loses something (bfloat16 to float16, float32 to bfloat16) the
stored tensor itself, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from loraq import registry
from loraq.errors import CheckpointError, RegistryError
from loraq.layout import Layout
from loraq.linear import PackedLinear, link_shared
from loraq.match import linear_weight

FORMAT_VERSIONS = (1, 2)


class Method(StrEnum):
    """diffusers asks for `quant_method.value`."""

    LORAQ = "loraq"


def quantization_config(
    layouts: Mapping[str, Layout], convolutions: Iterable[str], shared: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What config.json says of a quantized model: each layer's layout, the layouts that are equal told once.

    `shared` maps layers without a `down` of their own to those that store it. Version 2 of the format is version 1 with
    this, and written only where it is needed, so that an older LoRaQ refuses it and loads all else.
    """
    plain: list[dict[str, Any]] = []
    layers: dict[str, int] = {}
    for name, layout in layouts.items():
        described = layout.to_plain()
        if described not in plain:
            plain.append(described)
        layers[name] = plain.index(described)
    return {
        "quant_method": str(Method.LORAQ),
        "format_version": 2 if shared else 1,
        "layouts": plain,
        "layers": layers,
        "convolutions": sorted(convolutions),
        "plugins": _plugins(layouts.values()),
    } | ({"shared_down": dict(sorted(shared.items()))} if shared else {})


def _plugins(layouts: Iterable[Layout]) -> dict[str, str]:
    """The distributions, beside LoRaQ itself, that a loader needs, with their versions."""
    found: dict[str, str] = {}
    for layout in layouts:
        wanted = {("loraq.format", storage.format.name) for _, storage, _, _ in layout.matrices()}
        wanted |= {("loraq.pre_transform", registry.name_of("loraq.pre_transform", type(t))) for t in layout.transforms}
        wanted |= {("loraq.packing", registry.name_of("loraq.packing", type(layout.packing)))}
        for activation in (layout.activation, layout.branch_activation):
            if activation.format is not None:
                wanted.add(("loraq.format", activation.format.name))
        for group, name in wanted:
            offer = registry.offer(group, name)
            if offer.distribution != "loraq":
                found[offer.distribution] = offer.version
    return dict(sorted(found.items()))


class LoraqConfig:
    """`quantization_config` of a packed model, as diffusers passes it around."""

    quant_method = Method.LORAQ

    def __init__(self, plain: Mapping[str, Any]) -> None:
        self.plain = dict(plain)
        version = self.plain.get("format_version")
        if version not in FORMAT_VERSIONS:
            raise CheckpointError(
                f"this checkpoint has format version {version}, this LoRaQ reads versions "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}: upgrade loraq to load it."
            )
        needed = ", ".join(f"{name} {found}" for name, found in self.plain.get("plugins", {}).items())
        try:
            self.layouts = [Layout.from_plain(each) for each in self.plain["layouts"]]
        except RegistryError as error:
            raise CheckpointError(f"this checkpoint needs a plugin that is missing ({needed}): {error}") from error

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], **ignored: Any) -> LoraqConfig:
        """From config.json."""
        del ignored
        return cls(plain)

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return dict(self.plain)

    def update(self, **ignored: Any) -> dict[str, Any]:
        """Diffusers offers arguments of from_pretrained; none changes a packed model."""
        return ignored

    def __repr__(self) -> str:
        return f"LoraqConfig({len(self.plain['layers'])} layers, {len(self.layouts)} layouts)"


class LoraqQuantizer(DiffusersQuantizer):
    """Loads and saves packed models for diffusers."""

    def __init__(self, quantization_config: LoraqConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise CheckpointError(
                "LoRaQ quantizes with `loraq run` or Pipeline.quantize, not inside from_pretrained; the folder that is "
                "loaded holds a 16-bit model."
            )
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]  # duck-typed: see LoraqConfig
        self._wanted: torch.dtype | None = None
        self._stored_dtypes: dict[str, torch.dtype] = {}
        self._originals: dict[str, Tensor] = {}

    def update_torch_dtype(  # type: ignore[override]  # None comes in and goes out, whatever diffusers declares
        self, torch_dtype: torch.dtype | None
    ) -> torch.dtype | None:
        self._wanted = torch_dtype
        return torch_dtype

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called with each shard before its tensors are cast: remember what the cast would lose."""
        target = self._wanted or torch.get_default_dtype()
        for name, tensor in state_dict.items():
            if tensor.is_floating_point():
                self._stored_dtypes[name] = tensor.dtype
                if not torch.equal(tensor.to(target).to(tensor.dtype), tensor):
                    self._originals[name] = tensor.cpu().clone()
        return state_dict

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Called by save_pretrained: each tensor in the dtype it was stored in, unless it was changed since."""
        del safe_serialization
        return {name: self._as_stored(name, tensor) for name, tensor in state_dict.items()}, {}

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        original = self._originals.get(name)
        if original is not None and torch.equal(original.to(tensor.dtype), tensor.cpu()):
            return original
        return tensor.to(self._stored_dtypes.get(name, tensor.dtype))

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        del kwargs
        config = self.quantization_config
        assert isinstance(config, LoraqConfig)
        convolutions = set(config.plain.get("convolutions", ()))
        for name, index in config.plain["layers"].items():
            layout = config.layouts[index]
            path, _, leaf = name.rpartition(".")
            try:
                parent = model.get_submodule(path)
                old = parent.get_submodule(leaf)
            except AttributeError:
                raise CheckpointError(
                    f"config.json names the layer '{name}', which {type(model).__name__} lacks."
                ) from None
            weight = linear_weight(old)
            if weight is None or tuple(weight.shape) != (layout.out, layout.inn):
                raise CheckpointError(
                    f"config.json says that '{name}' is {layout.out} x {layout.inn}, but {type(model).__name__} has "
                    f"{type(old).__name__} {None if weight is None else tuple(weight.shape)} there."
                )
            assert isinstance(old, nn.Linear | nn.Conv2d), "linear_weight knows no other"
            bias = None if old.bias is None else torch.empty_like(old.bias, device="meta")
            packed = PackedLinear(layout, None, bias, convolution=name in convolutions, device="meta")
            setattr(parent, leaf, packed)
        try:
            link_shared(model, config.plain.get("shared_down", {}))
        except (AttributeError, ValueError) as error:
            raise CheckpointError(f"config.json's shared_down does not fit {type(model).__name__}: {error}") from None

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        del kwargs
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.count_writes()
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """Called by `model.dequantize()`: plain layers again, with the weights that the packed ones stand for."""
        for name, packed in [each for each in model.named_modules() if isinstance(each[1], PackedLinear)]:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, packed.dequantized())
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def is_diffusers_model(module: nn.Module) -> bool:
    """Whether diffusers saves and loads this module."""
    import sys

    if "diffusers" not in sys.modules:  # then nobody can have made one
        return False
    from diffusers import ModelMixin

    return isinstance(module, ModelMixin)


def mark_quantized(model: nn.Module) -> None:
    """Tell diffusers that a model quantized in memory is packed, so that `save_pretrained` works."""
    packed = {name: child for name, child in model.named_modules() if isinstance(child, PackedLinear)}
    convolutions = [name for name, child in packed.items() if child.convolution]
    shared = {name: child.down_from for name, child in packed.items() if child.down_from is not None}
    layouts = {name: child.layout for name, child in packed.items()}
    config = LoraqConfig(quantization_config(layouts, convolutions, shared))
    quantizer = LoraqQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    model.register_to_config(quantization_config=config)  # type: ignore[operator]


auto.AUTO_QUANTIZER_MAPPING[str(Method.LORAQ)] = LoraqQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[str(Method.LORAQ)] = LoraqConfig
