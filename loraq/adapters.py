"""LoRA adapters, merged into the weights as these are read: what `model.lora` of a recipe names.

    W' = W + weight * alpha / rank * up @ down        in float32, rounded once to the dtype of the file that W is in

so that everything after it, quantized or kept, sees the merged model. Files are safetensors as diffusers and PEFT write
them (`lora_A`/`lora_B`, alphas in the metadata, in adapter_config.json or beside the factors) or as kohya's scripts do
(`lora_down`/`lora_up`/`alpha`). Names of an original layout, fused q, k and v among them, are turned into diffusers' by
diffusers' own converter for the model's class. Every tensor of an adapter must find its place: what LoRaQ would have to
leave out is refused in a sentence, DoRA's magnitudes and changed text encoders among it.

Source: LoRA, arXiv 2106.09685; rsLoRA's scale, arXiv 2312.03732.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from loraq.blocks import row_blocks
from loraq.errors import InputError, ModelError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

_FOREIGN = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_embedding_": "an adapter of embeddings",
    "bundle_emb": "an adapter of a text encoder's embeddings",
    "lora_mid": "a three-factor LoRA",
}
"""What names a kind of adapter that is no plain LoRA."""
_PREFIXES = ("base_model.model.", "diffusion_model.", "model.diffusion_model.")
_KOHYA = ("lora_unet_", "lora_transformer_")
_TEXT = ("text_encoder", "lora_te", "te1_", "te2_", "lora_llm")
_ROLES = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".lora_B.bias": "bias",
    ".alpha": "alpha",
    ".diff": "difference",
    ".diff_b": "bias difference",
}
"""What a tensor is, by the end of its name."""


def _finite(instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    del instance
    if not math.isfinite(value):
        raise ValueError(f"'{attribute.name}' must be a number, got {value}")


@attrs.frozen(kw_only=True)
class Lora:
    """An adapter to merge into the model."""

    path: str
    """A safetensors file, or a folder that holds one; relative to the recipe."""
    weight: float = attrs.field(default=1.0, converter=float, validator=_finite)
    """How much of it."""


def loras(value: object) -> tuple[Lora, ...]:
    """What a recipe may write after `lora =`: "path", ["path", weight], a {path, weight} table, or an array of these.

    Raises InputError for anything else.
    """
    if _is_pair(value) or isinstance(value, str | Mapping | Lora):
        return (_lora(value),)
    if isinstance(value, list | tuple):
        return tuple(_lora(each) for each in value)
    raise InputError(f'expected ["path", weight], or an array of such, got {value!r}')


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) in (int, float)
    )


def _lora(value: Any) -> Lora:
    if isinstance(value, Lora):
        return value
    if isinstance(value, str):
        table: dict[str, Any] = {"path": value}
    elif _is_pair(value):
        table = {"path": value[0], "weight": value[1]}
    else:
        table = dict(value) if isinstance(value, Mapping) else {}
    if not {"path"} <= table.keys() <= {"path", "weight"} or not isinstance(table["path"], str) or not table["path"]:
        raise InputError(f'expected ["path", weight] or {{path = "path", weight = 1.0}}, got {value!r}')
    if type(table.get("weight", 1.0)) not in (int, float):
        raise InputError(f"'weight' must be a number, got {table['weight']!r}")
    return Lora(**table)


@attrs.frozen(eq=False)
class Delta:
    """What an adapter adds to one tensor: `scale * up @ down`, or `scale * whole`."""

    scale: float
    whole: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None

    def shape(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor that this is made for; `wanted` is the one it meets."""
        if self.up is None or self.down is None:
            return () if self.whole is None else tuple(self.whole.shape)
        found = (self.up.shape[0], *self.down.shape[1:])
        # A 1x1 convolution's factors come as matrices or with their two axes of one.
        if len(wanted) == 4 and len(found) == 2 and tuple(wanted[2:]) == (1, 1):
            return (*found, 1, 1)
        return tuple(found[:2]) if len(wanted) == 2 and found[2:] == (1, 1) else found

    def added(self, values: Tensor, rows: slice) -> Tensor:
        """`values` (rows, columns) float32, which are these `rows` of the tensor, with this added."""
        if self.up is None or self.down is None:
            assert self.whole is not None, "a delta has factors or a whole"
            return values.add(self.whole[rows].float().reshape(values.shape), alpha=self.scale)
        up, down = self.up[rows].float().flatten(1), self.down.float().flatten(1)
        return values.addmm(up, down, alpha=self.scale)

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return sum(each.nbytes for each in (self.whole, self.up, self.down) if each is not None)


