"""The model to quantize, read lazily: a diffusers pipeline's folder or a single component's, safetensors only.

Opening reads model_index.json, config.json and the shards' headers, and checks them against each other and against the
model's class, built on the meta device; weights are read one tensor at a time from memory-mapped files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from safetensors import SafetensorError, safe_open

from loraq.adapters import Delta, Lora, Target, digests, merged, opened
from loraq.errors import InputError, ModelError, choices, did_you_mean
from loraq.single_file import Piece, pieces_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from loraq.recipe import ModelSource

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
"""Safetensors' names of dtypes, with torch's name and the width in bytes, in the order that safetensors sorts by."""


@attrs.frozen
class TensorSpec:
    """Shape and dtype (safetensors' name) of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes the tensor takes."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@attrs.frozen
class Component:
    """One model of a pipeline: its config, and where each tensor lies. `name` is "" for a lone component's folder."""

    name: str
    folder: Path
    config: Mapping[str, Any] = attrs.field(repr=False)
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorSpec] = attrs.field(repr=False)
    places: Mapping[str, Path] = attrs.field(repr=False)
    pieces: Mapping[str, Piece] = attrs.field(factory=dict, repr=False)
    """Tensors that lie in a file under another name, or as a part of another."""
    deltas: Mapping[str, tuple[Delta, ...]] = attrs.field(factory=dict, repr=False)
    """What adapters add, by tensor."""

    @property
    def rewritten(self) -> bool:
        """Whether the weights are others than those in the component's folder."""
        return bool(self.deltas) or any(path.parent != self.folder for path in self.files)

    @property
    def held_bytes(self) -> int:
        """What is held in memory all the while: adapters, and what was converted."""
        converted = sum(piece.held.nbytes for piece in self.pieces.values() if piece.held is not None)
        return converted + sum(delta.bytes for deltas in self.deltas.values() for delta in deltas)

    @property
    def class_name(self) -> str:
        """The diffusers class."""
        return str(self.config["_class_name"])

    def skeleton(self) -> nn.Module:
        """The model on the meta device. Raises ModelError where the files do not fit it."""
        model = self.model()
        self._check_shapes(model)
        return model

    def model(self) -> nn.Module:
        """The model that config.json describes, on the meta device. Raises ModelError where there is none."""
        import diffusers
        from accelerate import init_empty_weights

        found = getattr(diffusers, self.class_name, None)
        if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
            raise ModelError(f"{self.folder / 'config.json'}: diffusers has no model class '{self.class_name}'.")
        cls: Any = found  # diffusers' signatures are partly untyped
        try:
            with init_empty_weights():
                model: nn.Module = cls.from_config(dict(self.config))
        except Exception as error:  # a config may be wrong in any way
            raise ModelError(
                f"{self.folder / 'config.json'}: {self.class_name} cannot be built from it: {error}."
            ) from error
        return model

    def loaded(self, dtype: torch.dtype) -> nn.Module:
        """The whole model with its weights as they are read, in `dtype`; for a component that is `rewritten`."""
        import torch
        from accelerate.utils import set_module_tensor_to_device

        model = self.skeleton()
        precise = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name in model.state_dict():
            kept = any(part in precise for part in name.split("."))
            tensor = self.read(name)
            cast = tensor.dtype if not tensor.is_floating_point() else torch.float32 if kept else dtype
            set_module_tensor_to_device(model, name, "cpu", value=tensor.to(cast), dtype=cast)
        return model.eval()

    def _check_shapes(self, model: nn.Module) -> None:
        expected = model.state_dict()
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise ModelError(
                f"{self.folder}: {len(missing)} tensors of {self.class_name} are not in its files, the first is "
                f"'{missing[0]}'; is a shard missing, or config.json another model's?"
            )
        for name, tensor in expected.items():
            if tuple(tensor.shape) != self.tensors[name].shape:
                raise ModelError(
                    f"{self.places[name]}: '{name}' has shape {list(self.tensors[name].shape)}, but config.json makes "
                    f"it {list(tensor.shape)}."
                )

    def read(self, name: str) -> Tensor:
        """One tensor, from its memory-mapped file, adapters merged in."""
        tensor = self._stored(name)
        return merged(tensor, self.deltas[name]) if name in self.deltas else tensor

    def _stored(self, name: str) -> Tensor:
        try:
            if name in self.pieces:
                return self.pieces[name].read()
            with safe_open(self.places[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.places[name]}: '{name}' cannot be read: {error}.") from error


@attrs.frozen
class Source:
    """A folder to quantize: the components chosen, and whether it is a whole pipeline."""

    root: Path
    is_pipeline: bool
    components: tuple[Component, ...]
    adapters: tuple[Lora, ...] = ()

    def label(self, path: Path) -> str:
        """What a file of the model is called in fingerprints: its path below the root, or what names it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else "model.file"

    def digests(self) -> dict[str, str]:
        """SHA-256 of every weight file and config of the components, by label, and what adapters come to."""
        found: dict[str, str] = {}
        for component in self.components:
            for path in (component.folder / "config.json", *component.files):
                with path.open("rb") as file:
                    found[self.label(path)] = hashlib.file_digest(file, "sha256").hexdigest()
        return found | digests(self.adapters)


def open_source(model: ModelSource) -> Source:
    """The model that a recipe names. Raises ModelError in a sentence for anything amiss."""
    source = _opened(model)
    if not model.lora:
        return source
    targets = [
        Target(each.name, each.class_name, {name: spec.shape for name, spec in each.tensors.items()})
        for each in source.components
    ]
    deltas = opened(model.lora, targets)
    components = tuple(attrs.evolve(each, deltas=added) for each, added in zip(source.components, deltas, strict=True))
    return attrs.evolve(source, components=components, adapters=model.lora)


def _opened(model: ModelSource) -> Source:
    """The model without its adapters."""
    root = Path(model.folder) if model.folder is not None else _fetched(model)
    if not root.is_dir():
        raise ModelError(f"model.folder: there is no folder {root}.")
    index_path = root / "model_index.json"
    if not index_path.exists():
        if not (root / "config.json").exists():
            raise ModelError(f"{root} is no diffusers folder: it has neither model_index.json nor config.json.")
        return Source(root, False, (_component("", root, file=model.file),))
    index = read_json(index_path)
    parts = {key: value for key, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    names = list(parts)
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise ModelError(f"{index_path}: component name {name!r} leads out of the folder.")
    components = []
    for name in model.component:
        if name not in names:
            raise ModelError(
                f"model.component: {root} has no component '{name}'; it has {choices(names)}{did_you_mean(name, names)}"
            )
        if not (root / name).is_dir():
            raise ModelError(f"{root}: model_index.json names '{name}', but there is no such folder.")
        components.append(_component(name, root / name, str(parts[name][0]), file=model.file))
    for name in names:
        if not (root / name).is_dir():
            raise ModelError(f"{root}: component '{name}' of model_index.json is missing; the pipeline is incomplete.")
    return Source(root, True, tuple(components))


def _fetched(model: ModelSource) -> Path:
    """The hub repository's folder in the local cache, fetched if need be."""
    from huggingface_hub import snapshot_download

    assert model.hub is not None
    # Beside the folders of components, repositories hold whole models in single files: tens of gigabytes for nothing.
    patterns = ["*.json", "*.model", "*.txt", "*/*.safetensors", "diffusion_pytorch_model*.safetensors"]
    unread = [f"{model.component[0]}/*.safetensors"] if model.file is not None else None
    try:
        return Path(
            snapshot_download(model.hub, revision=model.revision, allow_patterns=patterns, ignore_patterns=unread)
        )
    except Exception as error:  # the hub client raises a dozen kinds: no network, no such repository, no permission
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"model.hub: '{model.hub}' cannot be fetched ({type(error).__name__}: {reason}).") from error


