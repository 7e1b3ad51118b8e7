"""Safetensors files written in any order: header and offsets first, tensors at their places as they come.

The layout is safetensors' own (a little-endian length, a JSON header padded to eight bytes, then the tensors sorted by
descending dtype and by name) and the split into shards is diffusers', so that the files equal what `save_pretrained`
writes, byte for byte. A file is written under its name with `.partial` behind it and only renamed when whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from loraq.errors import CheckpointError
from loraq.source import DTYPES, WEIGHTS_NAME, TensorSpec

SHARD_SIZE = "10GB"
"""diffusers' default for `max_shard_size`."""
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}


@attrs.frozen
class FilePlan:
    """One safetensors file: its header, and where each tensor lies (absolute offset, length in bytes)."""

    name: str
    header: bytes = attrs.field(repr=False)
    places: Mapping[str, tuple[int, int]] = attrs.field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(length for _, length in self.places.values())


def plan_file(name: str, specs: Mapping[str, TensorSpec]) -> FilePlan:
    """Header and offsets of a safetensors file with these tensors, as safetensors itself lays them out."""
    ordered = sorted(specs.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0]))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor, spec in ordered:
        described[tensor] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.bytes],
        }
        start += spec.bytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {
        tensor: (len(header) + described[tensor]["data_offsets"][0], spec.bytes) for tensor, spec in specs.items()
    }
    return FilePlan(name, header, places)


def plan_files(specs: Mapping[str, TensorSpec], shard_size: int | str = SHARD_SIZE) -> tuple[FilePlan, ...]:
    """The files for these tensors, sharded in state-dict order as diffusers does."""
    from huggingface_hub import split_state_dict_into_shards_factory

    pattern = WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_state_dict_into_shards_factory(
        dict(specs),  # tensors are asked for, but only get_storage_size looks at them
        get_storage_size=lambda spec: spec.bytes,
        filename_pattern=pattern,
        max_shard_size=shard_size,
    )
    return tuple(
        plan_file(name, {tensor: specs[tensor] for tensor in tensors})
        for name, tensors in split.filename_to_tensors.items()
    )


def index_text(files: tuple[FilePlan, ...]) -> str | None:
    """The text of the index of several shards, None for a single file."""
    if len(files) == 1:
        return None
    total = sum(length for file in files for _, length in file.places.values())
    weight_map = {tensor: file.name for file in files for tensor in file.places}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


class ShardWriter:
    """Writes tensors to their places in the partial files of one folder. Safe from several threads.

    Opening makes the files at their full size (so that a full disk is found at once) or takes up the ones that lie
    there. With `joining` another process has done so. Where several processes write, `shared` sends every write to the
    disk at once: a network file system may else write whole pages, with what it remembers of a neighbour's bytes.
    """

    def __init__(
        self, folder: Path, files: tuple[FilePlan, ...], *, shared: bool = False, joining: bool = False
    ) -> None:
        self._folder = folder
        self._files = files
        self._owner = {tensor: file for file in files for tensor in file.places}
        self._descriptors: dict[str, int] = {}
        self._flags = os.O_RDWR | (os.O_DSYNC if shared else 0)
        self._joining = joining

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            for file in self._files:
                self._open(file)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _open(self, file: FilePlan) -> None:
        path = self._partial(file)
        if self._joining:
            self._descriptors[file.name] = os.open(path, self._flags)
            return
        if not path.exists() and (self._folder / file.name).exists():  # killed after `finish`: take it up again
            (self._folder / file.name).rename(path)
        descriptor = os.open(path, self._flags | os.O_CREAT, 0o644)
        self._descriptors[file.name] = descriptor
        try:
            os.posix_fallocate(descriptor, 0, file.size)
        except OSError as error:
            raise CheckpointError(
                f"{path}: there is no room for {file.size:,} bytes ({error.strerror}); free some, or set "
                "run.output to another disk."
            ) from None
        os.ftruncate(descriptor, file.size)
        os.pwrite(descriptor, file.header, 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _partial(self, file: FilePlan) -> Path:
        return self._folder / f"{file.name}.partial"

    def write(self, tensors: Mapping[str, bytes | memoryview]) -> None:
        """Put each tensor's bytes at its place, and see all to the disk."""
        self.write_each(tensors.items())

    def write_each(self, tensors: Iterable[tuple[str, bytes | memoryview]]) -> None:
        """As `write`, of tensors that are made one at a time and need not be held together."""
        for name in {self._put(tensor, data) for tensor, data in tensors}:
            os.fdatasync(self._descriptors[name])

    def _put(self, tensor: str, data: bytes | memoryview) -> str:
        """Write a tensor at its place. Returns the file's name."""
        file = self._owner[tensor]
        start, length = file.places[tensor]
        view = memoryview(data)
        if view.nbytes != length:
            raise CheckpointError(f"{self._partial(file)}: '{tensor}' has {view.nbytes} bytes, planned were {length}.")
        written = 0
        while written < length:
            written += os.pwrite(self._descriptors[file.name], view[written:], start + written)
        return file.name

    def read(self, tensor: str) -> bytes:
        """The bytes at a tensor's place."""
        file = self._owner[tensor]
        start, length = file.places[tensor]
        found = bytearray()
        while len(found) < length:
            piece = os.pread(self._descriptors[file.name], length - len(found), start + len(found))
            if not piece:
                break
            found += piece
        return bytes(found)

    def finish(self) -> None:
        """Rename the partial files: they are whole."""
        for file in self._files:
            os.fsync(self._descriptors[file.name])
            self._partial(file).rename(self._folder / file.name)
        sync_folder(self._folder)


def sync_folder(folder: Path) -> None:
    """See a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """See all that lies below a folder to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(place, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(place))


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
