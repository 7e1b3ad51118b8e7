"""Rounding a matrix to a format, with each group's scale from its largest magnitude or searched for least error.

The largest magnitude ("amax") never clips, yet with few bits a smaller limit is better: a few elements saturate and all
others get finer steps. `searched` tries `FACTORS` times the largest magnitude for every group and keeps the limit of
least squared error; a factor of 1 is among them, so that its error is never above amax's.

Inside a fit's loop the matrix has moved little since the step before, so the search starts from that step's scales
(`guess`) and tries only their neighbours, `NEIGHBOURS` times: a third of the work, and the fits come out the same
(docs/notes/fits.md). Groups whose guess is 0 start anew from their largest magnitude.

The searches of integer formats on the CPU run in a Numba kernel (loraq/rounding_numba.py). The torch code here is its
reference and gives the same codes and scales bit for bit: that is why the errors are summed in a fixed order, `LANES`
partial sums each over every 16th element, then halved, as the kernel's vector registers do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loraq import formats
from loraq.blocks import row_blocks
from loraq.contracts import AbstractFormat
from loraq.layer import Coded, groups_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

Scale = Literal["search", "amax"]
"""How a group's scale is found: searched for least squared error, or from the largest magnitude."""

FACTORS = tuple(1 - 0.05 * step for step in range(9))
"""What the full search multiplies the largest magnitude by: 1, 0.95, ..., 0.6."""
WIDE_FACTORS = tuple(1 - 0.05 * step for step in range(17))
"""The same down to 0.2, for formats of three bits and fewer, whose best limits lie far inside."""
NEIGHBOURS = (1.0, 0.95, 1.05)
"""What the narrow search multiplies the guessed limit by."""
LANES = 16
"""Partial sums of a group's squared error."""


def rounded(values: Tensor, format: AbstractFormat, group: int, scale: Scale, guess: Coded | None = None) -> Coded:
    """`values` (rows, columns) rounded to `format` with scales found as `scale` says; `guess` narrows a search."""
    if scale == "amax":
        return amax(values, format, group)
    return searched(values, format, group, guess)


def amax(values: Tensor, format: AbstractFormat, group: int) -> Coded:
    """`values` (rows, columns) rounded with each group's largest magnitude at the top of the grid."""
    return format.encode(values, group)


def searched(values: Tensor, format: AbstractFormat, group: int, guess: Coded | None = None) -> Coded:
    """`values` (rows, columns) rounded with the limit of least squared error a group.

    Without `guess` the full search; with it (codes of a matrix close by, same format and group) the neighbours of its
    scales. Formats without integer codes are always searched in full, and those without scales simply rounded.
    """
    rows, columns = values.shape
    if isinstance(format, formats.FloatFormat) or rows * columns == 0:
        return format.encode(values, group)
    if not isinstance(format, formats.IntegerFormat):
        return searched_reference(values, format, group, guess)
    if values.device.type != "cpu":
        return searched_at_once(values, format, group, guess)
    if values.dtype != torch.float32:
        return searched_reference(values, format, group, guess)
    from loraq import rounding_numba  # compiles, or loads what it compiled before: only where it is used

    return rounding_numba.searched(values, format, group, guess)


def searched_reference(values: Tensor, format: AbstractFormat, group: int, guess: Coded | None = None) -> Coded:
    """`searched` in plain torch, for any format and device."""

    def limited(values: Tensor, guess: Coded | None = None) -> Coded:
        return _limited(values, format, group, guess)

    found = formats.coded_by_rows(limited, values, guess) if formats.row_wise(format) else limited(values, guess)
    if isinstance(format, formats.IntegerFormat):
        return found
    # Where groups share a second scale (nvfp4, int4x2), the best limits for each need not be the best together.
    plain = format.encode(values, group)
    return found if squared_error(values, found).sum() <= squared_error(values, plain).sum() else plain


def _limited(values: Tensor, format: AbstractFormat, group: int, guess: Coded | None) -> Coded:
    """`values` (rows, columns) rounded with the limit of least squared error for each group by itself."""
    start, factors = _range(values, format, group, guess)
    best_limits = start
    best_error = torch.full_like(start, torch.inf)
    for factor in factors:
        limits = start * factor
        error = squared_error(values, format.encode(values, group, limits, full_range=True))
        better = error < best_error
        best_limits = torch.where(better, limits, best_limits)
        best_error = torch.where(better, error, best_error)
    return format.encode(values, group, best_limits, full_range=True)


def _range(values: Tensor, format: AbstractFormat, group: int, guess: Coded | None) -> tuple[Tensor, tuple[float, ...]]:
    """Where a search begins, (rows, groups), and what it multiplies that by."""
    start = formats.largest(values, group)
    if guess is None or not isinstance(format, formats.IntegerFormat):
        return start, factors_for(format)
    guessed = guess.scales.float()
    # An all-zero group has a scale of 0, from which multiplying would never get away.
    return torch.where(guessed > 0, guessed * format.limit, start), NEIGHBOURS


def searched_at_once(values: Tensor, format: formats.IntegerFormat, group: int, guess: Coded | None = None) -> Coded:
    """`searched` for GPUs: all limits are tried side by side, in a seventh of the operations; the same codes."""
    copies = len(NEIGHBOURS if guess is not None else factors_for(format))

    def limited(values: Tensor, guess: Coded | None = None) -> Coded:
        start, factors = _range(values, format, group, guess)
        limits = start * start.new_tensor(factors).reshape(-1, 1, 1)
        scales = formats.stored_scales(limits, format.limit).float()
        parts = formats.grouped(values, group)
        codes = (parts / formats.divisors(scales)).round_().clamp_(-format.limit - 1, format.limit)
        sums = _lane_sums(codes.mul_(scales.unsqueeze(-1)).sub_(parts).square_())
        order = torch.arange(len(factors), device=values.device).reshape(-1, 1, 1)
        first = torch.where(sums == sums.amin(dim=0), order, len(factors) - 1).amin(dim=0, keepdim=True)
        return format.encode(values, group, limits.gather(0, first)[0], full_range=True)

    return formats.coded_by_rows(limited, values, guess, copies)


def factors_for(format: AbstractFormat) -> tuple[float, ...]:
    """What the full search multiplies the largest magnitude by."""
    return WIDE_FACTORS if format.bits <= 3 else FACTORS


def squared_error(values: Tensor, coded: Coded) -> Tensor:
    """Each group's squared rounding error, (rows, groups) float32, summed in the kernel's order."""
    size = (len(values), groups_of(values.shape[1], coded.group))
    found = torch.empty(size, dtype=torch.float32, device=values.device)
    decoded = formats.rows_of(coded)
    for rows in row_blocks(values):
        found[rows] = _lane_sums(formats.grouped(values[rows] - decoded(rows), coded.group).square_())
    return found


def _lane_sums(squares: Tensor) -> Tensor:
    """The sums of `squares` (..., groups, group) over each group, (..., groups), in the kernel's order."""
    group = squares.shape[-1]
    if group % LANES:
        squares = torch.nn.functional.pad(squares, (0, LANES - group % LANES))
    chunks = squares.reshape(*squares.shape[:-1], -1, LANES)
    sums = chunks[..., 0, :]
    for chunk in range(1, chunks.shape[-2]):
        sums = sums + chunks[..., chunk, :]
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]
