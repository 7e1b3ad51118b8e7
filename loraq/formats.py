"""Number formats as data: the grids that codes stand for.

A format is an instance, not a class: `INT4 = IntegerFormat("int4", 4)`; a third party's NF4 is
`TableFormat("nf4", table)`. Formats are found through the entry point group `loraq.format`, these here like anyone's.

Scales. A group's scale is its limit (the magnitude that is mapped to the top of the grid) divided by the grid's top in
float32, stored as bfloat16, which has float32's range and so never overflows; codes are then rounded with the *stored*
scale, to nearest, ties to even. Columns that do not fill the last group are never padded into it: padding is zeros and
the limit is a maximum, so it cannot change a scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from loraq import registry
from loraq.blocks import by_rows, row_blocks
from loraq.contracts import AbstractFormat, AbstractLookup
from loraq.layer import Coded, Lookup, Part, groups_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


def grouped(values: Tensor, group: int) -> Tensor:
    """(rows, groups, group) from (rows, columns), the last group filled up with zeros."""
    rows, columns = values.shape
    group = min(group, max(1, columns))  # a group wider than the row is the row
    groups = groups_of(columns, group)
    if groups * group != columns:
        values = torch.nn.functional.pad(values, (0, groups * group - columns))
    return values.reshape(rows, groups, group)


def ungrouped(values: Tensor, columns: int) -> Tensor:
    """(rows, columns) from (rows, groups, group): the way back from `grouped`."""
    rows, groups, group = values.shape
    return values.reshape(rows, groups * group)[:, :columns]


def largest(values: Tensor, group: int) -> Tensor:
    """Each group's largest magnitude, (rows, groups)."""
    return by_rows(lambda part: grouped(part, group).abs().amax(dim=-1), values)


def quotient(values: Tensor, number: float) -> Tensor:
    """`values / number`, rounded once, on every device.

    On a GPU torch multiplies by the reciprocal of a divisor that is a Python number, which rounds twice: in one of
    100,000 groups of int4 a scale would be another.
    """
    return values / torch.full((), number, dtype=values.dtype, device=values.device)


def stored_scales(limits: Tensor, top: float) -> Tensor:
    """Scales (rows, groups) bfloat16 that map `limits` to the top of the grid."""
    return quotient(limits, top).to(torch.bfloat16)


def divisors(scales: Tensor) -> Tensor:
    """What the columns of groups are divided by, (..., groups, 1): their scales (..., groups), infinite where 0."""
    return torch.where(scales == 0, torch.inf, scales).unsqueeze(-1)


