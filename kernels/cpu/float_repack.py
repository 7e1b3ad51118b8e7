"""Repacking for the products in float32: matrices decoded once, or their codes in panels, decoded panel by panel.

A branch is small and is decoded once. A main weight keeps its codes: of 4 bits where it has at most 16 values, else of
8, each group's scale in float32; in groups of 64 that is 5/4 of the bytes of 4-bit codes with 16-bit scales. Layouts:
decode.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import attrs
import torch

from loraq.contracts import AbstractLookup
from loraq.formats import integer_lookup

from .tile import OUTPUTS

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.contracts import AbstractFormat
    from loraq.layer import Coded, Lookup

Decoding = Literal["integers", "table of 16", "table of 256", "table of 256 bfloat16"]
"""How codes become values: as two's complement integers of 8 bits, or by a table, whose values may be such that
bfloat16 holds them exactly. Codes that have a table of 16 take 4 bits, others 8."""

LARGEST_CHUNK = 1024
"""Columns that are decoded at a time: 128 KB, which stay in a second-level cache."""


def decodes(format: AbstractFormat) -> bool:
    """Whether codes of this format can be decoded by table."""
    if isinstance(format, AbstractLookup):
        return True
    if not format.integer:
        return False
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return format.integer_view(format.encode(noise, 64))[0].dtype == torch.int8


def dense_panels(weight: Tensor) -> Tensor:
    """(panels, columns, 32) float32 of a matrix (rows, columns), padded with rows of zeros."""
    rows, columns = weight.shape
    panels = -(-rows // OUTPUTS)
    padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, panels * OUTPUTS - rows))
    return padded.reshape(panels, OUTPUTS, columns).transpose(1, 2).contiguous()


@attrs.frozen(eq=False)
class CodePanels:
    """Codes in panels: `codes` (panels, columns or half of them, 32) uint8; `values` (16 or 256,) float32; `scales` and
    `offsets` (panels, groups, 32) float32, a group being `group` columns.
    """

    decoding: Decoding
    group: int
    codes: Tensor
    values: Tensor
    scales: Tensor
    offsets: Tensor | None

    @classmethod
    def of(cls, coded: Coded) -> CodePanels:
        """A coded matrix of a format that `decodes`."""
        (found, width), (_, columns) = _lookup(coded), coded.shape
        group = min(width, columns)
        fine = group if group <= LARGEST_CHUNK else math.gcd(group, LARGEST_CHUNK)
        even = fine % 2 == 0 or fine >= columns
        codes, values = found.codes, found.values
        bits, integers = 8, _are_integers(values)
        if even and len(values) <= 16:
            bits = 4
        elif even and integers and bool(((codes + 8) & 0xFF).amax() < 16):
            codes, values, bits = codes & 15, torch.arange(16, dtype=torch.float32).sub_(16 * (torch.arange(16) > 7)), 4
        codes = torch.nn.functional.pad(codes, (0, columns % 2))  # an odd last column has a neighbour
        panels = _panels(codes)
        if bits == 4:
            panels = panels[:, ::2] | panels[:, 1::2] << 4
        room = torch.zeros(16 if bits == 4 else 256, dtype=torch.float32)
        room[: len(values)] = values
        scales, offsets = (
            None if each is None else _panels(each.repeat_interleave(group // fine, dim=1))
            for each in (found.scales, found.offsets)
        )
        assert scales is not None
        group = fine + fine % 2 if bits == 4 else fine  # odd only where it is the one group
        decoding: Decoding = "table of 16"
        if bits == 8:
            short = not (room.view(torch.int32) & 0xFFFF).any()  # by bits, as codes may stand for NaN
            decoding = "integers" if integers else "table of 256 bfloat16" if short else "table of 256"
        return cls(decoding, group, panels.contiguous(), room, scales, offsets)


def _lookup(coded: Coded) -> tuple[Lookup, int]:
    """The lookup, and how many columns share a scale in it."""
    if isinstance(coded.format, AbstractLookup):
        return coded.format.lookup(coded), coded.group
    integers, scales, group = coded.format.integer_view(coded)
    return integer_lookup(integers, scales), group


def _are_integers(values: Tensor) -> bool:
    """Whether each byte stands for its two's complement integer."""
    return len(values) == 256 and torch.equal(values, torch.arange(256).to(torch.uint8).view(torch.int8).float())


def _panels(matrix: Tensor) -> Tensor:
    """(panels, columns, 32) of (rows, columns) in the same dtype, padded with zeros."""
    rows, columns = matrix.shape
    panels = -(-rows // OUTPUTS)
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, panels * OUTPUTS - rows))
    return padded.reshape(panels, OUTPUTS, columns).transpose(1, 2).contiguous()
