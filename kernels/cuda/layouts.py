"""How codes and scales lie in memory for the kernels, made from plain matrices with torch, on any device.

    byte_rows      (rows, columns) int8 to (groups, rows, 64): the activations' form
    thin_bytes     (rows, columns) int8 to (groups, rows / 16, 1024) bytes: `down`
    output_bytes   (rows, columns) to (groups, rows / 32, 2048) bytes: 8-bit weights
    output_nibbles the same to (groups, rows / 32, 1024) bytes: 4-bit weights
    natural_bytes, natural_nibbles  the same in natural order of columns, for wgmma
    group_scales   (rows, groups) to (groups, rows) bfloat16 bits, one a group of 64 columns whatever the format's group
    group_values   the same of any values

Rows are filled up with zeros to a multiple of `multiple`, columns to whole groups of 64, or to `groups` of them.

A tile is 32 outputs and 64 columns. It is kept as the registers of the tensor core's first operand, which has 16 rows:
lane 4r + m holds of rows r and r + 8 the columns 4m .. 4m + 3 of either half of an instruction's 32 columns. Let row
r + 8h of 16 rows i be output 4r + 2i + h of the tile, and a lane ends up with outputs 4r .. 4r + 3.

Columns: in the order of a product of 32 columns s, half of it q, member m, byte b, column 32s + 16q + 4m + b is the
natural one. The order within a group is free if both operands have the same, so activations, the second operand, are
read 16 neighbouring columns a lane, and column 16m + 8s + 4q + b it is. 8-bit tiles are [i][s][lane][q][h][b], so that
16 bytes are a fragment of 4 registers; natural ones [i][lane][s][q][h][b]. In 4-bit tiles both q share a byte, 0 below
and 1 above, so that shifting and masking two words gives the fragment: [i][lane][s][h][b]; natural [i][lane][h][s][b].
Rows of `down`, 16 at a time, are bytes [s][lane][q][h][b] with row r + 8h being 2r + h.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
_OUTPUTS = 32


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def _filled(values: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))


def byte_rows(codes: Tensor, multiple: int, groups: int = 1) -> Tensor:
    """(rows, columns) int8 codes to (groups, padded rows, 64) int8."""
    rows, groups = padded(codes.shape[0], multiple), padded(codes.shape[1], GROUP * groups) // GROUP
    filled = _filled(codes, rows, groups * GROUP).reshape(rows, groups, GROUP)
    return filled.permute(1, 0, 2).contiguous()


def _tiles(codes: Tensor, multiple: int, groups: int, columns: tuple[int, ...]) -> Tensor:
    """(rows, columns) int8 codes to (groups, tiles, r, i, h, *columns) with the 64 columns shaped so."""
    found = byte_rows(codes, multiple, groups)
    groups, rows, _ = found.shape
    return found.reshape(groups, rows // _OUTPUTS, 8, 2, 2, *columns)


def thin_bytes(codes: Tensor, multiple: int, groups: int = 1) -> Tensor:
    """(rows, columns) int8 codes to (groups, padded rows / 16, 1024) int8."""
    found = byte_rows(codes, multiple, groups)
    groups, rows, _ = found.shape
    tiles = found.reshape(groups, rows // 16, 8, 2, *_MEMBERS_FIRST)  # group, tile, r, h, m, s, q, b
    return tiles.permute(0, 1, 5, 2, 4, 6, 3, 7).reshape(groups, rows // 16, 1024).contiguous()


_MEMBERS_FIRST, _NATURAL = (4, 2, 2, 4), (2, 2, 4, 4)
"""The shapes of 64 columns: (m, s, q, b) and (s, q, m, b)."""


def output_bytes(codes: Tensor, multiple: int, groups: int = 1) -> Tensor:
    """(rows, columns) int8 codes to (groups, padded rows / 32, 2048) int8."""
    tiles = _tiles(codes, multiple, groups, _MEMBERS_FIRST)  # group, tile, r, i, h, m, s, q, b
    return tiles.permute(0, 1, 3, 6, 2, 5, 7, 4, 8).reshape(*tiles.shape[:2], 2048).contiguous()


def natural_bytes(codes: Tensor, multiple: int, groups: int = 1) -> Tensor:
    """As `output_bytes`, with the columns as wgmma has them, and all 32 bytes of a lane together."""
    tiles = _tiles(codes, multiple, groups, _NATURAL)  # group, tile, r, i, h, s, q, m, b
    return tiles.permute(0, 1, 3, 2, 7, 5, 6, 4, 8).reshape(*tiles.shape[:2], 2048).contiguous()


def output_nibbles(codes: Tensor, multiple: int, groups: int = 1) -> Tensor:
    """(rows, columns) int8 codes from -8 to 7 to (groups, padded rows / 32, 1024) uint8."""
    tiles = _tiles(codes, multiple, groups, _MEMBERS_FIRST)
    return _packed(tiles.permute(0, 1, 3, 2, 5, 6, 4, 8, 7))


def natural_nibbles(codes: Tensor, multiple: int, groups: int = 1) -> Tensor:
    """As `output_nibbles`, with the columns as wgmma has them."""
    tiles = _tiles(codes, multiple, groups, _NATURAL)
    return _packed(tiles.permute(0, 1, 3, 2, 7, 4, 5, 8, 6))


def _packed(ordered: Tensor) -> Tensor:
    """Neighbours of the last dimension, which is 2, in one byte: (groups, tiles, 1024) uint8."""
    below, above = ordered[..., 0].view(torch.uint8) & 0xF, ordered[..., 1].view(torch.uint8) << 4
    return (below | above).reshape(*ordered.shape[:2], 1024).contiguous()


def group_scales(scales: Tensor, group: int, columns: int, multiple: int, groups: int = 1) -> Tensor:
    """(rows, groups) float32 scales, each of `group` columns, to (groups of 64, padded rows) int16, bfloat16 bits."""
    return group_values(scales.to(torch.bfloat16).view(torch.int16), group, columns, multiple, groups)


def group_values(values: Tensor, group: int, columns: int, multiple: int, groups: int = 1) -> Tensor:
    """(rows, groups) values, each of `group` columns, to (groups of 64, padded rows)."""
    first = torch.arange(0, columns, GROUP, device=values.device) // group
    rows = padded(values.shape[0], multiple)
    return _filled(values[:, first], rows, padded(len(first), groups)).T.contiguous()
