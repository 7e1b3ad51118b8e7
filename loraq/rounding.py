"""Rounding a matrix to a format, with the scale taken from the largest magnitude or searched for least squared error.

The largest magnitude ("amax") never clips, yet with few bits a slightly smaller limit is better: a few elements
saturate and all others get finer steps. `searched` tries limits of `FACTORS` times the largest magnitude for every
group and keeps the best; a factor of 1 is among them, so that its error is never above amax's. Searching takes as many
roundings as there are factors, so inside a fit's loop `guess` narrows it to the neighbours of the factor found before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraq import formats
from loraq.contracts import AbstractFormat
from loraq.layer import Coded

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

FACTORS = tuple(1 - 0.05 * step for step in range(9))
"""Shrink factors that the search tries: 1, 0.95, ..., 0.6."""


def squared_error(values: Tensor, coded: Coded) -> Tensor:
    """Each group's squared rounding error, (rows, groups) float32."""
    return formats.grouped(values - coded.decode(), coded.group).square().sum(dim=-1)


def amax(values: Tensor, format: AbstractFormat, group: int) -> Coded:
    """`values` (rows, columns) rounded with each group's largest magnitude at the top of the grid."""
    return format.encode(values, group)


def searched(values: Tensor, format: AbstractFormat, group: int, factors: tuple[float, ...] = FACTORS) -> Coded:
    """`values` (rows, columns) rounded with the limit, among `factors` times amax, of least squared error a group."""
    largest = formats.largest(values, group)
    best_limits = largest
    best_error = squared_error(values, format.encode(values, group))
    for factor in factors:
        limits = largest * factor
        error = squared_error(values, format.encode(values, group, limits, full_range=True))
        better = error < best_error
        best_limits = torch.where(better, limits, best_limits)
        best_error = torch.where(better, error, best_error)
    return format.encode(values, group, best_limits, full_range=True)
