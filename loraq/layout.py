"""The static description of a packed layer: everything but its numbers.

A `Layout` says what a checkpoint's config.json must say and what a kernel must know: shapes, formats, groups, rank,
activations, transforms, packing. From it follow the names, shapes and dtypes of the layer's stored tensors, so that
`plan` knows every byte in advance, `PackedLinear` its buffers, and the loader what to expect.

Stored names, below the layer's own: `main.codes`, `main.scales`, `down.codes`, ..., `up.codes`, ...,
`transform.0.NAME` for the first transform's online part; `bias` keeps its own name and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from loraq import formats, registry
from loraq.activation import NONE, Activation, activation
from loraq.contracts import AbstractFormat, AbstractPacking, AbstractPreTransform
from loraq.errors import CheckpointError
from loraq.layer import Coded, Part
from loraq.structure import plain as plain_options
from loraq.structure import structure

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4}


@attrs.frozen
class Stored:
    """Shape and dtype (a torch dtype's name) of one tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """How many bytes the tensor takes."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@attrs.frozen
class Storage:
    """How one matrix is coded: its format, and how many columns share a scale."""

    format: AbstractFormat
    group: int

    def stored_bytes(self, rows: int, columns: int, packing: AbstractPacking) -> int:
        """Bytes of a coded (rows, columns) matrix in a file."""
        return sum(packing.stored(part).bytes for part in self.format.parts(rows, columns, self.group).values())

    def coded(self, rows: int, columns: int, parts: Mapping[str, Tensor]) -> Coded:
        """The coded matrix that `parts` hold."""
        return Coded(self.format, (rows, columns), self.group, parts)


@attrs.frozen(cache_hash=True)  # it is looked up in every call of a layer
class Layout:
    """A packed layer but for its numbers. `rank` 0 means no branch, and then `down` and `up` are None."""

    out: int
    inn: int
    rank: int
    main: Storage
    activation: Activation
    down: Storage | None
    up: Storage | None
    branch_activation: Activation
    transforms: tuple[AbstractPreTransform, ...]
    packing: AbstractPacking
    stores_down: bool = True
    """False where another layer, that reads the same input, stores the `down` of both."""

    @property
    def whole(self) -> Layout:
        """The layout with `down` among its tensors: what an operation is given."""
        return self if self.stores_down else attrs.evolve(self, stores_down=True)

    def matrices(self) -> Iterator[tuple[str, Storage, int, int]]:
        """(name, storage, rows, columns) of each coded matrix: main, then down and up."""
        yield "main", self.main, self.out, self.inn
        if self.down is not None and self.up is not None:
            yield "down", self.down, self.rank, self.inn
            yield "up", self.up, self.out, self.rank

    def parts(self) -> dict[str, Part]:
        """Every part by its stored name, in file order."""
        found: dict[str, Part] = {}
        for matrix, storage, rows, columns in self.matrices():
            if matrix == "down" and not self.stores_down:
                continue
            for name, part in storage.format.parts(rows, columns, storage.group).items():
                found[f"{matrix}.{name}"] = part
        for index, transform in enumerate(self.transforms):
            for name, part in transform.parts(self.inn).items():
                found[f"transform.{index}.{name}"] = part
        return found

    def stored(self) -> dict[str, Stored]:
        """Every tensor of the file by its stored name, but for the bias."""
        return {name: self.packing.stored(part) for name, part in self.parts().items()}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors but the bias."""
        return sum(stored.bytes for stored in self.stored().values())

    def pack(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file from the tensors in memory, both by stored name."""
        return {name: self.packing.pack(parts[name], part) for name, part in self.parts().items()}

    def coded(self, matrix: str, tensors: Mapping[str, Tensor]) -> Coded:
        """The matrix "main", "down" or "up", unpacked from the stored `tensors`."""
        for name, storage, rows, columns in self.matrices():
            if name == matrix:
                described = storage.format.parts(rows, columns, storage.group)
                parts = {key: self.packing.unpack(tensors[f"{name}.{key}"], part) for key, part in described.items()}
                return storage.coded(rows, columns, parts)
        raise KeyError(matrix)

    def transformed(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x̃ (tokens, inn) from x (tokens, inn), by the stored online parts."""
        for index, transform in enumerate(self.transforms):
            online = {
                name: self.packing.unpack(tensors[f"transform.{index}.{name}"], part)
                for name, part in transform.parts(self.inn).items()
            }
            input = transform.input(input, online)
        return input

    def to_plain(self) -> dict[str, Any]:
        """As config.json writes it: formats, transforms and packing by their registered names."""
        plain: dict[str, Any] = {
            "out": self.out,
            "inn": self.inn,
            "rank": self.rank,
            "main": {"format": self.main.format.name, "group": self.main.group},
            "activation": self.activation.to_plain(),
            "packing": strategy_to_plain("packing", self.packing),
        }
        if self.down is not None and self.up is not None:
            plain["down"] = {"format": self.down.format.name, "group": self.down.group}
            plain["up"] = {"format": self.up.format.name, "group": self.up.group}
            plain["branch_activation"] = self.branch_activation.to_plain()
        if not self.stores_down:
            plain["stores_down"] = False
        if self.transforms:
            plain["transforms"] = [strategy_to_plain("pre_transform", each) for each in self.transforms]
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Layout:
        """The layout that config.json describes. Raises RegistryError where a plugin is missing."""

        def storage(name: str) -> Storage | None:
            found = plain.get(name)
            return None if found is None else Storage(formats.named(found["format"]), int(found["group"]))

        main = storage("main")
        assert main is not None, "a layout always has a main matrix"
        packing = strategy_from_plain("packing", plain["packing"])
        transforms = [strategy_from_plain("pre_transform", each) for each in plain.get("transforms", ())]
        assert isinstance(packing, AbstractPacking)
        return cls(
            out=int(plain["out"]),
            inn=int(plain["inn"]),
            rank=int(plain["rank"]),
            main=main,
            activation=activation(plain["activation"]),
            down=storage("down"),
            up=storage("up"),
            branch_activation=activation(plain.get("branch_activation", NONE)),
            transforms=tuple(each for each in transforms if isinstance(each, AbstractPreTransform)),
            packing=packing,
            stores_down=bool(plain.get("stores_down", True)),
        )


def strategy_to_plain(kind: str, strategy: object) -> dict[str, Any]:
    """`{"strategy": NAME, ...options}` for a strategy that the loader will need, as a recipe would write it."""
    options: dict[str, Any] = plain_options(strategy)
    return {"strategy": registry.name_of(f"loraq.{kind}", type(strategy))} | options


def strategy_from_plain(kind: str, table: Mapping[str, Any]) -> object:
    """The way back from `strategy_to_plain`. Raises CheckpointError for options that the strategy does not take."""
    strategy = registry.load(f"loraq.{kind}", table["strategy"])
    assert isinstance(strategy, type)
    faults: list[str] = []
    options = {key: value for key, value in table.items() if key != "strategy"}
    found: object = structure(options, strategy, f"{kind} {table['strategy']}", faults)
    if faults:
        raise CheckpointError("; ".join(faults))
    return found