def merged(tensor: Tensor, deltas: Iterable[Delta]) -> Tensor:
    """The tensor with all of `deltas`, in its own dtype."""
    every = tuple(deltas)
    matrix = tensor.reshape(len(tensor), -1)
    result = matrix.new_empty(matrix.shape)
    for rows in row_blocks(matrix):
        values = matrix[rows].float()
        for delta in every:
            values = delta.added(values, rows)
        result[rows] = values.to(tensor.dtype)
    return result.reshape(tensor.shape)


@attrs.frozen
class Target:
    """A component that adapters may change: its name, its class, and its tensors' shapes."""

    name: str
    class_name: str
    shapes: Mapping[str, tuple[int, ...]]


def opened(adapters: Sequence[Lora], targets: Sequence[Target]) -> list[dict[str, tuple[Delta, ...]]]:
    """What all adapters together add, by tensor, for each of `targets`. Raises ModelError in a sentence."""
    found: list[dict[str, tuple[Delta, ...]]] = [{} for _ in targets]
    for index, adapter in enumerate(adapters):
        where = f"model.lora[{index}]: {adapter.path}"
        path = _file(adapter, where)
        for place, deltas in enumerate(_deltas(path, adapter.weight, targets, where)):
            for name, delta in deltas.items():
                found[place][name] = (*found[place].get(name, ()), delta)
    return found


