"""A component's weights from one safetensors file, as fine-tunes are shared: what `model.file` of a recipe names.

The file has diffusers' names, or those of the model's original layout, which diffusers' own converter turns into
diffusers' (`from_single_file` uses the same). The converter is given the file's tensors memory-mapped; what it gives
back is mostly a renamed tensor or a run of a fused one's rows. Such a piece is remembered by its offset and read when
it is wanted; what the converter computed, as the swapped halves of a last layer, is held in memory. So the file is
never in memory whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from loraq.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.overrides import TorchFunctionMode


@attrs.frozen(eq=False)
class Piece:
    """A tensor that lies in a file from `offset` on, row-major; or that is `held` in memory."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    held: Tensor | None = None

    def read(self) -> Tensor:
        """The tensor. Raises OSError where the file has become shorter."""
        import torch

        if self.held is not None:
            return self.held
        dtype = getattr(torch, self.dtype)
        tensor = torch.empty(self.shape, dtype=dtype)
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(view) != view.nbytes:
                raise OSError("it is shorter than it was")
        return tensor


def pieces_of(path: Path, class_name: str, config: Mapping[str, Any], wanted: set[str]) -> dict[str, Piece]:
    """The tensors of a file by diffusers' names for the class; `wanted` are the names that the class has.

    Raises ModelError where the file is in neither layout.
    """
    from safetensors import SafetensorError, safe_open

    try:
        offsets = _offsets(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.file: {path} is truncated or no safetensors file ({error}).") from None
    bases = {tensor.data_ptr() - offsets[name] for name, tensor in tensors.items() if tensor.numel()}
    base = bases.pop() if len(bases) == 1 else None  # one mapping of the whole file
    size = path.stat().st_size
    pieces = {}
    for name, tensor in _named(tensors, path, class_name, config, wanted).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        offset = -1 if base is None else tensor.data_ptr() - base
        if tensor.is_contiguous() and offset >= 0 and offset + tensor.nbytes <= size:
            pieces[name] = Piece(path, tuple(tensor.shape), dtype, offset)
        else:
            pieces[name] = Piece(path, tuple(tensor.shape), dtype, held=tensor.clone())
    return pieces


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _views() -> TorchFunctionMode:
    """While it lasts, `torch.cat` of one tensor gives that tensor: converters copy the parts of fused tensors so."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Views(TorchFunctionMode):
        """See _views."""

        def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            del kinds
            if func is torch.cat and args and len(args[0]) == 1:
                return args[0][0]
            return func(*args, **(kwargs or {}))

    return Views()


def _named(
    tensors: dict[str, Tensor], path: Path, class_name: str, config: Mapping[str, Any], wanted: set[str]
) -> dict[str, Tensor]:
    """The tensors by diffusers' names."""
    if wanted <= tensors.keys():
        return tensors
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    entry: Any = SINGLE_FILE_LOADABLE_CLASSES.get(class_name)
    if entry is None:
        raise ModelError(
            f"model.file: {path} has not the names of {class_name}, and diffusers converts no original layout of that "
            "class; give a file in diffusers' layout."
        )
    try:
        with _views():
            found: dict[str, Tensor] = entry["checkpoint_mapping_fn"](checkpoint=dict(tensors), config=dict(config))
    except Exception as error:  # converters raise whatever their dictionaries do
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ModelError(
            f"model.file: {path} cannot be converted to {class_name} ({reason}); is it another model's?"
        ) from error
    return found
