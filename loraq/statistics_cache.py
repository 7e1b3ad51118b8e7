"""Statistics of layers' inputs on disk: a safetensors file a layer, kind of statistic and part.

    FOLDER/FINGERPRINT/PART-of-PARTS/COMPONENT/LAYER/KIND.safetensors

A file is renamed to its name when whole, and its metadata hold a digest: one that is cut off or spoilt counts as none
and is collected anew. Nothing is unpickled, and no class is looked up by a name from a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraq.calibration import Calibration
from loraq.checkpoint import sync_folder
from loraq.contracts import AbstractStatistic
from loraq.errors import CheckpointError, InputError
from loraq.pipeline import tensor_bytes

Kind = type[AbstractStatistic]


@attrs.frozen
class Layer:
    """A layer to calibrate: the component it is in ("" for a module in memory), its name, and its input's width."""

    component: str
    name: str
    inn: int

    def __str__(self) -> str:
        return f"layer '{self.name}'"


def cache_folder(calibration: Calibration) -> Path:
    """Where statistics are kept that outlast the run."""
    if isinstance(calibration.cache, str):
        return Path(calibration.cache).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "loraq" / "calibration"


class Cache:
    """The statistics of one fingerprint, in `folder`: PART-of-PARTS/COMPONENT/LAYER/KIND.safetensors."""

    def __init__(self, folder: Path, parts: int) -> None:
        self.folder = folder
        self._parts = parts
        self._sound: dict[Path, int] = {}

    def path(self, part: int, layer: Layer, kind: Kind) -> Path:
        """The file of a statistic; `part` counts from 0."""
        named = urllib.parse.quote(layer.name, safe="")  # a name may hold what a path must not
        kind_name = urllib.parse.quote(f"{kind.__module__}.{kind.__qualname__}", safe="")
        home = self.folder / f"{part + 1}-of-{self._parts}" / (layer.component or "module")
        return home / named / f"{kind_name}.safetensors"

    def write(self, part: int, layer: Layer, statistic: AbstractStatistic, tokens: int) -> None:
        """Keep a statistic of `tokens` tokens, whole or not at all."""
        path = self.path(part, layer, type(statistic))
        tensors = {name: getattr(statistic, name).detach().cpu().contiguous() for name in _fields(type(statistic))}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"tokens": f"{tokens} {_digest(tensors, tokens)}"})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(path)
            sync_folder(path.parent)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise InputError(
                f"calibration.cache: {path} cannot be written ({error}); mend that, or set calibration.cache."
            ) from error
        self._sound[path] = tokens

    def drop_leftovers(self) -> None:
        """Remove the files that killed processes were writing: no file takes an hour to write."""
        for partial in self.folder.rglob(".*.partial"):
            with contextlib.suppress(OSError):  # another process may be removing it too
                if time.time() - partial.stat().st_mtime > 3600:
                    partial.unlink()

    def tokens(self, part: int, layer: Layer, kind: Kind) -> int | None:
        """How many tokens a kept statistic is of; None where there is none, or it is spoilt."""
        path = self.path(part, layer, kind)
        if path not in self._sound and path.exists():
            with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError, RuntimeError):
                found, tokens, digest = _read(path, kind)
                if _digest(found, tokens) == digest:
                    self._sound[path] = tokens
        return self._sound.get(path)

    def read(self, layer: Layer, kind: Kind, device: torch.device) -> AbstractStatistic:
        """A statistic of all parts, added up in order. Raises CheckpointError where a part is gone."""
        merged: AbstractStatistic | None = None
        for part in range(self._parts):
            path = self.path(part, layer, kind)
            try:
                found = _read(path, kind)[0]
                statistic = kind(**{name: tensor.to(device) for name, tensor in found.items()})
            except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{path}: {layer}'s statistics cannot be read ({error}); the same command collects them anew."
                ) from error
            merged = statistic if merged is None else merged.merged(statistic)
        assert merged is not None, "there is one part at least"
        return merged


def _fields(kind: Kind) -> list[str]:
    return [field.name for field in attrs.fields(kind)]  # type: ignore[arg-type]  # statistics are attrs classes


def _read(path: Path, kind: Kind) -> tuple[dict[str, Tensor], int, str]:
    """The tensors of a statistic, of how many tokens it is, and the digest that it should have."""
    with safe_open(path, framework="pt") as file:
        tokens, digest = (file.metadata() or {})["tokens"].split()  # one entry: several are written in any order
        return {name: file.get_tensor(name) for name in _fields(kind)}, int(tokens), digest


def _digest(tensors: Mapping[str, Tensor], tokens: int) -> str:
    digest = hashlib.sha256(str(tokens).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