def digests(adapters: Sequence[Lora]) -> dict[str, str]:
    """What a result owes to its adapters: their order, their weights, and the SHA-256 of their files."""
    found = {}
    for index, adapter in enumerate(adapters):
        path = _file(adapter, f"model.lora[{index}]: {adapter.path}")
        digest = hashlib.sha256(json.dumps(_settings_beside(path), sort_keys=True).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        found[f"model.lora[{index}]"] = f"{adapter.weight!r} * {digest.hexdigest()}"
    return found


def _file(adapter: Lora, where: str) -> Path:
    path = Path(adapter.path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelError(f"{where}: the folder holds {len(files)} safetensors files; name the one to merge.")
        return files[0]
    if not path.is_file():
        raise ModelError(f"{where}: there is no such file.")
    if path.suffix != ".safetensors":
        raise ModelError(f"{where}: only safetensors are read; convert it.")
    return path


def _settings_beside(path: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json beside an adapter; empty where there is none."""
    config = path.with_name("adapter_config.json")
    if not config.is_file():
        return {}
    try:
        return dict(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{config}: cannot be read as JSON: {error}.") from None


def _deltas(path: Path, weight: float, targets: Sequence[Target], where: str) -> list[dict[str, Delta]]:
    """What one file adds to each target."""
    tensors, settings = _read(path, where)
    refused = next(((name, mark) for name in tensors for mark in _FOREIGN if mark in name), None)
    if refused or settings.get("use_dora"):
        kind = _FOREIGN[refused[1]] if refused else "DoRA"
        named = f" ('{refused[0]}')" if refused else ""
        raise ModelError(f"{where}: it is {kind}{named}, and only plain LoRA is merged; fuse it with its own tool.")
    text = next((name for name in tensors if name.startswith(_TEXT)), None)
    if text is not None:
        raise ModelError(
            f"{where}: it changes a text encoder as well ('{text}'), which LoRaQ copies as it is; fuse it with "
            "diffusers and quantize the result, or give a file without these tensors."
        )
    parts: list[dict[str, dict[str, Tensor]]] = [{} for _ in targets]
    for name, tensor in _converted(tensors, targets, where).items():
        place, layer, role = _placed(name, targets, where)
        parts[place].setdefault(layer, {})[role] = tensor
    return [_built(layers, settings, weight, target, where) for layers, target in zip(parts, targets, strict=True)]


def _read(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the LoRA's settings: of its metadata, or of PEFT's file beside it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            told = (file.metadata() or {}).get("lora_adapter_metadata")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{where}: it is truncated or no safetensors file ({error}).") from None
    if not tensors:
        raise ModelError(f"{where}: it holds no tensor.")
    settings = _settings_beside(path) if told is None else _of_transformer(told, where)
    return tensors, settings


def _of_transformer(told: str, where: str) -> dict[str, Any]:
    """Settings from the metadata that diffusers writes, whose keys begin with the component's name."""
    try:
        return {key.partition(".")[2]: value for key, value in dict(json.loads(told)).items()}
    except (ValueError, TypeError) as error:
        raise ModelError(f"{where}: its metadata cannot be read ({error}).") from None


def _converted(tensors: Mapping[str, Tensor], targets: Sequence[Target], where: str) -> dict[str, Tensor]:
    """The tensors under diffusers' names, by diffusers' converter for the first target's class where it has one."""
    from diffusers.loaders import lora_pipeline

    if all(_resolved(name, targets) for name in tensors):
        return dict(tensors)  # diffusers' names already, which some converters would not know
    family = re.match(r"(.+?)(?:Video)?Transformer[23]DModel", targets[0].class_name)
    names = [targets[0].class_name.split("Transformer")[0], family[1]] if family else []
    mixin = next((getattr(lora_pipeline, f"{name}LoraLoaderMixin", None) for name in names), None)
    if mixin is None:
        return dict(tensors)
    try:
        found = mixin.lora_state_dict(dict(tensors), return_alphas=True)
    except Exception as error:  # converters raise whatever their dictionaries and assertions do
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ModelError(
            f"{where}: diffusers cannot convert it for {targets[0].class_name} ({reason}); is it another model's?"
        ) from error
    lots = [each for each in (found if isinstance(found, tuple) else (found,)) if isinstance(each, dict)]
    return {name: _as_tensor(value) for lot in lots for name, value in lot.items()}


def _as_tensor(value: Any) -> Tensor:
    import torch

    return value if isinstance(value, torch.Tensor) else torch.tensor(float(value))


def _resolved(name: str, targets: Sequence[Target]) -> tuple[int, str, str] | None:
    """(target, layer, role) of a tensor's name, None where no target has such a layer."""
    end = next((each for each in sorted(_ROLES, key=len, reverse=True) if name.endswith(each)), None)
    if end is None:
        return None
    layer, place = name.removesuffix(end), 0
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    for index, target in enumerate(targets):
        for prefix in ({target.name, "transformer"} if index == 0 else {target.name}) - {""}:
            if layer.startswith(f"{prefix}."):
                layer, place = layer.removeprefix(f"{prefix}."), index
    if layer.startswith(_KOHYA):  # kohya's names have no dots
        bare = layer.removeprefix(_KOHYA[0]).removeprefix(_KOHYA[1])
        layer = _undotted(targets[0]).get(bare, layer)
    shapes = targets[place].shapes
    if f"{layer}.weight" not in shapes and f"{layer}.bias" not in shapes:
        return None
    return place, layer, _ROLES[end]


def _undotted(target: Target) -> dict[str, str]:
    """Layers by their names without dots."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in target.shapes)
    return {layer.replace(".", "_"): layer for layer in layers}


def _placed(name: str, targets: Sequence[Target], where: str) -> tuple[int, str, str]:
    found = _resolved(name, targets)
    if found is not None:
        return found
    layers = dict.fromkeys(each.rpartition(".")[0] for target in targets for each in target.shapes)
    layer = re.split(r"\.(?:lora|alpha|diff)", name)[0].removeprefix("transformer.")
    raise ModelError(
        f"{where}: its tensor '{name}' belongs to no layer of {targets[0].class_name}{did_you_mean(layer, layers)}"
    )


def _built(
    layers: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any], weight: float, target: Target, where: str
) -> dict[str, Delta]:
    """The deltas of one target, each of its tensor's shape."""
    found: dict[str, Delta] = {}
    for layer, parts in layers.items():
        if ("up" in parts) != ("down" in parts):
            raise ModelError(f"{where}: of layer '{layer}' it has one factor and not the other; is it cut off?")
        if "up" in parts:
            scale = weight * _scale(layer, parts, settings)
            found[f"{layer}.weight"] = Delta(scale, up=parts["up"], down=parts["down"])
            if "bias" in parts:
                found[f"{layer}.bias"] = Delta(scale, whole=parts["bias"])
        if "difference" in parts:
            found[f"{layer}.weight"] = Delta(weight, whole=parts["difference"])
        if "bias difference" in parts:
            found[f"{layer}.bias"] = Delta(weight, whole=parts["bias difference"])
    for name, delta in found.items():
        if name not in target.shapes:
            raise ModelError(f"{where}: it changes '{name}', which {target.class_name} does not have.")
        wanted = target.shapes[name]
        if delta.shape(wanted) != wanted:
            raise ModelError(
                f"{where}: for '{name}' it makes {list(delta.shape(wanted))}, but the model has {list(wanted)}; is it "
                "another model's?"
            )
    return found


def _scale(layer: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """What the product is multiplied by: alpha / rank, 1 where no alpha is told; rsLoRA divides by the rank's root."""
    rank = parts["down"].shape[0]
    alpha: Any = float(parts["alpha"]) if "alpha" in parts else settings.get("lora_alpha", rank)
    if "alpha" not in parts:
        for pattern, value in dict(settings.get("alpha_pattern") or {}).items():  # as PEFT matches them
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = value
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