def divided(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """`values / scale`, (rows, groups, group) float32; 0 where the scale is 0."""
    return grouped(values, group) / divisors(scales.float())


def scaled(values: Tensor, scales: Tensor, group: int, table: Tensor | None = None) -> Tensor:
    """`values * scale` (rows, columns), each group's columns times its scale of `scales` (rows, groups).

    With a `table`, `values` are indices into it.
    """
    columns = values.shape[1]
    result = torch.empty(values.shape, dtype=scales.dtype, device=values.device)
    for rows in row_blocks(values):
        part = values[rows].to(scales.dtype) if table is None else table[values[rows].long()]
        result[rows] = ungrouped(grouped(part, group) * scales[rows].unsqueeze(-1), columns)
    return result


def codes_of(function: Callable[[Tensor], Tensor], values: Tensor, scales: Tensor, group: int) -> Tensor:
    """The codes (rows, columns) that `function` gives to `values / scale`, which it gets as `divided` makes them."""
    columns = values.shape[1]
    return by_rows(
        lambda part, steps: ungrouped(function(divided(part, steps, group)), columns).contiguous(), values, scales
    )


def nearest(values: Tensor, points: Tensor) -> Tensor:
    """Which of the ascending `points` (..., points) is nearest to each of `values` (..., any): int64 of their shape.

    A value in the middle of two takes the lower one.
    """
    low, high = points[..., :-1], points[..., 1:]
    middles = low + (high - low) / 2  # a sum of two may overflow
    return torch.searchsorted(middles.contiguous(), values.contiguous())


def recoded(values: Tensor, like: Coded) -> Coded:
    """`values` (rows, columns) rounded to the nearest points under the scales of `like`, all of which are kept."""

    def chosen(values: Tensor, like: Coded) -> Coded:
        indices = nearest(grouped(values, like.group), like.format.points(like))
        return like.format.with_points(like, ungrouped(indices, values.shape[1]))

    return coded_by_rows(chosen, values, like)


def with_codes(coded: Coded, codes: Tensor) -> Coded:
    """`coded` with other `codes` (rows, columns), everything else kept."""
    return attrs.evolve(coded, parts={**coded.parts, "codes": codes.to(coded.codes.dtype).contiguous()})


def scaled_points(levels: Tensor, scales: Tensor) -> Tensor:
    """(rows, groups, levels): `levels` (levels,) times each group's scale of `scales` (rows, groups)."""
    return levels * scales.unsqueeze(-1)


def integer_lookup(codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Lookup:
    """The lookup of two's complement `codes` (rows, columns) int8: each byte stands for its integer."""
    values = torch.arange(256, device=codes.device).to(torch.uint8).view(torch.int8).float()
    return Lookup(codes.contiguous().view(torch.uint8), values, scales.float(), offsets)


@attrs.frozen
class IntegerFormat(AbstractFormat, AbstractLookup):
    """Two's complement integers of `bits` bits, symmetric, one bfloat16 scale a group."""

    name: str
    bits: int

    integer = True
    block = None

    @property
    def limit(self) -> int:
        """The largest code that activations use: the top of the grid."""
        return int(2 ** (self.bits - 1)) - 1

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        scales = Part((rows, groups_of(columns, group)), "bfloat16", 16)
        return {"codes": Part.codes(rows, columns, self.bits), "scales": scales}

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        rows, columns = values.shape
        scales = stored_scales(largest(values, group) if limits is None else limits, self.limit)
        lowest = -self.limit - 1 if full_range else -self.limit
        codes = codes_of(lambda x: x.round_().clamp_(lowest, self.limit).to(torch.int8), values, scales, group)
        return Coded(self, (rows, columns), group, {"codes": codes, "scales": scales})

    def decode(self, coded: Coded) -> Tensor:
        return scaled(coded.codes, coded.scales.float(), coded.group)

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        return coded.codes, coded.scales.float(), coded.group

    def points(self, coded: Coded) -> Tensor:
        levels = torch.arange(-self.limit - 1, self.limit + 1, dtype=torch.float32, device=coded.codes.device)
        return scaled_points(levels, coded.scales.float())

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, indices - (self.limit + 1))

    def lookup(self, coded: Coded) -> Lookup:
        return integer_lookup(coded.codes, coded.scales)


def no_integers(format: AbstractFormat) -> TypeError:
    """The error of `integer_view` where there is none."""
    return TypeError(f"{format.name} has no integer codes")


def _ascending(instance: Any, attribute: Any, table: tuple[float, ...]) -> None:
    if list(table) != sorted(set(table)) or not 2 <= len(table) <= 256:
        raise ValueError(f"TableFormat.{attribute.name} must be 2 to 256 ascending values, got {table!r}.")


@attrs.frozen
class TableFormat(AbstractFormat, AbstractLookup):
    """Values looked up in a table, one bfloat16 scale a group: code k stands for `table[k] * scale`.

    `table` ascends and has at most 2^bits values; its largest magnitude is the top of the grid. There is no integer
    path: products decode the weights first.
    """

    name: str
    bits: int
    table: tuple[float, ...] = attrs.field(validator=_ascending, repr=False)

    integer = False
    block = None

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        scales = Part((rows, groups_of(columns, group)), "bfloat16", 16)
        return {"codes": Part.codes(rows, columns, self.bits, signed=False), "scales": scales}

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del full_range  # a table has one range
        rows, columns = values.shape
        table = torch.tensor(self.table, dtype=torch.float32, device=values.device)
        top = float(table.abs().max())
        scales = stored_scales(largest(values, group) if limits is None else limits, top)
        middles = (table[1:] + table[:-1]) / 2
        codes = codes_of(lambda x: torch.bucketize(x, middles).to(torch.uint8), values, scales, group)
        return Coded(self, (rows, columns), group, {"codes": codes, "scales": scales})

    def decode(self, coded: Coded) -> Tensor:
        table = torch.tensor(self.table, dtype=torch.float32, device=coded.codes.device)
        return scaled(coded.codes, coded.scales.float(), coded.group, table)

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        raise no_integers(self)

    def points(self, coded: Coded) -> Tensor:
        table = torch.tensor(self.table, dtype=torch.float32, device=coded.codes.device)
        return scaled_points(table, coded.scales.float())

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, indices)

    def lookup(self, coded: Coded) -> Lookup:
        values = torch.tensor(self.table, dtype=torch.float32, device=coded.codes.device)
        return Lookup(coded.codes, values, coded.scales.float())


