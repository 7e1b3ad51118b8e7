"""What flows through the pipeline for one layer: parts, coded matrices, the fit, and the record of what happened.

All matrices are two-dimensional, `weight (out, inn)`; a 1x1 convolution's weight is reshaped on the way in. The words:

    code      the small integer that stands for one number
    scale     the factor that a group of codes shares
    group     the run of neighbouring columns (along `inn`, or along `rank` for `up`) that shares one scale
    part      one named tensor of a coded matrix ("codes", "scales", ...), with the width it is stored in

Nothing here is changed once made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraq.contracts import AbstractFormat
    from loraq.input_statistics import InputStatistics


@attrs.frozen
class Part:
    """How one tensor of a coded matrix looks in memory, and how many bits of each element are worth storing.

    `shape` and `dtype` (a torch dtype's name) describe the tensor in memory. `bits` below the dtype's width says that
    only so many low bits of each element carry information: 4 for int4 codes held in int8.
    """

    shape: tuple[int, ...]
    dtype: str
    bits: int
    levels: int = 0
    """3 for ternary codes, which may be packed tighter than in whole bits; 0 for all others."""

    @classmethod
    def codes(cls, rows: int, columns: int, bits: int, *, signed: bool = True) -> Part:
        """The part that holds `bits`-wide codes, one a weight."""
        return cls((rows, columns), "int8" if signed else "uint8", bits)


def short(tensor: Tensor | None) -> str:
    """`bfloat16[4, 2]@cpu`: a tensor for a repr, without its values."""
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}@{tensor.device}"


def _short_parts(parts: Mapping[str, Tensor]) -> str:
    return "{" + ", ".join(f"{name}={short(tensor)}" for name, tensor in parts.items()) + "}"


@attrs.frozen(eq=False)
class Coded:
    """A matrix as codes and scales of one number format.

    `parts` holds the tensors that `format.parts(*shape, group)` describes; `group` counts the columns that share a
    scale. `decode()` gives the matrix back, (rows, columns) float32.
    """

    format: AbstractFormat
    shape: tuple[int, int]
    group: int
    parts: Mapping[str, Tensor] = attrs.field(repr=_short_parts)

    def __attrs_post_init__(self) -> None:
        described = self.format.parts(*self.shape, self.group)
        if set(described) != set(self.parts):
            raise ValueError(f"Coded.parts: {self.format.name} has {sorted(described)}, got {sorted(self.parts)}.")
        for name, part in described.items():
            tensor = self.parts[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != part.shape or dtype != part.dtype:
                raise ValueError(
                    f"Coded.parts[{name!r}]: expected {part.dtype}{list(part.shape)} for a {self.shape[0]} x "
                    f"{self.shape[1]} matrix in {self.format.name}, got {short(tensor)}."
                )

    @property
    def codes(self) -> Tensor:
        """The codes, (rows, columns)."""
        return self.parts["codes"]

    @property
    def scales(self) -> Tensor:
        """The scales, (rows, groups)."""
        return self.parts["scales"]

    def decode(self) -> Tensor:
        """The matrix that the codes stand for, (rows, columns) float32."""
        return self.format.decode(self)

    def rows(self, first: int, last: int) -> Coded:
        """The coded rows from `first` to before `last`; for formats whose rows stand alone (`formats.row_local`)."""
        shape = (last - first, self.shape[1])
        described = self.format.parts(*shape, self.group)
        parts = {  # what all rows share, as a matrix' own scale, has its shape whatever the rows
            name: tensor if tensor.shape == described[name].shape else tensor[first:last].contiguous()
            for name, tensor in self.parts.items()
        }
        return Coded(self.format, shape, self.group, parts)


@attrs.frozen(eq=False)
class Lookup:
    """A coded matrix whose elements stand for `values[code] * scale`, plus the group's offset where there are some.

    `codes` (rows, columns) uint8, `values` (at most 256,) float32, `scales` and `offsets` (rows, groups) float32; each
    operation is rounded on its own.
    """

    codes: Tensor
    values: Tensor
    scales: Tensor
    offsets: Tensor | None = None


@attrs.frozen(eq=False)
class Fit:
    """What a low-rank strategy returns: `weight ≈ main + up @ down`, each factor coded.

    `main` (out, inn); `down` (rank, inn) and `up` (out, rank), both None where there is no branch.
    """

    main: Coded
    down: Coded | None = None
    up: Coded | None = None

    def __attrs_post_init__(self) -> None:
        if (self.down is None) != (self.up is None):
            raise ValueError("Fit: `down` and `up` come together or not at all.")
        if self.down is not None and self.up is not None:
            out, inn = self.main.shape
            found = (self.up.shape[0], self.up.shape[1], self.down.shape[0], self.down.shape[1])
            if (found[0], found[3]) != (out, inn) or found[1] != found[2]:
                raise ValueError(
                    f"Fit: for main {out} x {inn}, `up` must be {out} x rank and `down` rank x {inn}; "
                    f"got {self.up.shape} and {self.down.shape}."
                )

    @property
    def rank(self) -> int:
        """The branch's rank, 0 where there is none."""
        return 0 if self.down is None else self.down.shape[0]

    def rows(self, first: int, last: int) -> Fit:
        """The fit of the output channels from `first` to before `last`, with the same `down`."""
        return Fit(self.main.rows(first, last), self.down, None if self.up is None else self.up.rows(first, last))

    def decode(self) -> Tensor:
        """`main + up @ down` as the packed layer uses them, (out, inn) float32."""
        weight = self.main.decode()
        if self.down is not None and self.up is not None:
            weight = weight.addmm(self.up.decode(), self.down.decode())
        return weight


def _no_statistics() -> InputStatistics:
    from loraq.input_statistics import NOTHING

    return NOTHING


@attrs.frozen(eq=False)
class LayerContext:
    """What a strategy may know of the layer at hand beside its weight.

    `name` is the layer's dotted name, for messages; `generator` is the only source of randomness that a strategy may
    use: it is seeded by the recipe's seed and the layer's name alone, so that no order and no restart changes a bit.
    `statistics` is what calibration found of the input that the weight at hand is multiplied with: what the recipe's
    strategies asked for, nothing where none did.
    """

    name: str
    generator: torch.Generator
    statistics: InputStatistics = attrs.field(factory=_no_statistics)


@attrs.frozen
class LayerRecord:
    """What was done to one layer: a row of the report, kept in the journal and in loraq.json.

    Errors are relative, `||W̃ - Ŵ|| / ||W̃||`, of the transformed weight: `error_before` with the main quantizer alone,
    `error_after` with the branch. `stored_bytes` counts all tensors of the packed layer but the bias, `effective_bits`
    is that per weight. `output_error_before` and `output_error_after` are the same of the output where its input is
    known by calibration, `||x̃ (W̃ - Ŵ)ᵀ|| / ||x̃ W̃ᵀ||`, the rounding of activations left out; None elsewhere.
    """

    name: str
    out: int
    inn: int
    rank: int
    error_before: float
    error_after: float
    stored_bytes: int
    seconds: float
    source_digest: str
    output_error_before: float | None = None
    output_error_after: float | None = None

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.out * self.inn

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, scales, branch and row padding included."""
        return 8 * self.stored_bytes / self.weights


def groups_of(columns: int, group: int) -> int:
    """How many groups cover `columns`; the last may be shorter."""
    return math.ceil(columns / group)
