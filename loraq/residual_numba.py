"""`residual.ResidualRounding.step` for integer formats as one pass over the weight, compiled by Numba.

For each group of a row: subtract the product, try the step before's scale and its two neighbours, keep the best, write
the error. Three passes over a buffer of one group that stays in the first cache, where torch takes a dozen over the
whole matrix. Sums may be reordered and multiply-adds fused, which is what lets the compiler use vectors throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy
import torch

from loraq import rounding
from loraq.formats import IntegerFormat

if TYPE_CHECKING:
    from torch import Tensor

Array = numpy.ndarray[Any, Any]

_ZERO, _ONE, _FOUR = numpy.float32(0), numpy.float32(1), numpy.float32(4)
_LOWER, _HIGHER = (numpy.float32(factor) for factor in rounding.NEIGHBOURS[1:])
_FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Fused multiply-adds and sums in any order; infinities and NaN keep their meaning."""


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled at its first call; kept on disk unless no folder for that can be written."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache
        compiled = numba.njit(**options)(function)
    return compiled


@_compiled
def _store_bfloat16(value: Any) -> Any:
    """The bits of `value` (float32) as bfloat16, to nearest, ties to even."""
    bits = numpy.float32(value).view(numpy.uint32)
    odd = (bits >> numpy.uint32(16)) & numpy.uint32(1)
    return numpy.uint16((bits + numpy.uint32(0x7FFF) + odd) >> numpy.uint32(16))


@_compiled
def _squared_error(residual: Array, scale: Any, top: Any) -> Any:
    """The squared rounding error of one group at `scale`."""
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    bottom = -top - _ONE
    total = _ZERO
    for column in range(residual.size):
        value = residual[column]
        code = numpy.rint(value * inverse)
        code = code if code < top else top
        code = code if code > bottom else bottom
        error = value - code * scale
        total += error * error
    return total


@_compiled
def _error(residual: Array, scale: Any, top: Any, crest: Any, noise: Any) -> None:
    """The rounding errors of one group at `scale`, weighted, and `noise` times the residual, in place of it."""
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    bottom = -top - _ONE
    plain, steep, most = _ONE - crest, _FOUR * crest * inverse * inverse, scale * scale
    for column in range(residual.size):
        value = residual[column]
        code = numpy.rint(value * inverse)
        code = code if code < top else top
        code = code if code > bottom else bottom
        error = value - code * scale
        square = error * error
        square = square if square < most else most
        residual[column] = error * (plain + steep * square) + noise * value


@_compiled
def _group(residual: Array, guess: Any, top: Any, crest: Any, noise: Any) -> tuple[Any, Any]:
    """(scale, loss) of one group, whose residual becomes its weighted error."""
    if not guess > _ZERO:  # an all-zero group has a scale of 0, from which multiplying would never get away
        for column in range(residual.size):
            guess = abs(residual[column]) if abs(residual[column]) > guess else guess
        guess /= top
    scale, least = guess, _squared_error(residual, guess, top)
    error = _squared_error(residual, guess * _LOWER, top)
    if error < least:
        scale, least = guess * _LOWER, error
    error = _squared_error(residual, guess * _HIGHER, top)
    if error < least:
        scale, least = guess * _HIGHER, error
    if noise > _ZERO:
        squares = _ZERO
        for column in range(residual.size):
            squares += residual[column] * residual[column]
        least += noise * squares
    _error(residual, scale, top, crest, noise)
    return scale, least


@_compiled
def _step_bfloat16(
    weight: Array,
    share: Any,
    product: Array,
    scales: Array,
    group: int,
    top: Any,
    crest: Any,
    noise: Any,
    errors: Array,
) -> float:
    """The errors of `weight * share - product`, bfloat16 as uint16; moves `scales`; returns the sum of squares."""
    rows, columns = weight.shape
    buffer = numpy.empty(group, numpy.float32)
    total = 0.0
    for row in range(rows):
        for index in range(scales.shape[1]):
            first = index * group
            last = min(first + group, columns)
            residual = buffer[: last - first]
            part, taken, made = weight[row, first:last], product[row, first:last], errors[row, first:last]
            for column in range(residual.size):
                bits = numpy.uint32(numpy.uint32(taken[column]) << numpy.uint32(16))
                residual[column] = part[column] * share - bits.view(numpy.float32)
            scales[row, index], least = _group(residual, scales[row, index], top, crest, noise)
            total += least
            for column in range(residual.size):
                made[column] = _store_bfloat16(residual[column])
    return total


@_compiled
def _step_float32(
    weight: Array,
    share: Any,
    product: Array,
    scales: Array,
    group: int,
    top: Any,
    crest: Any,
    noise: Any,
    errors: Array,
) -> float:
    """The same in float32, for processors that do not multiply bfloat16."""
    rows, columns = weight.shape
    total = 0.0
    for row in range(rows):
        for index in range(scales.shape[1]):
            first = index * group
            last = min(first + group, columns)
            part, taken, residual = weight[row, first:last], product[row, first:last], errors[row, first:last]
            for column in range(residual.size):
                residual[column] = part[column] * share - taken[column]
            scales[row, index], least = _group(residual, scales[row, index], top, crest, noise)
            total += least
    return total


