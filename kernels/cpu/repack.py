"""Repacking: from the canonical tensors of a checkpoint to the layout that tile.py reads.

Both operands of a product are cut into the same segments, runs of columns within one group of either side, and each
segment is padded to `slot` columns, a multiple of 16. Rows are cut into panels of 32. Codes of up to 4 bits take 4
bits here, wider ones 8. With groups of 64, and `inn` and `out` multiples of 64 and 32, nothing is padded, and the
repacked weight takes the bytes of the checkpoint's (int6 and int4 with zero points grow to 8 bits). It is held beside
the canonical tensors, which stay for saving: a layer that has run takes about twice its bytes in the checkpoint.

Symmetric integers are read from the packing "rows" as they are; other formats and packings through
`AbstractFormat.integer_view`: integers of at most 8 bits, zero points taken off, times bfloat16 scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numba
import numpy
import torch

from loraq.errors import RegistryError
from loraq.formats import IntegerFormat
from loraq.layout import Layout, Storage, strategy_to_plain

from .tile import OUTPUTS, STEP

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.contracts import AbstractFormat

Array = numpy.ndarray[Any, Any]
_compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


@attrs.frozen(eq=False)
class Segments:
    """The columns of a product cut at every group's end of either side, each segment padded to `slot` columns.

    `starts` (segments + 1,) int64; `of_input` and `of_weight` (segments,) int64 give each segment's group.
    """

    slot: int
    starts: Array
    of_input: Array
    of_weight: Array

    @property
    def count(self) -> int:
        """How many segments there are."""
        return len(self.of_input)

    @classmethod
    def of(cls, columns: int, input_group: int, weight_group: int) -> Segments:
        """The segments of a product over `columns`."""
        cuts = sorted({0, columns, *range(0, columns, input_group), *range(0, columns, weight_group)})
        longest = max(end - start for start, end in itertools.pairwise(cuts))
        starts = numpy.array(cuts, dtype=numpy.int64)
        return cls(-(-longest // STEP) * STEP, starts, starts[:-1] // input_group, starts[:-1] // weight_group)

    def alike(self, other: Segments) -> bool:
        """Whether codes rounded for this product serve the other, given the same input groups."""
        return self.slot == other.slot and numpy.array_equal(self.starts, other.starts)


@attrs.frozen(eq=False)
class Weight:
    """A matrix (rows, columns) as integers times scales, `group` columns a scale, before it is repacked.

    `codes` (rows, bytes) uint8 holds each row as a little-endian stream of two's complement codes of `bits` bits,
    `scales` (rows, groups) uint16 bfloat16 bits. `width` is 4 or 8, what a code takes when repacked.
    """

    rows: int
    bits: int
    width: int
    group: int
    codes: Array
    scales: Array

    @classmethod
    def of(
        cls, layout: Layout, name: str, storage: Storage, rows: int, columns: int, tensors: Mapping[str, Tensor]
    ) -> Weight:
        """The matrix `name` of the stored `tensors`. Raises ValueError where its scales are not bfloat16's."""
        if isinstance(storage.format, IntegerFormat) and _rows(layout):  # the stored form is a stream already
            parts = storage.format.parts(rows, columns, storage.group)
            scales = layout.packing.unpack(tensors[f"{name}.scales"], parts["scales"])
            codes, bits = tensors[f"{name}.codes"].contiguous().view(torch.uint8), storage.format.bits
            return cls(rows, bits, 4 if bits <= 4 else 8, storage.group, codes.numpy(), _bits(scales))
        integers, exact, group = storage.format.integer_view(layout.coded(name, tensors))
        scales = exact.to(torch.bfloat16)
        if integers.dtype != torch.int8 or not torch.equal(scales.float(), exact):
            raise ValueError(f"the CPU kernel cannot hold the codes or scales of {storage.format.name}")
        narrow = integers.numel() == 0 or (int(integers.min()) >= -8 and int(integers.max()) < 8)
        return cls(rows, 8, 4 if narrow else 8, group, integers.contiguous().view(torch.uint8).numpy(), _bits(scales))


@attrs.frozen(eq=False)
class Panels:
    """A repacked weight: `codes` (panels, bytes) uint8 and `scales` (panels, segments, 32) uint16, bfloat16 bits."""

    bits: int
    codes: Array
    scales: Array

    @classmethod
    def of(cls, weight: Weight, cut: Segments) -> Panels:
        """`weight` repacked for the segments `cut`."""
        panels, padding = -(-weight.rows // OUTPUTS), 0x88 if weight.width == 4 else 0x80  # code zero
        size = cut.count * cut.slot * OUTPUTS * weight.width // 8
        codes = numpy.full((panels, size), padding, numpy.uint8)
        scales = numpy.zeros((panels, cut.count, OUTPUTS), numpy.uint16)
        _repack(weight.codes, weight.bits, weight.rows, cut.starts, cut.slot, weight.width, OUTPUTS, codes)
        _repack_scales(weight.scales, cut.of_weight, OUTPUTS, scales)
        return cls(weight.width, codes, scales)


def weight_group(format: AbstractFormat, columns: int, group: int) -> int | None:
    """How many columns share a scale where the kernel can hold a weight of this format, else None.

    Found by encoding a little noise: the integers must fit int8, the scales bfloat16.
    """
    if not format.integer:
        return None
    if isinstance(format, IntegerFormat):
        return group if format.bits <= 8 else None
    noise = torch.randn(2, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    integers, scales, found = format.integer_view(format.encode(noise, group))
    held = integers.dtype == torch.int8 and torch.equal(scales.bfloat16().float(), scales)
    return found if held else None


def _rows(layout: Layout) -> bool:
    """Whether the stored codes are rows of little-endian bit streams, which is what the packing "rows" makes."""
    try:
        return bool(strategy_to_plain("packing", layout.packing)["strategy"] == "rows")
    except RegistryError:
        return False


def _bits(scales: Tensor) -> Array:
    return scales.contiguous().view(torch.int16).numpy().view(numpy.uint16)


@_compiled
def _repack(
    stored: Array, bits: int, rows: int, starts: Array, slot: int, width: int, outputs: int, packed: Array
) -> None:
    """Codes of `bits` bits in the rows of `stored` to panels of unsigned codes of `width` bits."""
    sign, mask, offset = 1 << (bits - 1), (1 << bits) - 1, 1 << (width - 1)
    step = 8 if width == 4 else 4
    for row in range(rows):
        panel, output = row // outputs, row % outputs
        for segment in range(starts.size - 1):
            for column in range(starts[segment], starts[segment + 1]):
                bit = column * bits
                byte = bit >> 3
                word = numpy.int64(stored[row, byte]) >> (bit & 7)
                if (bit & 7) + bits > 8:
                    word |= numpy.int64(stored[row, byte + 1]) << (8 - (bit & 7))
                code = (((word & mask) ^ sign) - sign) + offset
                place = segment * slot + column - starts[segment]
                target = place // step * (outputs * 4) + output * 4 + place % 4
                if width == 8:
                    packed[panel, target] = code
                elif place % 8 < 4:
                    packed[panel, target] = (packed[panel, target] & 0xF0) | code
                else:
                    packed[panel, target] = (packed[panel, target] & 0x0F) | (code << 4)


@_compiled
def _repack_scales(scales: Array, of_weight: Array, outputs: int, packed: Array) -> None:
    for row in range(scales.shape[0]):
        for segment in range(of_weight.size):
            packed[row // outputs, segment, row % outputs] = scales[row, of_weight[segment]]