@attrs.frozen
class FloatFormat(AbstractFormat):
    """Plain floating point values without scales, as a 16-bit branch stores them."""

    name: str
    bits: int

    integer = False
    block = None

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        return {"values": Part((rows, columns), self.name, self.bits)}

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del limits, full_range  # nothing is scaled
        rows, columns = values.shape
        return Coded(self, (rows, columns), group, {"values": values.to(getattr(torch, self.name))})

    def decode(self, coded: Coded) -> Tensor:
        return coded.parts["values"].float()

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        raise no_integers(self)

    def points(self, coded: Coded) -> Tensor:
        raise TypeError(f"{self.name} has no scales and so no points under them")

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        raise TypeError(f"{self.name} has no scales and so no points under them")


INT2 = IntegerFormat("int2", 2)
INT3 = IntegerFormat("int3", 3)
INT4 = IntegerFormat("int4", 4)
INT6 = IntegerFormat("int6", 6)
INT8 = IntegerFormat("int8", 8)
BFLOAT16 = FloatFormat("bfloat16", 16)


def scales_validator(instance: object, attribute: Any, value: AbstractFormat) -> None:
    """An attrs validator: the format must have scales, and so a grid to round onto."""
    del instance
    if isinstance(value, FloatFormat):
        raise ValueError(
            f"'{attribute.name}' must be a format with scales, such as 'int4', got '{value.name}', "
            "which the strategy rtn can store"
        )


def group_within(format: AbstractFormat, group: int | str, columns: int) -> int:
    """How many columns share a scale: the format's own block, else `group`; the whole row for "row" or "token"."""
    if format.block is not None:
        return format.block
    return max(1, columns) if isinstance(group, str) else group


def named(value: str | AbstractFormat) -> AbstractFormat:
    """The format called `value`; a format is returned as it is. Raises RegistryError with the names on offer."""
    if isinstance(value, AbstractFormat):
        return value
    found = registry.load("loraq.format", value)
    if not isinstance(found, AbstractFormat):
        raise registry.broken("loraq.format", value, f"is not a number format but {type(found).__name__}")
    return found


@functools.cache
def row_local(format: AbstractFormat) -> bool:
    """Whether a row's codes mean the same without the other rows, so that it can be cut. Found by trying."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 70, generator=generator, dtype=torch.float32).mul_(torch.arange(1, 6).unsqueeze(1))
    coded = format.encode(values, 64 if format.block is None else format.block)
    try:
        return torch.equal(coded.rows(1, 4).decode(), coded.decode()[1:4])
    except (ValueError, IndexError, RuntimeError):
        return False


@functools.cache
def row_wise(format: AbstractFormat) -> bool:
    """Whether each row is coded by itself, so that a matrix may be coded a few rows at a time. Found by trying."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 70, generator=generator, dtype=torch.float32).mul_(torch.arange(1, 6).unsqueeze(1))
    group = 64 if format.block is None else format.block
    whole, part = (format.encode(each, group).parts for each in (values, values[1:4]))
    return all(len(whole[name]) == len(values) and torch.equal(whole[name][1:4], part[name]) for name in whole)


def rows_of(coded: Coded) -> Callable[[slice], Tensor]:
    """What decodes some rows, (rows, columns) float32: these alone, or all at once where the format cannot be cut."""
    if row_local(coded.format):
        return lambda rows: coded.rows(rows.start, rows.stop).decode()
    if coded.format.integer:  # a quarter of what the decoded matrix takes
        integers, scales, group = coded.format.integer_view(coded)
        return lambda rows: scaled(integers[rows], scales[rows], group)
    whole = coded.decode()
    return lambda rows: whole[rows]


def coded_by_rows(function: Callable[..., Coded], values: Tensor, like: Coded | None = None, copies: int = 1) -> Coded:
    """`function(values, like)` of a function that codes every row by itself, a few rows at a time.

    `values` is (rows, columns) and so is `like`, without which `function` gets `values` alone; where its format cannot
    be cut (`row_local`) all rows are taken at once. What all rows share must be the same for any of them. `copies` is
    how many of the rows `function` holds.
    """
    blocks = list(row_blocks(values, copies))
    if len(blocks) < 2 or not (like is None or row_local(like.format)):
        return function(values) if like is None else function(values, like)
    rows, columns = values.shape
    parts: dict[str, Tensor] = {}
    for block in blocks:
        cut = () if like is None else (like.rows(block.start, block.stop),)
        found = function(values[block], *cut)
        described = found.format.parts(rows, columns, found.group)
        for name, tensor in found.parts.items():
            if tensor.shape == described[name].shape:
                parts[name] = tensor
                continue
            if name not in parts:
                parts[name] = torch.empty(described[name].shape, dtype=tensor.dtype, device=tensor.device)
            parts[name][block] = tensor
    return Coded(found.format, (rows, columns), found.group, parts)