@_compiled
def _row_squares(values: Array, rows: Array) -> None:
    """The sum of squares of each row of `values`, bfloat16 as uint16."""
    for row in range(values.shape[0]):
        taken, total = values[row], _ZERO
        for column in range(values.shape[1]):
            value = numpy.uint32(numpy.uint32(taken[column]) << numpy.uint32(16)).view(numpy.float32)
            total += value * value
        rows[row] = total


@_compiled
def _column_squares(values: Array, columns: Array) -> None:
    """The sum of squares of each column of `values`, bfloat16 as uint16."""
    columns[:] = _ZERO
    for row in range(values.shape[0]):
        taken = values[row]
        for column in range(values.shape[1]):
            value = numpy.uint32(numpy.uint32(taken[column]) << numpy.uint32(16)).view(numpy.float32)
            columns[column] += value * value


@_compiled
def _move(values: Array, direction: Array, lengths: Array, scales: Array, group: int, top: Any, rounded: Array) -> None:
    """Add `lengths * direction` to `values` (rows, columns) and round them with `scales` (rows, groups).

    `lengths` is (rows, 1) or (1, columns); `direction` and `rounded` are bfloat16 as uint16.
    """
    rows, columns = values.shape
    buffer = numpy.empty(columns, numpy.float32)
    bottom = -top - _ONE
    for row in range(rows):
        part, taken, made = values[row], direction[row], rounded[row]
        if lengths.shape[1] == 1:
            buffer[:] = lengths[row, 0]
        else:
            buffer[:] = lengths[0]
        for column in range(columns):
            value = numpy.uint32(numpy.uint32(taken[column]) << numpy.uint32(16)).view(numpy.float32)
            part[column] += buffer[column] * value
        for index in range(scales.shape[1]):
            scale = scales[row, index]
            inverse = _ONE / scale if scale > _ZERO else _ZERO
            for column in range(index * group, min((index + 1) * group, columns)):
                code = numpy.rint(part[column] * inverse)
                code = code if code < top else top
                code = code if code > bottom else bottom
                buffer[column] = code * scale
        for column in range(columns):
            made[column] = _store_bfloat16(buffer[column])


def squares(values: Tensor, *, rows: bool) -> Tensor:
    """The sums of squares of the rows, (rows, 1), or else the columns, (1, columns), of `values` bfloat16."""
    bits = values.view(torch.uint16).numpy()
    found = torch.empty((values.shape[0], 1) if rows else (1, values.shape[1]), dtype=torch.float32)
    (_row_squares if rows else _column_squares)(bits, found.view(-1).numpy())
    return found


def moved(values: Tensor, direction: Tensor, lengths: Tensor, scales: Tensor, group: int, limit: int) -> Tensor:
    """Add `lengths * direction` to `values` (rows, columns) float32 in place; returns them rounded, bfloat16.

    `direction` is bfloat16 and `lengths` (rows, 1) or (1, columns); codes are -limit - 1 to `limit` times `scales`
    (rows, groups) float32.
    """
    rounded = torch.empty_like(direction)
    taken, made = direction.view(torch.uint16).numpy(), rounded.view(torch.uint16).numpy()
    _move(values.numpy(), taken, lengths.numpy(), scales.numpy(), group, numpy.float32(limit), made)
    return rounded


class Fused:
    """The kernel with its weight (out, inn) float32, its output, and the scales that one step hands to the next.

    All but the weight is in units of `unit`, a power of two.
    """

    def __init__(self, weight: Tensor, format: IntegerFormat, group: int, unit: float) -> None:
        self._weight = weight.detach().contiguous().numpy()
        self._share = numpy.float32(1 / unit)
        self._top = numpy.float32(format.limit)
        self._group = group
        self._errors: Tensor | None = None
        self.scales = torch.empty(0)

    def step(self, product: Tensor, crest: float, noise: float) -> tuple[Tensor, float]:
        """(E, bfloat16 or float32 as `product` is; the loss), see ResidualRounding. The next step overwrites E."""
        if self._errors is None or self._errors.dtype != product.dtype:
            self._errors = torch.empty_like(product)
        narrow = product.dtype == torch.bfloat16
        taken, made = (each.view(torch.uint16) if narrow else each for each in (product, self._errors))
        total = (_step_bfloat16 if narrow else _step_float32)(
            self._weight,
            self._share,
            taken.numpy(),
            self.scales.numpy(),
            self._group,
            self._top,
            numpy.float32(crest),
            numpy.float32(noise),
            made.numpy(),
        )
        return self._errors, total**0.5