def read_json(path: Path, kind: type[InputError] = ModelError) -> dict[str, Any]:
    """The JSON object in `path`. Raises `kind` in a sentence where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise kind(f"{path}: cannot be read as JSON: {error}.") from None
    if not isinstance(found, dict):
        raise kind(f"{path}: expected a JSON object.")
    return found


def _component(name: str, folder: Path, library: str = "diffusers", *, file: str | None = None) -> Component:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: there is no config.json.")
    config = read_json(folder / "config.json")
    if library != "diffusers" or "_class_name" not in config:
        raise ModelError(
            f"model.component: '{name or folder}' is a model of {library}, but only models of diffusers can be packed; "
            "leave it out, it will be copied as it is."
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(f"{folder}: it is quantized already (by {method}); give the 16-bit model.")
    if file is not None:
        return _from_file(name, folder, config, Path(file))
    tensors: dict[str, TensorSpec] = {}
    places: dict[str, Path] = {}
    files = _weight_files(folder)
    for path in files:
        for tensor, spec in read_header(path).items():
            if tensor in places:
                raise ModelError(f"{path}: '{tensor}' is in {places[tensor].name} too.")
            tensors[tensor], places[tensor] = spec, path
    return Component(name, folder, config, files, tensors, places)


def _from_file(name: str, folder: Path, config: Mapping[str, Any], path: Path) -> Component:
    """The component of `folder` with the weights in the file at `path`."""
    if not path.is_file():
        raise ModelError(f"model.file: there is no file {path}.")
    if path.suffix != ".safetensors":
        raise ModelError(f"model.file: {path} is no safetensors file, and no other is read; convert it.")
    empty = Component(name, folder, config, (path,), {}, {})
    pieces = pieces_of(path, empty.class_name, config, set(empty.model().state_dict()))
    told = {torch_name: dtype for dtype, (torch_name, _) in DTYPES.items()}
    tensors = {tensor: TensorSpec(told[piece.dtype], piece.shape) for tensor, piece in pieces.items()}
    return attrs.evolve(empty, tensors=tensors, places=dict.fromkeys(pieces, path), pieces=pieces)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The shards of a component, by its index if it has one."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: it has no weight_map.")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if Path(shard).name != shard or shard in ("", ".."):
                raise ModelError(f"{index}: shard name {shard!r} leads out of the folder.")
            if not (folder / shard).is_file():
                raise ModelError(f"{folder}: shard {shard} of {index.name} is missing.")
        return tuple(folder / shard for shard in shards)
    if (folder / WEIGHTS_NAME).exists():
        return (folder / WEIGHTS_NAME,)
    variants = sorted(folder.glob("diffusion_pytorch_model.*.safetensors"))
    if len(variants) == 1:
        return (variants[0],)
    others = [path.name for path in _pickles(folder)]
    hint = f"; {others[0]} is a pickle, which LoRaQ never reads: convert it to safetensors" if others else ""
    raise ModelError(f"{folder}: there is no {WEIGHTS_NAME}{hint}.")


def _pickles(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Shapes and dtypes of a safetensors file's tensors. Raises ModelError for a truncated or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            specs = {}
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                view = file.get_slice(name)
                specs[name] = TensorSpec(str(view.get_dtype()), tuple(view.get_shape()))
                if specs[name].dtype not in DTYPES:
                    raise ModelError(f"{path}: '{name}' is of dtype {specs[name].dtype}, which LoRaQ does not know.")
            return specs
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: it is truncated or no safetensors file ({error}); fetch or copy it again.") from None
