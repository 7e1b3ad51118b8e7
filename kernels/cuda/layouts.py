"""How codes and scales lie in memory for the kernels, made from plain matrices with torch, on any device.

    byte_rows      (rows, columns) int8 to (groups, rows, 64): the activations' form, and `down`'s
    output_bytes   the same with the 32 rows of each tile in the kernels' order: 8-bit weights
    output_nibbles (rows, columns) to (groups, rows / 32, 1024) bytes: 4-bit weights
    natural_nibbles  the same in natural order of columns, for wgmma
    group_scales   (rows, groups) to (groups, rows) bfloat16 bits, one a group of 64 columns whatever the format's group
    group_values   the same of any values

Rows are filled up with zeros to a multiple of `multiple`, columns to whole groups of 64.

Order of outputs. A lane of the tensor core's result has columns 2m and 2m + 1 of each 8-wide tile; let tile j's column
2m + e be output 8m + 2j + e of the 32, and the lane has outputs 8m .. 8m + 7 in a row.

4-bit tile (32 outputs, 64 columns, 1 KB). A lane (row r of a tile, member m) has columns 16m .. 16m + 15 of output
(tile j, r) in 8 bytes: byte 4s + i holds column 16m + 8s + i below and 16m + 8s + 4 + i above, so that shifting and
masking a word gives the two registers of an int8 fragment. 16 bytes hold two tiles: [j / 2][lane][j % 2][8 bytes].
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


def byte_rows(codes: Tensor, multiple: int) -> Tensor:
    """(rows, columns) int8 codes to (groups, padded rows, 64) int8."""
    rows, groups = padded(codes.shape[0], multiple), padded(codes.shape[1], GROUP) // GROUP
    filled = _filled(codes, rows, groups * GROUP).reshape(rows, groups, GROUP)
    return filled.permute(1, 0, 2).contiguous()


def _order(device: torch.device) -> Tensor:
    """The output of 32 that lies at each place (tile, column)."""
    tile, column = torch.arange(4, device=device).unsqueeze(1), torch.arange(8, device=device)
    return (column // 2 * 8 + tile * 2 + column % 2).reshape(-1)


def output_bytes(codes: Tensor, multiple: int) -> Tensor:
    """(rows, columns) int8 codes to (groups, padded rows, 64) int8, rows in the kernels' order."""
    found = byte_rows(codes, multiple)
    groups, rows, _ = found.shape
    tiles = found.reshape(groups, rows // _OUTPUTS, _OUTPUTS, GROUP)
    return tiles[:, :, _order(codes.device)].reshape(groups, rows, GROUP).contiguous()


def output_nibbles(codes: Tensor, multiple: int) -> Tensor:
    """(rows, columns) int8 codes from -8 to 7 to (groups, padded rows / 32, 1024) uint8."""
    found = output_bytes(codes, multiple)
    groups, rows, _ = found.shape
    # group, tile of 32, j / 2, j % 2, row, member, s, below or above, i
    split = found.reshape(groups, rows // _OUTPUTS, 2, 2, 8, 4, 2, 2, 4)
    ordered = split.permute(0, 1, 2, 4, 5, 3, 6, 7, 8)
    below, above = ordered[..., 0, :].view(torch.uint8) & 0xF, ordered[..., 1, :].view(torch.uint8) << 4
    return (below | above).reshape(groups, rows // _OUTPUTS, 1024).contiguous()


def natural_nibbles(codes: Tensor, multiple: int) -> Tensor:
    """As `output_nibbles`, with the columns as wgmma has them: byte 4s + i holds 32s + 4m + i below, 16 more above."""
    found = output_bytes(codes, multiple)
    groups, rows, _ = found.shape
    # group, tile of 32, j / 2, j % 2, row, s, below or above, member, i
    split = found.reshape(groups, rows // _OUTPUTS, 2, 2, 8, 2, 2, 4, 4)
    ordered = split.permute(0, 1, 2, 4, 7, 3, 5, 6, 8)
    below, above = ordered[..., 0, :].view(torch.uint8) & 0xF, ordered[..., 1, :].view(torch.uint8) << 4
    return (below | above).reshape(groups, rows // _OUTPUTS, 1024).contiguous()


def group_scales(scales: Tensor, group: int, columns: int, multiple: int) -> Tensor:
    """(rows, groups) float32 scales, each of `group` columns, to (groups of 64, padded rows) int16, bfloat16 bits."""
    return group_values(scales.to(torch.bfloat16).view(torch.int16), group, columns, multiple)


def group_values(values: Tensor, group: int, columns: int, multiple: int) -> Tensor:
    """(rows, groups) values, each of `group` columns, to (groups of 64, padded rows)."""
    first = torch.arange(0, columns, GROUP, device=values.device) // group
    rows = padded(values.shape[0], multiple)
    return _filled(values[:, first], rows, len(first)).T.contiguous()
